"""A reward model as a fine-tuned transformer: one number for a prompt and an answer, learnt from comparisons.

The probability that answer a beats answer b is sigmoid(s_a - s_b) (Bradley and Terry, 1952), so the loss of a
pair is -log sigmoid(s_chosen - s_rejected). A checkpoint with a score head of its own (a sequence classifier of
transformers) keeps it; on a bare encoder or decoder the states of the answer's tokens are averaged and a linear
head, drawn from the seed, makes the number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from models.causal_lm import ModelError, explained, quiet, resolve
from models.reward_head import confidence

HEAD = "head.safetensors"
_CLASSIFIER = "ForSequenceClassification"
_PROMPT_SHARE = 4  # a long answer leaves at least a quarter of the window to the end of its prompt
_SCORING_TOKENS = 8192  # padded tokens of one batch without gradients
_BUCKETS = 16  # batches among which pairs are sorted by length
_MOST_NORM = 1.0  # of the gradient of one update


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt and answer as tokens; the answer's are ids[start:end]."""

    ids: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Fit:
    """How to fine-tune.

    Attributes:
        epochs: passes over the pairs, at most; it ends earlier once an epoch does not help the calibration pairs.
        warmup: share of the updates over which the learning rate rises; afterwards it falls to 0.
        batch_pairs: pairs of one update.
        token_budget: padded tokens that go through the model at once; larger batches are accumulated.
    """

    epochs: int
    learning_rate: float
    warmup: float
    weight_decay: float
    batch_pairs: int
    token_budget: int = 8192


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log sigmoid(chosen - rejected), [n] nats, from the scores [n] of both sides."""
    return -nn.functional.logsigmoid(chosen - rejected)


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], max_tokens: int
) -> list[Encoded]:
    """Tokenise (prompt, answer) pairs into at most `max_tokens` each.

    What does not fit is cut from the front, where it matters least: the end of the prompt is what is asked, the
    end of the answer is its result. With CLS and SEP tokens the form is `CLS prompt SEP answer SEP`, else prompt
    and answer follow one another. An empty answer is one end token, so that it has a score.

    Raises:
        ValueError: the window has no room for a token of each.
    """
    if max_tokens < 8:
        raise ValueError(f"a window of {max_tokens} tokens holds no prompt and answer")
    if not texts:
        return []
    prompts, answers = (_tokens(tokenizer, side) for side in zip(*texts, strict=True))
    cls, sep = _id(tokenizer, "cls_token_id"), _id(tokenizer, "sep_token_id")
    before: list[int] = []
    between: list[int] = []
    nothing = [_id(tokenizer, "eos_token_id") or 0]
    paired = cls is not None and sep is not None
    if cls is not None and sep is not None:
        before, between, nothing = [cls], [sep], [sep]
    after = between
    room = max_tokens - len(before) - len(between) - len(after)
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if not paired:  # a first token that predicts nothing is still needed
            prompt = prompt or nothing
        answer = answer[-(room - min(len(prompt), room // _PROMPT_SHARE)) :] or nothing
        prompt = prompt[max(0, len(prompt) - (room - len(answer))) :]
        head = [*before, *prompt, *between]
        found.append(Encoded((*head, *answer, *after), len(head), len(head) + len(answer)))
    return found


class Scorer(nn.Module):
    """A transformer that gives a score and a feature vector; see the module's docstring.

    Args:
        model: of transformers; a sequence classifier with one label where `head` is None.
        head: [1, D] on the mean state of the answer.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, head: nn.Linear | None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.head = model, tokenizer, head
        config: Any = model.config
        self.window = int(getattr(config, "max_position_embeddings", 1 << 20))
        self._padding = _id(tokenizer, "pad_token_id") or 0
        self._typed = getattr(config, "type_vocab_size", 0) > 1  # it tells prompt and answer apart
        if head is None and config.pad_token_id is None:
            config.pad_token_id = self._padding  # decoders find the last token by it

    def forward(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return scores [B] and the mean last states of the answers' tokens [B, D]."""
        inputs, answer = self._batch(rows)
        if self.head is None:
            found = self.model(**inputs, output_hidden_states=True)
            return found.logits[:, 0], _mean(found.hidden_states[-1], answer)
        features = _mean(self.model(**inputs).last_hidden_state, answer)
        return self.head(features)[:, 0], features

    def encode(self, texts: Sequence[tuple[str, str]], max_tokens: int) -> list[Encoded]:
        """Tokenise (prompt, answer) pairs within the model's window."""
        return encode(self.tokenizer, texts, min(max_tokens, self.window))

    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer as safetensors and JSON."""
        model: Any = self.model
        with quiet():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.head is not None:
            save_file({"weight": self.head.weight.detach().contiguous()}, folder / HEAD)

    def _batch(self, rows: Sequence[Encoded]) -> tuple[dict[str, Tensor], Tensor]:
        device = next(self.model.parameters()).device
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), self._padding)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row.ids)] = torch.tensor(row.ids)
            mask[at, : len(row.ids)] = 1
            answer[at, row.start : row.end] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self._typed:
            inputs["token_type_ids"] = ((torch.cumsum(answer, 1) > 0) & (mask > 0)).long().to(device)
        return inputs, answer.to(device)


def load_base(name: str, *, seed: int, device: str = "cpu") -> Scorer:
    """Load a base to fine-tune: a folder, `pypi:<package>` or a hub id, safetensors only, without remote code.

    A sequence classifier with another number of labels than one, and a base without a head, get a new head that
    is drawn from `seed`.

    Raises:
        ModelError: there is no such model, or it cannot be read so.
    """
    source = resolve(name)
    if source.kind == "gguf":
        raise ModelError(
            f"{name} is a GGUF file; a classifier starts from a folder with safetensors weights."
        )
    location, _, revision = (
        source.location.partition("@") if source.kind == "hub" else (source.location, "", "")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _load(location, {"revision": revision} if revision else {}, name, device)


def load_scorer(folder: Path, device: str = "cpu") -> Scorer:
    """Load what `Scorer.save` wrote, in evaluation mode.

    Raises:
        ModelError: it is not there or not readable.
    """
    scorer = _load(str(folder), {"local_files_only": True}, str(folder), device)
    if scorer.head is not None:
        with explained(str(folder)):
            scorer.head.load_state_dict(load_file(folder / HEAD))
    return scorer.eval()


@torch.inference_mode()
def score_rows(
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    token_budget: int = _SCORING_TOKENS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Return scores [n] and features [n, D] in float64 on the CPU, in the order of `rows`.

    Rows go through the model sorted by length, so that little is padding.
    """
    was = scorer.training
    scorer.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    scores: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}
    for part in _cut(order, [len(row.ids) for row in rows], token_budget):
        found, states = scorer([rows[i] for i in part])
        for i, score, state in zip(part, found.double().cpu(), states.double().cpu(), strict=True):
            scores[i], features[i] = score, state
        report(len(scores), len(rows))
    scorer.train(was)
    places = range(len(rows))
    return torch.stack([scores[i] for i in places]), torch.stack([features[i] for i in places])


def fine_tune(
    scorer: Scorer,
    train: Sequence[tuple[Encoded, Encoded]],
    groups: Sequence[str],
    calibration: Sequence[tuple[Encoded, Encoded]],
    fit: Fit,
    *,
    seed: int,
    report: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> float:
    """Fine-tune `scorer` in place on (chosen, rejected) pairs; return the factor that makes its margins honest.

    `groups` names the prompt of each pair to train on.

    After each epoch the loss on the calibration pairs is measured at its best scale; the weights of the best
    epoch are kept, and the first epoch that does not help is the last. With the same seed, thread count and
    library a CPU gives the same bits again.

    Raises:
        ValueError: there are no pairs, or a loss is not a number.
    """
    if not train:
        raise ValueError("a classifier needs pairs to learn from")
    widths = [_width(pair) for pair in train]
    updates = fit.epochs * math.ceil(len(train) / fit.batch_pairs)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    rise = max(1, round(fit.warmup * updates))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min((at + 1) / rise, (updates - at) / max(1, updates - rise + 1))
    )
    order = torch.Generator().manual_seed(seed)
    best: tuple[float, float, dict[str, Tensor]] | None = None
    done = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(1, fit.epochs + 1):
            scorer.train()
            for batch in batches(groups, widths, fit.batch_pairs, order):
                loss = _update(scorer, optimizer, [train[at] for at in batch], fit.token_budget)
                schedule.step()
                done += 1
                report(done, updates, f"epoch {epoch}  loss {loss:.3f}")
            loss, scale = _calibrated(scorer, calibration)
            report(done, updates, f"epoch {epoch}  calibration loss {loss:.3f}")
            if calibration and best is not None and loss >= best[0]:
                break
            best = (loss, scale, copy.deepcopy(scorer.state_dict()))
    assert best is not None
    scorer.load_state_dict(best[2])
    scorer.eval()
    return best[1]


def batches(
    groups: Sequence[str], widths: Sequence[int], size: int, order: torch.Generator
) -> Iterator[list[int]]:
    """Yield the places of all pairs once, in batches of about equal length whose order, too, is drawn from `order`.

    The pairs of one group stay together as far as they can: they share answers, which then are read once.

    Args:
        groups: [n] names.
        widths: [n] tokens of the longer side.
        size: pairs of a batch.
    """
    members: dict[str, list[int]] = {}
    for at, group in enumerate(groups):
        members.setdefault(group, []).append(at)
    names = list(members)
    longest = {name: max(widths[at] for at in members[name]) for name in names}
    drawn = [names[at] for at in torch.randperm(len(names), generator=order).tolist()]
    place = {name: at for at, name in enumerate(drawn)}
    shuffled = [at for name in drawn for at in members[name]]
    found = []
    for start in range(0, len(shuffled), size * _BUCKETS):
        bucket = shuffled[start : start + size * _BUCKETS]
        bucket.sort(key=lambda at: (longest[groups[at]], place[groups[at]]))
        found += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    for at in torch.randperm(len(found), generator=order).tolist():
        yield found[at]


def _update(
    scorer: Scorer, optimizer: torch.optim.Optimizer, batch: Sequence[tuple[Encoded, Encoded]], budget: int
) -> float:
    """One step; the batch goes through in parts, whose gradients add up to that of its mean loss."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in _cut(range(len(batch)), [2 * _width(pair) for pair in batch], budget):
        rows = list(dict.fromkeys(row for i in part for row in batch[i]))
        place = {row: at for at, row in enumerate(rows)}
        scores, _ = scorer(rows)
        chosen, rejected = (scores[[place[batch[i][side]] for i in part]] for side in (0, 1))
        loss = bradley_terry(chosen, rejected).sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if not math.isfinite(total):
        raise ValueError("the loss is not a number any more; lower the learning rate")
    nn.utils.clip_grad_norm_(scorer.parameters(), _MOST_NORM)
    optimizer.step()
    return total


def _calibrated(scorer: Scorer, pairs: Sequence[tuple[Encoded, Encoded]]) -> tuple[float, float]:
    """Return the mean loss on `pairs` at the scale that is best for them, and that scale."""
    if not pairs:
        return math.inf, 1.0
    rows = list(dict.fromkeys(row for pair in pairs for row in pair))
    place = {row: at for at, row in enumerate(rows)}
    scores, _ = score_rows(scorer, rows)
    chosen, rejected = (scores[[place[pair[side]] for pair in pairs]] for side in (0, 1))
    margins = chosen - rejected
    scale = confidence(margins)
    return float(bradley_terry(scale * margins, torch.zeros_like(margins)).mean()), scale


def _load(location: str, options: dict[str, Any], name: str, device: str) -> Scorer:
    options = {"trust_remote_code": False, **options}
    with quiet(), explained(name):
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        weights = {"dtype": torch.float32, "use_safetensors": True, **options}
        if _has_head(location, options):
            model = AutoModelForSequenceClassification.from_pretrained(
                location, num_labels=1, ignore_mismatched_sizes=True, **weights
            )
            return Scorer(model.to(device), tokenizer, None)
        model = AutoModel.from_pretrained(location, **weights)
        width = int(model.config.hidden_size)
        head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(head.weight, std=width**-0.5)
        return Scorer(model.to(device), tokenizer, head.to(device))


def _has_head(location: str, options: dict[str, Any]) -> bool:
    names = AutoConfig.from_pretrained(location, **options).architectures or []
    return any(name.endswith(_CLASSIFIER) for name in names)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(states.dtype)[..., None]
    return (states * weight).sum(1) / weight.sum(1)


def _cut(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut `order` into runs whose padded size is at most `budget`; a longer row stands alone."""
    part: list[int] = []
    widest = 0
    for i in order:
        wider = max(widest, lengths[i])
        if part and wider * (len(part) + 1) > budget:
            yield part
            part, wider = [], lengths[i]
        part.append(i)
        widest = wider
    if part:
        yield part


def _width(pair: tuple[Encoded, Encoded]) -> int:
    return max(len(row.ids) for row in pair)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    value: int | None = getattr(tokenizer, name, None)
    return value
