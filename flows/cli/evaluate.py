"""Evaluation outside a cycle."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from flows.cli.console import (
    HERE,
    Json,
    RayAddress,
    Runner,
    Set,
    Where,
    evaluate_app,
    open_context,
    out,
    print_json,
    watch,
)
from tasks.core.errors import Refused


@evaluate_app.command("replay")
def evaluate_replay(
    on: Annotated[str, typer.Option("--on", help="Sealed dataset: logs, logs/v1 or the start of its root.")],
    candidate: Annotated[str, typer.Option(help="Agent that is judged.")] = "candidate",
    champion: Annotated[str, typer.Option(help="Agent that it is held against.")] = "champion",
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Judge off-policy what an agent would have earned on logged answers, under the policy's section replay_value.

    Prompts that either agent was trained on are left out. A log that says too little about an agent is INCONCLUSIVE, with
    the reasons. Exit code 5 where the candidate is worse. The same request again finds the evidence in the ledger.

    Examples: `forebay evaluate replay --candidate agent/3 --on logs/v1` · `forebay evaluate replay --on logs --json`
    """
    from flows.evidence import evaluate_replay as judge
    from flows.show import verdict

    watch(as_json)
    found = judge(open_context(workspace, overrides), candidate, champion, on)
    if as_json:
        print_json(found)
    else:
        out.print(
            verdict(found["verdict"]),
            f"agent/{found['candidate']} against agent/{found['champion']}",
            highlight=False,
        )
        out.print(found["says"], highlight=False, markup=False)
    if found["verdict"] == "FAIL":
        raise Refused(
            f"agent/{found['candidate']} earns less than agent/{found['champion']} on {found['on']}."
        )


@evaluate_app.command("attempts")
def evaluate_attempts(
    agent: Annotated[str, typer.Argument(help="Agent that is asked, as champion or agent/3.")] = "champion",
    envs: Annotated[
        str | None,
        typer.Option(
            help="Environments, joined by commas, sokoban or tools will do; those of evaluation.tasks if not given."
        ),
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Held-out tasks of each environment.")] = 50,
    samples: Annotated[int, typer.Option(min=1, help="Attempts at each task.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of tasks and noise; the same one compares agents.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Environments at once.")] = 1,
    runner: Runner = "processes",
    ray_address: RayAddress = None,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Let an agent attempt held-out tasks several times: success, score, pass@k, turns, tokens, valid format and action, cost.

    Every figure has its 95 % interval, over families of tasks; score is avg@k. Beside each environment stand the best constant
    action and a blind choice. The same request again finds the figures in the ledger.

    Examples: `forebay evaluate attempts` · `forebay evaluate attempts agent/3 --envs calculator,textarena/Sokoban --samples 8` ·
    `forebay evaluate attempts --json`
    """
    from flows.examination import Terms, examine
    from flows.show import baselines
    from tasks.arena.environment import named

    watch(as_json)
    context = open_context(workspace, overrides)
    asked = list(context.settings.evaluation.tasks) if envs is None else named(envs)
    terms = Terms(tuple(asked), tasks, samples, temperature, seed)
    found = examine(context, agent, terms, workers, runner, ray_address)
    if as_json:
        print_json(found)
        return
    for one in found["slices"]:
        out.print(
            Text.assemble(
                (one["env"], "bold"),
                f": {one['tasks']} held-out tasks, {one['samples']} attempts each; {one['cpu_seconds']:.2f} CPU s an "
                f"episode; {baselines(one)}",
            )
        )
        table = Table("", "estimate", "95 %", box=None, pad_edge=False)
        for name, figure in one["figures"].items():
            table.add_row(name, f"{figure['estimate']:.3f}", f"{figure['low']:.3f} to {figure['high']:.3f}")
        out.print(table)
    out.print(found["evidence"]["path"], soft_wrap=True, highlight=False)


@evaluate_app.command("dtr")
def evaluate_dtr(
    agent: Annotated[str, typer.Argument(help="champion, candidate, or agent/N.")] = "champion",
    on: Annotated[
        str, typer.Option("--on", help="Environment whose held-out tasks are answered.")
    ] = "calculator",
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 40,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each.")] = 8,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Measure the deep-thinking ratio of an agent's answers: does it tell right ones from wrong ones?

    The ratio is the share of a response's tokens that the model settles on in its last layers (arXiv 2602.13517). Beside it stand
    its baselines, length and self-certainty. collect.deep_thinking says how layers are read: threshold, rho, unit (bits, nats), norm.
    Answers are sampled at collect.temperature; intervals are 95 %, over tasks. Nothing is written, and nothing is decided by it.

    Examples: `forebay evaluate dtr` · `forebay evaluate dtr agent/3 --on reasoning_gym/chain_sum --samples 16 --json`
    """
    from flows.deep_thinking import evaluate_dtr as measure

    watch(as_json)
    found = measure(open_context(workspace, overrides), agent, on, tasks, samples)
    if as_json:
        print_json(found)
        return
    out.print(
        f"{found['agent']} on {found['on']}: {found['answers']} answers to {found['tasks']} tasks, "
        f"threshold {found['threshold']:g} {found['unit']}, rho {found['rho']:g}, norm {found['norm']}",
        highlight=False,
    )
    table = Table("", "mean", "95 % interval", "tasks", box=None, pad_edge=False)
    for name, label in _DTR_ROWS.items():
        table.add_row(label, *_interval(found[name]))
    out.print(table, highlight=False)


@evaluate_app.command("think")
def evaluate_think(
    agent: Annotated[str, typer.Argument(help="champion, candidate, or agent/N.")] = "champion",
    on: Annotated[
        str, typer.Option("--on", help="Environment of one turn whose held-out tasks are answered.")
    ] = "reasoning_gym/chain_sum",
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 40,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each.")] = 16,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens of an answer that are looked at.")] = 50,
    eta: Annotated[float, typer.Option(help="Share of the answers that is finished.")] = 0.5,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Compare ways to make one answer of several: Think@n, which finishes those with a promising beginning, and its rivals.

    Think@n (arXiv 2602.13517) goes by the deep-thinking ratio of the first tokens, Self-Certainty@n by how sure they are;
    Cons@n lets all vote. What counts is the last column: the gain over as many tokens of votes drawn at random. Intervals
    are 95 %, over tasks. Nothing is written, and nothing is decided by it.

    Examples: `forebay evaluate think` · `forebay evaluate think agent/3 --on reasoning_gym/gcd --samples 32 --prefix 100 --json`
    """
    from flows.think import evaluate_think as compare

    watch(as_json)
    context = open_context(workspace, overrides)
    found = compare(context, agent, on, tasks=tasks, samples=samples, prefix=prefix, eta=eta)
    if as_json:
        print_json(found)
        return
    out.print(
        f"{found['agent']} on {found['on']}: {found['samples']} answers to each of {found['tasks']} tasks; "
        f"{found['shorter']:.0%} of them are no longer than the prefix of {found['prefix']} tokens",
        highlight=False,
    )
    table = Table("", "accuracy", "tokens", "less Cons@n", "less random votes", box=None, pad_edge=False)
    for row in found["methods"]:
        apart = (_short(row[name], "+") for name in ("less_cons", "less_random"))
        table.add_row(row["method"].split(",")[0], _short(row["accuracy"]), f"{row['tokens']:.0f}", *apart)
    out.print(table, highlight=False)


_DTR_ROWS = {
    "accuracy": "accuracy",
    "ratio": "ratio",
    "right": "ratio of right answers",
    "wrong": "ratio of wrong answers",
    "difference": "right less wrong, same task",
    "auroc": "AUROC of the ratio, same task",
    "length": "length, tokens",
    "auroc_shorter": "AUROC of being shorter, same task",
    "certainty": "self-certainty, nats",
    "auroc_certainty": "AUROC of self-certainty, same task",
}


def _short(found: dict[str, Any] | None, sign: str = "") -> str:
    """An interval where several stand in a line of 80 columns."""
    if found is None:
        return ""
    estimate, low, high = (
        f"{found[name]:{sign}.2f}".replace("0.", ".", 1) for name in ("estimate", "low", "high")
    )
    return f"{estimate} [{low}, {high}]"


def _interval(found: dict[str, Any] | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "0"
    return f"{found['estimate']:.3f}", f"[{found['low']:.3f}, {found['high']:.3f}]", str(found["n"])
