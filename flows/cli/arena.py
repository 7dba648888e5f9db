"""The leaderboard."""

from __future__ import annotations

from collections.abc import Mapping
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
    arena_app,
    open_context,
    out,
    print_json,
    watch,
)
from tasks.core.errors import Refused
from tasks.leaderboard.settings import Method

METHODS = "grpo,gspo,sapo,cispo,vespo,sampo"
ENVS = "minigrid/BabyAI-GoToLocalS5N2,minigrid/Empty-Random-6x6,textarena/FrozenLake"


@arena_app.command("run")
def arena_run(
    methods: Annotated[str, typer.Option(help="Methods, joined by commas.")] = METHODS,
    envs: Annotated[
        str, typer.Option(help="Environments, joined by commas; sokoban, tools or textarena will do.")
    ] = ENVS,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every cell, from 0 on.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Cells at once.")] = 1,
    runner: Runner = "processes",
    ray_address: RayAddress = None,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train every method on every environment with every seed, from one start, and rank them.

    All methods of a seed begin with the same policy, cloned from filtered episodes, and share one recipe (`arena.recipe`).
    Interrupted, the same command goes on with the cells that are left; asked again, it finds the answer. The table comes
    with a page and with a run in MLflow for every cell. A cell that fails is shown with its reason and costs only itself; the
    exit code is 5 then, and the same command tries it again.

    Examples: `forebay arena run` · `forebay arena run --methods grpo,sampo --envs textarena/Sokoban --seeds 5 --workers 2` ·
    `forebay arena run --set arena.recipe.steps=100 --json`
    """
    from flows.leaderboard import Question, run_arena
    from tasks.arena.environment import named

    watch(as_json)
    question = Question(tuple(named(envs)), _names(methods), seeds)
    board = run_arena(open_context(workspace, overrides), question, workers, runner, ray_address)
    _show(board, as_json)
    if board["failures"]:
        raise typer.Exit(Refused.exit_code)


@arena_app.command("show")
def arena_show(workspace: Where = HERE, as_json: Json = False) -> None:
    """Print the newest comparison again.

    Examples: `forebay arena show` · `forebay arena show --json`
    """
    from flows.leaderboard import last_board

    _show(last_board(open_context(workspace)), as_json)


@arena_app.command("methods")
def arena_methods(workspace: Where = HERE, overrides: Set = None, as_json: Json = False) -> None:
    """List the methods, each a point in four dimensions; your own stand in `arena.methods` of params.yaml.

    Examples: `forebay arena methods` · `forebay arena methods --set arena.methods.mine.advantage=gigpo`
    """
    known = open_context(workspace, overrides).settings.arena.known()
    if as_json:
        print_json({name: method.model_dump(mode="json") for name, method in known.items()})
        return
    out.print(_placed(known))


def _placed(methods: Mapping[str, Method]) -> Table:
    """Where the methods stand in the four dimensions."""
    from tasks.leaderboard.methods import coordinates

    table = Table("method", "aggregation", "clipping", "filtering", "advantage", box=None, pad_edge=False)
    for name, method in methods.items():
        table.add_row(name, *coordinates(method).values())
    return table


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _show(board: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(board)
        return
    from tasks.arena.floors import beside
    from tasks.leaderboard.page import firmness
    from tasks.leaderboard.ranking import Rank

    order = Table("method", "mean rank", "95 %", "best in", "success", box=None, pad_edge=False)
    for one in board["ranks"]:
        rank = Rank(**one)
        order.add_row(rank.method, f"{rank.rank:.2f}", *firmness(rank), f"{rank.success:.3f}")
    for method in board["unranked"]:
        order.add_row(method, "not ranked")
    out.print(order)
    if board["methods"]:
        out.print()
        out.print(_placed({name: Method(**one) for name, one in board["methods"].items()}))
    for env, floor in board["floors"].items():
        out.print(
            Text.assemble(
                "\n",
                (env, "bold"),
                f": {floor['tasks']} held-out tasks; start {_mean(board['starts'][env])}, {beside(floor['constant'], floor['random'], floor.get('error', ''))}",
            ),
            soft_wrap=True,
        )
        lines = [line for line in board["lines"] if line["env"] == env]
        widest = next(name for name in lines[0]["figures"] if name.startswith("pass@"))
        table = Table(
            "method",
            "seeds",
            "success",
            "gain",
            widest,
            "turns",
            "valid",
            box=None,
            pad_edge=False,
        )
        for line in lines:
            figures = line["figures"]
            table.add_row(
                line["method"],
                str(line["seeds"]),
                _mean(figures["success"]),
                _mean(line["gain"], "+"),
                *(_mean(figures[name]) for name in (widest, "turns", "valid_action")),
            )
        out.print(table)
    if board["lines"]:
        _tell(board["troubles"], board["contrasts"])
    for one in board["failures"]:
        out.print(
            Text.assemble(
                ("failed: ", "bold red"), f"{one['method']} {one['env']} seed {one['seed']}: {one['error']}"
            ),
            soft_wrap=True,
        )
    seeds = board["question"]["seeds"]
    out.print(
        f"\n± half of a 95 % interval over {seeds} seeds; {board['cpu_seconds'] / 60:.1f} CPU minutes on {board['machine']}",
        highlight=False,
    )
    out.print(board["page"], soft_wrap=True, highlight=False)


def _tell(troubles: list[dict[str, Any]], contrasts: list[dict[str, Any]]) -> None:
    """Say which runs collapsed or were stopped, what to look at, what that means, and which dimension made the difference."""
    from tasks.leaderboard.causes import Trouble, meanings, verdict

    found = [Trouble(**one) for one in troubles]
    out.print(f"\n{verdict(found)}", highlight=False)
    for one in found:
        name = f"{one.method} {one.env} seed {one.seed}"
        out.print(
            Text.assemble((f"{name}: ", "bold red"), f"{one.course()}; `{one.command}`"), soft_wrap=True
        )
    for meaning in meanings(found):
        out.print(meaning, soft_wrap=True, highlight=False)
    for pair in contrasts:
        (worse, better), runs = pair["wrong"], pair["runs"]
        out.print(
            f"{pair['dimension']} alone tells {pair['worse']} ({worse} of {runs} runs went wrong) from {pair['better']} ({better})",
            soft_wrap=True,
            highlight=False,
        )


def _mean(value: dict[str, Any], sign: str = "") -> str:
    half = "" if value["half"] is None else f"±{value['half']:.2f}"
    return f"{value['estimate']:{sign}.3f}{half}"
