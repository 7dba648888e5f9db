"""Reward models: import preferences, train or register, look, score a dataset, put in office."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.console import (
    HERE,
    Json,
    Set,
    Where,
    err,
    open_context,
    out,
    print_json,
    reward_app,
    watch,
)
from tasks.core.errors import Refused

Which = Annotated[str, typer.Argument(help="reward/2, or reward@champion, reward@candidate.")]


@reward_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSONL, also .gz: {prompt?, chosen, rejected} or outcomes.")],
    name: Annotated[str | None, typer.Option(help="What to call the set; default: the file's name.")] = None,
    source: Annotated[str | None, typer.Option(help="Where it is from, if the records do not say.")] = None,
    licence: Annotated[
        str, typer.Option(help="Its licence (SPDX), if the records do not say.")
    ] = "NOASSERTION",
    part: Annotated[
        str, typer.Option("--slice", help="Slice to report on, if the records do not say.")
    ] = "comparison",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Bring in preferences that others recorded. Corrupt lines are named, good ones kept (then exit code 5).

    Lines are `{prompt?, chosen, rejected}` as text, chat messages or whole transcripts, or `{question, <author>:
    {solution, is_correct}}`: each right answer is then preferred to each wrong one.

    Examples: `forebay reward import hh.jsonl.gz --licence MIT` ·
    `forebay reward import solutions.jsonl --name gsm8k --source openai/grade-school-math --licence MIT`
    """
    from flows.rewards import import_preferences

    watch(as_json)
    plain = file.name.removesuffix(".gz").removesuffix(".jsonl")
    result = import_preferences(
        open_context(workspace),
        file,
        name=name or plain,
        source=source or file.name,
        licence=licence,
        slice=part,
    )
    if as_json:
        print_json(result)
    else:
        dropped = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in result["dropped"].items() if n)
        out.print(
            f"{result['name']}: {result['pairs']} preferences on {result['groups']} prompts, digest "
            f"{result['digest'][:12]}" + (f"; left out: {dropped}." if dropped else "."),
            highlight=False,
        )
        for error in result["errors"]:
            err.print(f"left out {error}", highlight=False, markup=False)
    if result["errors"]:
        raise typer.Exit(Refused.exit_code)


@reward_app.command()
def train(
    on: Annotated[
        str | None,
        typer.Option(help="An imported set, the start of its digest, or a dataset (main, main/v3)."),
    ] = None,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train a reward model on preferences, or register a verifier or judge, as reward.model of the settings says.

    Examples: `forebay reward train` (a head, on the newest dataset) ·
    `forebay reward train --on hh --set reward.model.kind=classifier` ·
    `forebay reward train --set 'reward.model={kind: verifier, name: "my_package.checks:score"}'` ·
    `forebay reward train --set 'reward.model={kind: judge, url: "http://127.0.0.1:8000/v1", model: qwen3}'`
    """
    from flows.rewards import preference_set, train_reward

    watch(as_json)
    context = open_context(workspace, overrides)
    needs = context.settings.reward.model.kind in ("head", "classifier")
    preferences = preference_set(context, on or context.settings.replay.dataset) if needs else None
    result = train_reward(context, preferences)
    if as_json:
        print_json(result)
    else:
        out.print(
            f"reward/{result['version']}: {result['kind']}, digest {result['digest'][:12]}; "
            f"now `forebay reward validate reward/{result['version']}`.",
            highlight=False,
        )


@reward_app.command("list")
def list_(workspace: Where = HERE, as_json: Json = False) -> None:
    """List the registered reward models with their offices and newest verdicts."""
    from flows.rewards import rewards_table
    from flows.show import rewards_table as drawn

    found = rewards_table(open_context(workspace))
    if as_json:
        print_json(found)
    else:
        out.print(drawn(found))


@reward_app.command()
def show(which: Which, workspace: Where = HERE, as_json: Json = False) -> None:
    """Say what a reward model is, what it was made of, and what its newest validation says.

    Example: `forebay reward show reward@champion`
    """
    from flows.rewards import describe
    from flows.show import reward_view

    found: dict[str, Any] = describe(open_context(workspace), which)
    if as_json:
        print_json(found)
    else:
        out.print(reward_view(found))


@reward_app.command()
def score(
    which: Annotated[str, typer.Option("--with", help="reward/2 or reward@champion.")],
    dataset: Annotated[str, typer.Option("--from", help="A sealed dataset: main, main/v3 or its root.")],
    into: Annotated[str, typer.Option(help="Name of the dataset that gets the episodes.")],
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write a dataset's episodes with the rewards of a registered source into another dataset, to be sealed.

    What is trained on it rests on that source: it needs a validation that passed and has not expired.

    Example: `forebay reward score --with reward/2 --from main --into scored`, then
    `forebay seal --set replay.dataset=scored`
    """
    from flows.scoring import score_dataset

    watch(as_json)
    result = score_dataset(open_context(workspace, overrides), which, dataset, into)
    if as_json:
        print_json(result)
        return
    if not result["groups"]:
        out.print(f"All {result['passed_over']} groups are in {into} already.", highlight=False)
        return
    out.print(
        f"{result['episodes']} episodes in {result['groups']} groups of {result['from']} scored by "
        f"{result['reward']}: mean reward {result['after']:.3f}, was {result['before']:.3f}; now "
        f"`forebay seal --set replay.dataset={into}`.",
        highlight=False,
    )


@reward_app.command()
def decide(which: Which, workspace: Where = HERE, as_json: Json = False) -> None:
    """Weigh a reward model against the one in office, on comparisons neither has seen; the record is signed.

    It passes if its newest validation does, and it is not surely less accurate. Exit code 5 where it does not pass.

    Example: `forebay reward decide reward/2`
    """
    from flows.reward_office import decide_reward

    watch(as_json)
    result = decide_reward(open_context(workspace), which)
    if as_json:
        print_json(result)
    else:
        out.print(f"reward/{result['candidate']['version']}: {result['verdict']}", highlight=False)
        for reason in result["reasons"]:
            out.print(f"· {reason}", highlight=False, markup=False)
    if result["verdict"] != "PASS":
        raise typer.Exit(Refused.exit_code)


@reward_app.command()
def promote(
    which: Which,
    reason: Annotated[str, typer.Option(help="Kept in the ledger.")] = "promoted on the command line",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Put a reward model in office, if its newest decision says PASS against the one in office now.

    Example: `forebay reward promote reward/2`
    """
    from flows.reward_office import promote_reward

    result = promote_reward(open_context(workspace), which, reason)
    if as_json:
        print_json(result)
    else:
        was = "nobody" if result["from"] is None else f"reward/{result['from']}"
        out.print(f"reward/{result['to']} is in office (was {was}).", highlight=False)


@reward_app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger.")] = "rolled back on the command line",
    flagged: Annotated[
        bool, typer.Option("--flagged", help="Also one that learnt from revoked data; the ledger keeps it.")
    ] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Put the previous reward model back in office, with a record.

    Example: `forebay reward rollback --reason "marks long answers too well"`
    """
    from flows.reward_office import rollback_reward

    result = rollback_reward(open_context(workspace), reason, flagged)
    if as_json:
        print_json(result)
    else:
        flag = f" It is flagged: it {result['flag']}." if "flag" in result else ""
        out.print(
            f"reward/{result['to']} is in office again (was reward/{result['from']}).{flag}", highlight=False
        )


@reward_app.command()
def replay(which: Which, workspace: Where = HERE, as_json: Json = False) -> None:
    """Verify the signature of a reward model's newest decision and decide again from the evidence: the same bytes.

    Example: `forebay reward replay reward/2`
    """
    from flows.reward_office import replay_reward_decision

    result = replay_reward_decision(open_context(workspace), which)
    if as_json:
        print_json(result)
    else:
        out.print(
            f"{result['decision'][:12]}: {result['verdict']} again, the same bytes; signed by {result['signed_by']}.",
            highlight=False,
        )


@reward_app.command()
def validate(
    which: Annotated[
        str, typer.Argument(help="reward/2, or reward@champion, reward@candidate.")
    ] = "reward@champion",
    dataset: Annotated[
        str | None,
        typer.Option("--from", help="A sealed dataset: main, main/v3 or its root; default: the newest."),
    ] = None,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Judge a reward model on prompts it has not seen and on the policy's newest answers; exit code 5 on FAIL.

    What rests on it (datasets scored by it, training on them, promotion) needs its newest verdict to be PASS and
    not expired. The rules are `reward_model` in policy.yaml, the checks are described in docs/reward-validation.md.

    Example: `forebay reward validate reward/2 --from main/v3`
    """
    from flows.show import reward_checks
    from flows.validation import validate_reward

    watch(as_json)
    result = validate_reward(open_context(workspace, overrides), which, dataset)
    if as_json:
        print_json(result)
    else:
        out.print(reward_checks(result))
    if result["verdict"] == "FAIL":
        raise typer.Exit(Refused.exit_code)
