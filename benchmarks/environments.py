"""How fast do the environments step, and how far do a constant action, blind choice and the expert get?

    python -m benchmarks.environments [NAME ...] [--tasks 40] [--seed 0] [--model DIR] [--save]
    python -m benchmarks.environments --table

Held-out tasks, fewer where there are not so many. Speed is in steps per second of processor time, of episodes of random actions, each played as a rollout
does it, step after step, eight episodes of a task side by side (random ones of an expert's actions where there is no list of all). `turns` is the mean length of an expert's episode, where there
is an expert; `hack` the mean reward of a policy after the reward alone, where it can be had the wrong way. With --model, the greedy episodes of a language model too, and the means of their components.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from models.machine import describe
from tasks.arena.environment import Environment, Expert, Hackable, Listed, Task, get, names
from tasks.arena.playing import play
from tasks.core.errors import UsageError

BASELINE = Path(__file__).parent / "baselines" / "environments.json"
RIDDLES = ("reasoning_gym/chain_sum", "reasoning_gym/gcd")  # two of 105 stand for all
SIDE_BY_SIDE = 8


def some_tasks(env: Environment, n: int, seed: int) -> list[Task]:
    """`n` held-out tasks, or fewer where there are not so many."""
    while True:
        try:
            return env.tasks("heldout", n, seed)
        except UsageError:
            n = n * 3 // 4
            if not n:
                raise


def actions_for(env: Environment, task: Task) -> Sequence[str]:
    """Actions to draw from: all of them, or those that the expert writes, or a call and a number."""
    if isinstance(env, Listed):
        return env.choices(task)
    if not isinstance(env, Expert):
        return ["calc(52 - 11)", "41"]
    written: list[str] = []
    while not (written and env.step(task, written).done):
        written.append(env.expert(task, written))
    return written


def cpu_seconds() -> float:
    """Of this process and those it has started (a Java machine, sandboxes that have ended): what else the machine does is in
    no figure."""
    spent, ended = time.process_time(), os.times()
    spent += ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            spent += times.user + times.system
    return spent


def steps_a_second(env: Environment, tasks: Sequence[Task], seed: int) -> float:
    rng = random.Random(seed)
    drawn = [actions_for(env, task) for task in tasks]
    steps, began = 0, cpu_seconds()
    for task, choices in zip(tasks, drawn, strict=True):
        episodes: list[list[str]] = [[] for _ in range(SIDE_BY_SIDE)]
        while episodes:
            for actions in episodes:
                actions.append(rng.choice(choices))
            steps += len(episodes)
            episodes = [actions for actions in episodes if not env.step(task, actions).done]
    return steps / (cpu_seconds() - began)


def measure(name: str, n: int, seed: int, model: tuple | None) -> dict[str, Any]:
    env = get(name)
    tasks = some_tasks(env, n, seed)
    action, constant = env.constant_baseline(tasks)
    row: dict[str, Any] = {
        "environment": name,
        "tasks": len(tasks),
        "max_turns": env.max_turns,
        "licence": env.licence,
        "constant_action": action,
        "constant": constant,
        "random": env.random_baseline(tasks, seed),
        "steps_per_cpu_second": round(steps_a_second(env, tasks[:20], seed)),
        "prompt_characters": round(statistics.mean(len(task.prompt) for task in tasks)),
    }
    if isinstance(env, Expert):
        expert = env.expert
        episodes = [play(env, task, lambda actions, t=task: expert(t, actions)) for task in tasks]
        row["expert"] = statistics.mean(steps[-1].reward for steps in episodes)
        row["turns"] = statistics.mean(map(len, episodes))
    if isinstance(env, Hackable):
        ends = [play(env, task, lambda actions, t=task: env.hack(t, actions))[-1] for task in tasks]
        row["hack"] = statistics.mean(end.reward for end in ends)
    if model is not None:
        from tasks.rollout.rollout import evaluate

        outcomes = evaluate(*model, env, tasks, batch_rows=16)
        row["model"] = statistics.mean(outcome.reward for outcome in outcomes)
        told = {name for outcome in outcomes for name in outcome.components}
        row["model_components"] = {
            name: statistics.mean(outcome.components.get(name, 0.0) for outcome in outcomes)
            for name in sorted(told)
        }
    return row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/environments.md."""
    lines = [
        "| environment | tasks | constant | its action | random | expert | its turns | prompt, characters | steps a CPU second |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        expert, turns = (
            f"{row[name]:.{digits}f}" if name in row else "–"
            for name, digits in (("expert", 3), ("turns", 1))
        )
        lines.append(
            f"| {row['environment']} | {row['tasks']} | {row['constant']:.3f} | `{row['constant_action']}` | {row['random']:.3f} | "
            f"{expert} | {turns} | {row['prompt_characters']} | {row['steps_per_cpu_second']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    parser.add_argument(
        "--table", action="store_true", help="print the kept figures as the table of the docs"
    )
    words = parser.parse_args()
    model = None
    if words.model:
        from models.causal_lm import load_policy, load_tokenizer

        model = load_policy(words.model), load_tokenizer(words.model)
    chosen = words.names or [n for n in names() if n in RIDDLES or not n.startswith("reasoning_gym/")]
    if words.table:
        print(markdown(json.loads(BASELINE.read_text())["rows"]))
        return
    rows = []
    print(describe())
    for name in chosen:
        rows.append(measure(name, words.tasks, words.seed, model))
        print(json.dumps(rows[-1]), flush=True)
    if words.save:
        BASELINE.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
