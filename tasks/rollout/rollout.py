"""The episode loop: prompts in, finished groups of episodes with rewards and log-probabilities out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar

import torch

from models.logprobs import token_logprobs
from models.packing import Sample
from models.turn_samples import oldest_read
from tasks.arena.environment import Environment, Step, Task, step_all, verifier_digest
from tasks.arena.memory import memory_turns
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import UsageError
from tasks.replay.passes import passes
from tasks.replay.schema import INVALID_TURNS, MEMORY_TURNS, Episode, FinishReason
from tasks.rollout.engine import Action, Engine, Local, Noise, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
SOURCE = "rollout"  # of every episode that is sampled here


@dataclass(frozen=True)
class BehaviourIdentity:
    """Which policy generates: its registry version ("agent/1") and the digests of what it is made of."""

    version: str
    digest: str
    tokenizer_digest: str
    template_digest: str


@dataclass(frozen=True)
class Outcome:
    """One episode of an evaluation.

    `response_text` holds all turns with their observations; `tokens` counts what the policy wrote.
    """

    task_id: str
    env: str
    reward: float
    components: dict[str, float]
    response_text: str
    turns: int
    tokens: int
    family: str
    finish_reason: FinishReason
    invalid_turns: int = 0


def rollout(
    policy: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase,
    env: Environment,
    tasks: Sequence[Task],
    *,
    group_size: int,
    temperature: float,
    seed: int,
    batch_rows: int,
    identity: BehaviourIdentity,
    done: Collection[str] = (),
    created_at: str | None = None,
) -> Iterator[list[Episode]]:
    """Yield one finished group of `group_size` episodes for each task, in the order of `tasks`.

    The policy is a model in this process, or an engine that answers for it (`tasks.rollout.remote`).

    The noise of a token depends only on `seed`, the task's id, the sample and the token's index, and what is
    computed together only on `tasks` and `batch_rows`, so on a CPU a resumed collection gives the same bytes:
    name the tasks whose groups exist already in `done` and they are left out (a batch that lacks none is not
    computed). Give `created_at` (UTC, ISO-8601; by default the time of the call) to repeat that field as
    well.

    Raises:
        UsageError: the temperature is not above 0, or the group size is below 1.
        Refused: the model's logits are not numbers.
    """
    if not temperature > 0:
        raise UsageError(f"The sampling temperature must be above 0, not {temperature}.")
    if group_size < 1:
        raise UsageError(f"A group needs at least one episode, not {group_size}.")
    engine = _engine(policy)
    created_at = created_at or datetime.now(UTC).isoformat(timespec="seconds")
    reward_digest = verifier_digest(env)
    present = frozenset(done)
    for batch in _batches(tasks, max(1, batch_rows // group_size)):
        if all(task.id in present for task in batch):
            continue
        drafts = [
            _Draft(task, sample, _noise(seed, task.id, sample))
            for task in batch
            for sample in range(group_size)
        ]
        _play(engine, tokenizer, env, drafts, group_size, temperature)
        for task, group in zip(batch, _batches(drafts, group_size), strict=True):
            if task.id in present:
                continue
            group_id = digest_json(
                [identity.digest, task.id, task.env_version, seed, temperature, group_size]
            )[:32]
            yield [
                Episode(
                    episode_id=f"{group_id}-{draft.sample}",
                    group_id=group_id,
                    sample_index=draft.sample,
                    task_id=task.id,
                    env=task.env,
                    env_version=task.env_version,
                    split=task.split,
                    seed=seed,
                    prompt_ids=draft.prompt_ids,
                    response_ids=draft.ids,
                    loss_mask=draft.mask,
                    turn_ids=draft.turn_ids,
                    behaviour_logprobs=draft.logprobs,
                    logprob_source="engine",
                    behaviour_version=identity.version,
                    behaviour_digest=identity.digest,
                    temperature=temperature,
                    top_p=1.0,
                    max_new_tokens=env.max_new_tokens,
                    tokenizer_digest=identity.tokenizer_digest,
                    template_digest=identity.template_digest,
                    reward=draft.end.reward,
                    reward_components=reward_components(draft.end, draft.invalid, memory_turns(env)),
                    reward_digest=reward_digest,
                    finish_reason=draft.finish_reason,
                    prompt_sha256=sha256_bytes(task.prompt.encode()),
                    response_text=_decode(tokenizer, draft.ids),
                    source=SOURCE,
                    licence=env.licence,
                    created_at=created_at,
                )
                for draft in group
            ]


def evaluate(
    policy: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase,
    env: Environment,
    tasks: Sequence[Task],
    batch_rows: int,
) -> list[Outcome]:
    """Play every task once, always taking the most probable token; outcomes stand in the order of `tasks`."""
    engine = _engine(policy)
    drafts = [_Draft(task) for task in tasks]
    for batch in _batches(drafts, batch_rows):
        _play(engine, tokenizer, env, batch)
    return [_outcome(tokenizer, draft) for draft in drafts]


def attempts(
    policy: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase,
    env: Environment,
    tasks: Sequence[Task],
    *,
    samples: int,
    temperature: float,
    seed: int,
    batch_rows: int,
) -> list[list[Outcome]]:
    """Play every task `samples` times with the noise of `rollout`; a list for each task, in the order of `tasks`.

    Raises:
        UsageError: the temperature is not above 0, or `samples` below 1.
    """
    if not temperature > 0 or samples < 1:
        raise UsageError(
            f"Attempts need a temperature above 0 and at least one sample, not {temperature} and {samples}."
        )
    engine = _engine(policy)
    found: list[list[Outcome]] = []
    for batch in _batches(tasks, max(1, batch_rows // samples)):
        drafts = [_Draft(task, n, _noise(seed, task.id, n)) for task in batch for n in range(samples)]
        if samples <= batch_rows:
            _play(engine, tokenizer, env, drafts, samples, temperature)
        else:  # then the batch is one task
            for part in _batches(drafts, batch_rows):
                _play(engine, tokenizer, env, part, len(part), temperature)
        found += [[*map(partial(_outcome, tokenizer), group)] for group in _batches(drafts, samples)]
    return found


@torch.inference_mode()
def recompute_logprobs(
    model: PreTrainedModel, episodes: Sequence[Episode], batch_tokens: int = 4096
) -> list[Episode]:
    """Give `episodes` the log-probabilities that `model` assigns to their tokens at their temperature.

    For experience recorded without them, if `model` is the checkpoint that generated it. `batch_tokens`
    bounds the padded size of a forward pass. Returns copies with `logprob_source` "recomputed", in the order
    given.
    """
    read = [passes(episode) for episode in episodes]
    samples = [sample for part in read for sample in part]
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
    by_length = sorted(range(len(samples)), key=lengths.__getitem__)
    found: dict[int, list[float]] = {}
    while by_length:
        size = max(1, batch_tokens // lengths[by_length[-1]])
        batch, by_length = by_length[-size:], by_length[:-size]
        found |= zip(batch, _forward_logprobs(model, [samples[i] for i in batch]), strict=True)
    written = (logprob for i in range(len(samples)) for logprob in found[i])
    return [
        replace(
            episode,
            behaviour_logprobs=[next(written) if mine else 0.0 for mine in episode.loss_mask],
            logprob_source="recomputed",
        )
        for episode in episodes
    ]


_UNFINISHED = Step(observation="", done=False)


@dataclass
class _Draft:
    """An episode while it grows; greedy if it has no noise."""

    task: Task
    sample: int = 0
    noise: Noise | None = None
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    invalid: list[int] = field(default_factory=list)  # turns
    end: Step = _UNFINISHED
    finish_reason: FinishReason = "turns"

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None, turn: int) -> None:
        """Add an action with its log-probabilities, or an observation that has none."""
        self.ids += ids
        self.mask += [logprobs is not None] * len(ids)
        self.turn_ids += [turn] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def read(self, turn: int, memory: int) -> list[int]:
        """What turn `turn` is written from, with a memory of so many turns."""
        return self.prompt_ids + self.ids[oldest_read(self.turn_ids, turn, memory) :]


def _outcome(tokenizer: PreTrainedTokenizerBase, draft: _Draft) -> Outcome:
    return Outcome(
        task_id=draft.task.id,
        env=draft.task.env,
        reward=draft.end.reward,
        components=dict(draft.end.components),
        response_text=_decode(tokenizer, draft.ids),
        turns=len(draft.actions),
        tokens=sum(draft.mask),
        family=draft.task.family,
        finish_reason=draft.finish_reason,
        invalid_turns=len(draft.invalid),
    )


def reward_components(end: Step, invalid: Sequence[int], memory: int | None) -> str:
    """The column of an episode that ended so, with invalid turns (numbers), and a memory of so many turns (None: of all)."""
    extra = ({INVALID_TURNS: list(invalid)} if invalid else {}) | (
        {} if memory is None else {MEMORY_TURNS: memory}
    )
    return canonical_json({**end.components, **extra}).decode()


def _noise(seed: int, task_id: str, sample: int) -> Noise:
    return (uniform(seed, task_id, sample, token) for token in itertools.count())


def _engine(policy: PreTrainedModel | Engine) -> Engine:
    return policy if isinstance(policy, Engine) else Local(policy)


def _play(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    env: Environment,
    drafts: Sequence[_Draft],
    copies: int = 1,
    temperature: float = 1.0,
) -> None:
    """Play the empty `drafts` to their ends as one batch; each run of `copies` drafts has the same task."""
    for draft in drafts:
        draft.prompt_ids = _encode(tokenizer, draft.task.prompt)
    stop = stop_tokens(tokenizer)
    memory = memory_turns(env)
    rows = engine.start([draft.prompt_ids for draft in drafts[::copies]], copies)
    live = list(drafts)
    for turn in range(env.max_turns):
        noise = [draft.noise for draft in live if draft.noise is not None]
        last = turn == env.max_turns - 1
        # Then the next turn is not written from all before it.
        forgets = memory is not None and turn >= memory
        actions = rows.act(noise or None, temperature, stop, env.max_new_tokens, last or forgets)
        written = [_decode(tokenizer, action.ids, skip_special_tokens=True) for action in actions]
        for draft, action, text in zip(live, actions, written, strict=True):
            draft.append(action.ids, action.logprobs, turn)
            draft.actions.append(text.partition("\n")[0])
        answers = step_all(env, [(draft.task, draft.actions) for draft in live])
        chunks = [
            _advance(tokenizer, env, draft, action, text, answer, turn, stop)
            for draft, action, text, answer in zip(live, actions, written, answers, strict=True)
        ]
        on = [i for i, chunk in enumerate(chunks) if chunk]
        if last or not on:
            return
        live = [live[i] for i in on]
        if memory is not None and forgets:
            rows = engine.start([draft.read(turn + 1, memory) for draft in live], 1)
        else:
            rows.keep(on)
            rows.feed([chunks[i] for i in on])


def _advance(
    tokenizer: PreTrainedTokenizerBase,
    env: Environment,
    draft: _Draft,
    action: Action,
    written: str,
    answer: Step | Exception,
    turn: int,
    stop: frozenset[int],
) -> list[int]:
    """Take the environment's answer to `action`: what the row's cache now lacks, nothing if the episode is over."""
    if isinstance(answer, Exception):  # it costs this episode, not the collection
        _log.warning("%s failed in task %s: %r; the episode gets reward 0", env.name, draft.task.id, answer)
        draft.end, draft.finish_reason = Step("", done=True, components={"error": 1.0}), "error"
        return []
    draft.end = answer
    if not answer.valid:
        draft.invalid.append(turn)
    if answer.done:
        draft.finish_reason = "done" if action.ids[-1] in stop else "length"
        return []
    if turn == env.max_turns - 1:
        return []
    line_break = "" if "\n" in written else "\n"  # an action that was cut still ends its line
    observation = _encode(tokenizer, line_break + answer.observation)
    draft.append(observation, None, turn)
    return action.ids[-1:] + observation


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


@lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an action: every token whose text has a newline, and the special ones."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(tokenizer.all_special_ids) | {i for i, text in enumerate(texts) if "\n" in text}


def _forward_logprobs(model: PreTrainedModel, samples: Sequence[Sample]) -> list[list[float]]:
    """One padded forward pass; the trained tokens of every sample."""
    sequences = [[*sample.prompt_ids, *sample.response_ids] for sample in samples]
    width = max(map(len, sequences))
    device = model.device
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    weight: torch.Tensor = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    answers = []
    for row, sample in enumerate(samples):
        targets = torch.tensor(sample.response_ids, device=device)
        first = len(sample.prompt_ids)
        states = hidden[row, first - 1 : first - 1 + len(targets)]
        temperature = torch.full(targets.shape, sample.temperature, dtype=torch.float64)
        logprobs, _ = token_logprobs(states, weight, targets, temperature)
        answers.append(logprobs[torch.tensor(sample.trained, dtype=torch.bool, device=device)].tolist())
    return answers


def _batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
