"""Make signing keys, list them, take in other people's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import HERE, Json, Where, keys_app, open_context, out, print_json


@keys_app.command()
def init(
    name: Annotated[
        str | None, typer.Option(help="Name of the key; default: `service`, or your user name.")
    ] = None,
    approver: Annotated[
        bool, typer.Option("--approver", help="A key of your own, to approve and reject with.")
    ] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Make a key and trust it in this workspace; nothing is overwritten, nothing leaves the machine.

    The service's private key lies in .forebay/keys, your own in ~/.config/forebay/keys (or $FOREBAY_KEYS).

    Examples: `forebay keys init` · `forebay keys init --approver --name kim`
    """
    from flows.keys import init_keys

    result = init_keys(open_context(workspace), name, approver)
    if as_json:
        print_json(result)
        return
    what = "made" if result["made"] else "there already"
    known = "trusted now" if result["trusted"] else "trusted already"
    out.print(f"{result['name']} ({result['role']}) {result['id'][:12]}: {what}, {known}.", highlight=False)
    out.print(
        f"The private key is {result['private']}; keep keys.yaml in git.", highlight=False, soft_wrap=True
    )


@keys_app.command("list")
def list_(workspace: Where = HERE, as_json: Json = False) -> None:
    """List the keys this workspace trusts or trusted once."""
    from flows.keys import list_keys
    from flows.show import keys_table

    found = list_keys(open_context(workspace))
    if as_json:
        print_json(found)
    else:
        out.print(keys_table(found))


@keys_app.command()
def trust(
    file: Annotated[Path, typer.Argument(help="Somebody's public key: the file NAME.pub beside their key.")],
    name: Annotated[str | None, typer.Option(help="Name to know it by; default: that of the file.")] = None,
    service: Annotated[
        bool, typer.Option("--service", help="It is the service of another machine, not a person.")
    ] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Take in somebody's public key, as an approver unless it is another machine's service."""
    from flows.keys import trust_key

    result = trust_key(open_context(workspace), file, name, "service" if service else "approver")
    if as_json:
        print_json(result)
    else:
        known = "is trusted now" if result["trusted"] else "was trusted already"
        out.print(f"{result['name']} ({result['role']}) {result['id'][:12]} {known}.", highlight=False)


@keys_app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name from `forebay keys list`.")],
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Trust a key no longer. What it signed stays in the history; its approvals act no more."""
    from flows.keys import remove_key

    result = remove_key(open_context(workspace), name)
    if as_json:
        print_json(result)
    else:
        out.print(f"{name} counts no more after ledger entry {result['removed']}.", highlight=False)
