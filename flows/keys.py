"""Who may sign: the service's key in the workspace, a person's in their own folder, and the list that trusts both."""

from __future__ import annotations

import base64
import getpass
import os
import re
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.context import Context
from tasks.core.errors import Corrupt, ForebayError, NotFound, Refused, UsageError
from tasks.core.heads import newest_seq, require_newest, write_head
from tasks.core.keys import (
    NAME,
    PrivateKey,
    Role,
    Trust,
    TrustedKey,
    create_key,
    load_key,
    load_public,
    read_trust,
    trusted,
    write_trust,
)
from tasks.core.ledger import Entry
from tasks.core.locks import file_lock
from tasks.promotion.kept_heads import keep_heads, kept_head

SERVICE = "service"
_CHANGES = ("promotion.committed", "rollback.committed", "decision.made")


def people() -> Path:
    """Return the folder of this user's own keys: $FOREBAY_KEYS, else forebay/keys in the configuration folder."""
    chosen = os.environ.get("FOREBAY_KEYS")
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(chosen) if chosen else Path(config) / "forebay" / "keys"


def trust(context: Context) -> Trust:
    """Read the trusted keys.

    Raises:
        Refused: the workspace has no keys yet; the sentence says how to adopt them.
        Corrupt: it had some, and the file is gone.
    """
    path = context.workspace.trust
    if path.exists():
        return read_trust(path)
    if context.ledger.last("key.trusted") is not None:
        raise Corrupt(f"{path} is gone, though the ledger knows trusted keys; restore it from git.")
    raise Refused(
        "This workspace has no signing keys yet; `forebay keys init` makes them, and nothing recorded is lost."
    )


def service_key(context: Context) -> PrivateKey:
    """Return the private key with which this workspace signs.

    Raises:
        Refused: there are no keys yet, none that is trusted has its private part here, or others can read it.
    """
    names = {key.id: key.name for key in trust(context).active("service")}
    for path in sorted(context.workspace.keys.glob("*.key")):
        key = load_key(path)
        if key.id in names:
            return replace(key, name=names[key.id])
    raise Refused(
        f"No trusted service key has its private part in {context.workspace.keys}; "
        "`forebay keys init --name NAME` makes another."
    )


def ready(context: Context) -> Trust:
    """Return the trusted keys after making sure that this workspace can sign and that its ledger is whole.

    Raises:
        Refused, Corrupt: see `trust`, `service_key` and `tasks.core.heads.require_newest`.
    """
    known = trust(context)
    service_key(context)
    require_newest(context.ledger, context.workspace.heads, known, kept_head(context.workspace))
    return known


def approver_key(context: Context, name: str | None = None) -> PrivateKey:
    """Return this user's key to approve with; `name` chooses where there are several.

    Raises:
        NotFound: there is none that this workspace trusts. UsageError: there are several.
    """
    if name is not None:
        folder = context.workspace.keys if (context.workspace.keys / f"{name}.key").exists() else people()
        return load_key(folder / f"{name}.key")
    ids = {key.id for key in trust(context).active("approver")}
    found = [key for key in (load_key(path) for path in sorted(people().glob("*.key"))) if key.id in ids]
    if not found:
        raise NotFound(
            f"You have no approver's key that this workspace trusts (looked in {people()}); make one with "
            "`forebay keys init --approver`."
        )
    if len(found) > 1:
        raise UsageError(f"You have several keys; choose one with --key: {', '.join(k.name for k in found)}.")
    return found[0]


def own_key(name: str | None = None) -> PrivateKey:
    """Return this user's key, whatever workspace trusts it; `name` chooses where there are several.

    Raises:
        NotFound: there is none. UsageError: there are several.
    """
    if name is not None:
        return load_key(people() / f"{name}.key")
    found = [load_key(path) for path in sorted(people().glob("*.key"))]
    if not found:
        raise NotFound(
            f"You have no key (looked in {people()}); `forebay keys init --approver` makes one in a workspace."
        )
    if len(found) > 1:
        raise UsageError(f"You have several keys; choose one with --key: {', '.join(k.name for k in found)}.")
    return found[0]


def init_keys(context: Context, name: str | None = None, approver: bool = False) -> dict[str, Any]:
    """Make a key (or take the one that is there) and trust it in this workspace.

    Raises:
        UsageError: the name is none. Conflict: another trusted key has it.
    """
    role: Role = "approver" if approver else "service"
    name = _named(name or (_user() if approver else SERVICE))
    path = (people() if approver else context.workspace.keys) / f"{name}.key"
    made = not path.exists()
    key = create_key(path) if made else load_key(path)
    added = _trust(context, trusted(key, role))
    return {"name": name, "role": role, "id": key.id, "private": str(path), "made": made, "trusted": added}


def ensure_service_key(context: Context) -> None:
    """Give a workspace that never had keys its service key; a workspace that has some is left as it is."""
    if context.ledger.last("key.trusted") is not None:
        return
    known = read_trust(context.workspace.trust) if context.workspace.trust.exists() else Trust()
    for path in sorted(context.workspace.keys.glob("*.key")):  # made before a crash
        key = known.find(load_key(path).id)
        if key is not None and key.role == "service":
            init_keys(context, path.stem)
            return
    name, number = SERVICE, 1
    while known.named(name) is not None:  # keys.yaml came with a clone; the private key stayed where it was
        number += 1
        name = f"{SERVICE}-{number}"
    init_keys(context, name)


def trust_key(
    context: Context, file: Path, name: str | None = None, role: Role = "approver"
) -> dict[str, Any]:
    """Trust somebody's public key.

    Raises:
        NotFound, UsageError: the file is no public key. Conflict: the name or the key is taken.
    """
    raw = load_public(file)
    public = base64.b64encode(raw).decode()
    key = TrustedKey(name=_named(name or file.stem.lower()), role=role, public=public, removed=None)
    return {"name": key.name, "role": role, "id": key.id, "trusted": _trust(context, key)}


def remove_key(context: Context, name: str) -> dict[str, Any]:
    """Trust a key no longer; what it signed so far stands in the history, and acts no more."""
    with _changing(context):
        last = context.ledger.last()
        at = 0 if last is None else last.seq
        now = trust(context).remove(name, at)
        key = now.named(name)
        assert key is not None  # remove() has just found it
        write_trust(context.workspace.trust, now)
        payload = {"name": name, "id": key.id, "role": key.role, "removed": at}
        context.ledger.append("key.removed", f"key/{name}", payload)
    return {"name": name, "role": key.role, "id": key.id, "removed": at}


def list_keys(context: Context) -> list[dict[str, Any]]:
    """Return the trusted keys, and whether the private part is here."""
    here = {}
    for path in [*context.workspace.keys.glob("*.key"), *people().glob("*.key")]:
        here[load_key(path).id] = str(path)
    return [
        {"name": k.name, "role": k.role, "id": k.id, "removed": k.removed, "private": here.get(k.id)}
        for k in trust(context).keys
    ]


def sign_head(context: Context, entry: Entry) -> None:
    """Sign the ledger up to `entry`, and say of a change of champion which files it put in office."""
    subjects = {}
    if entry.kind.endswith(".committed"):
        registered = context.registration(entry.subject)
        assert registered is not None  # nothing is put in office that is not registered
        subjects = {entry.subject: registered["digest"]}
    folder, kept = context.workspace.heads, kept_head(context.workspace)
    write_head(context.ledger, folder, entry, service_key(context), trust(context), subjects, kept)
    with suppress(ForebayError):  # a branch that is checked out, say: the next head brings this one along
        keep_heads(context.workspace, entry.time)


def catch_up(context: Context) -> None:
    """Sign the newest decision or change of champion whose writer died before it could."""
    if not context.workspace.trust.exists():
        return
    entries = [entry for kind in _CHANGES if (entry := context.ledger.last(kind)) is not None]
    newest = max(entries, key=lambda entry: entry.seq, default=None)
    if newest is not None and newest.seq > newest_seq(context.workspace.heads):
        sign_head(context, newest)


def _trust(context: Context, key: TrustedKey) -> bool:
    """Add a key to the trusted ones and to the ledger; tell whether it was new."""
    with _changing(context):
        return _trust_alone(context, key)


def _trust_alone(context: Context, key: TrustedKey) -> bool:
    path = context.workspace.trust
    known = read_trust(path) if path.exists() else Trust()
    if not path.exists() and context.ledger.last("key.trusted") is not None:
        trust(context)  # which refuses: a lost file must not be replaced by one with a single key
    wanted = known.add(key)
    new = wanted is not known
    payload = {"name": key.name, "role": key.role, "id": key.id, "public": key.public}
    recorded = any(e.payload["id"] == key.id for e in context.ledger.entries("key.trusted"))
    if new:
        write_trust(path, wanted)
    entry = None if recorded else context.ledger.append("key.trusted", f"key/{key.name}", payload)
    if entry is not None and wanted.active("service"):
        try:
            sign_head(context, entry)
        except Refused:  # the private part is on another machine, which signs with its next decision
            if key.role == "service":
                raise
    return new


def _changing(context: Context) -> AbstractContextManager[None]:
    return file_lock(context.workspace.locks / "keys.lock", what="keys.yaml")


def _named(name: str) -> str:
    if re.fullmatch(NAME, name) is None:
        raise UsageError(f"`{name}` is no name for a key; use small letters, digits, dots and dashes.")
    return name


def _user() -> str:
    try:
        return re.sub(r"[^a-z0-9._-]+", "-", getpass.getuser().lower()).strip("-._") or "approver"
    except (KeyError, OSError):  # no such user in a container
        return "approver"
