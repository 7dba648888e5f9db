"""Recipes: all that is needed to train an agent again, in git beside the data pointers, where a clone finds it.

The ledger stays where it is; a recipe repeats of it what one agent came from. It cannot say more than it proves: the
key of a run is the digest of its inputs, an agent's digest that of its files, a dataset's root that of its shards.
So whoever trusts the digest of an agent can trust what follows from it, and the service's signature says whose it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tasks.core.digest import canonical_json, digest_files, digest_json, sha256_bytes, write_atomic
from tasks.core.dsse import open_envelope
from tasks.core.errors import Corrupt, ForebayError, NotFound
from tasks.core.keys import Trust
from tasks.core.workspace import Workspace
from tasks.promotion.promote import Entries
from tasks.replay import git_pointer

SCHEMA = "forebay.recipe/1"
_FOLDER = "data/recipes"
_REVOKED = f"{_FOLDER}/revoked.json"
_BRANCHES = (git_pointer.BRANCH, "refs/remotes/origin/forebay/data")
# What a run's start says beside the inputs that its key stands for.
_CIRCUMSTANCES = ("key", "commit", "device", "threads", "processes", "machine", "prefect")


def recipe_of(ledger: Entries, workspace: Workspace, subject: str) -> dict[str, Any]:
    """Return the recipe of a registered agent ("agent/3").

    Raises:
        NotFound: it is not registered, or the ledger lacks the run or the dataset it came from.
    """
    registered = ledger.last("agent.registered", subject)
    if registered is None:
        raise NotFound(f"There is no {subject}; `forebay status` lists what there is.")
    p = registered.payload
    agent = {
        name: p[name]
        for name in (
            "version",
            "digest",
            "files",
            "origin",
            "parents",
            "source",
            "tokenizer_digest",
            "template_digest",
        )
    }
    recipe: dict[str, Any] = {
        "schema": SCHEMA,
        "agent": agent,
        "run": None,
        "result": None,
        "dataset": None,
        "left_out": [],
    }
    key = p["parents"].get("run")
    if key is None:
        return recipe
    started, finished = ledger.last("run.started", key), ledger.last("run.finished", key)
    sealed = next(
        (
            e
            for e in reversed(ledger.entries("dataset.sealed"))
            if started and e.payload["root"] == started.payload["dataset"]
        ),
        None,
    )
    if started is None or finished is None or sealed is None:
        raise NotFound(
            f"The ledger lacks the run or the dataset that {subject} came from; run `forebay verify`."
        )
    outputs = finished.payload["outputs"]
    names = ("name", "version", "root", "shards", "git_commit", "manifest", "manifest_sha256")
    dataset = {name: sealed.payload[name] for name in names}
    left_out = started.payload.get("left_out")
    return {
        **recipe,
        "run": {**started.payload, "started": started.time},
        "result": {name: outputs[name] for name in ("digest", "files", "steps", "stop_reason", "metrics")},
        "dataset": {**dataset, "remote": sealed.payload["dvc"]["remote"]},
        "left_out": (workspace.root / left_out["path"]).read_text().split() if left_out else [],
    }


def keep_recipes(
    ledger: Entries, workspace: Workspace, sign: Callable[[Mapping[str, Any], str], bytes] | None
) -> list[str]:
    """Commit the recipes that the data branch lacks; return the agents they are of.

    Args:
        sign: gives the envelope that says whose a recipe is, from the recipe and the SHA-256 of its bytes; None: there is
            no key.

    Raises:
        Refused, Conflict, Unavailable: git could not; the next call makes up for it.
    """
    known = set(git_pointer.names(workspace.root, git_pointer.BRANCH))
    files, made, date = [], [], ""
    for entry in ledger.entries("agent.registered"):
        name = _name(entry.subject)
        if name in known:
            continue
        try:
            recipe = recipe_of(ledger, workspace, entry.subject)
        except NotFound:
            continue  # an agent that was registered by hand
        data = canonical_json(recipe) + b"\n"
        write_atomic(workspace.root / name, data)
        files.append(workspace.root / name)
        if sign is not None:
            write_atomic(workspace.root / _signature(name), sign(recipe, sha256_bytes(data)))
            files.append(workspace.root / _signature(name))
        made.append(entry.subject)
        date = entry.time
    if files:
        git_pointer.commit(workspace.root, files, f"Recipe of {', '.join(made)}", date)
    return made


def keep_revocations(workspace: Workspace, content: Mapping[str, Any], date: str) -> None:
    """Commit what is revoked, who is flagged and what was erased, so that a clone knows it too."""
    write_atomic(workspace.root / _REVOKED, canonical_json(dict(content)) + b"\n")
    git_pointer.commit(workspace.root, [workspace.root / _REVOKED], "Revocations", date)


def read_revocations(root: Path) -> dict[str, Any]:
    """Return what `keep_revocations` wrote, as the repository at `root` has it; empty where nothing was revoked."""
    branch = _branch(root)
    if branch is None or _REVOKED not in git_pointer.names(root, branch):
        return {}
    return dict(json.loads(git_pointer.read(root, branch, _REVOKED)))


def read_recipe(root: Path, subject: str, trust: Trust | None = None) -> dict[str, Any]:
    """Return the recipe of an agent from the repository at `root`, checked against itself.

    Args:
        root: a workspace, or a plain clone of one.
        trust: the keys that may sign; None: signatures are not looked at.

    Returns:
        The recipe, with `signed_by`: the name of the key, "" where nobody signed or no keys are known.

    Raises:
        NotFound: the repository has no recipes, or none of this agent; those that it has are named.
        Corrupt: it does not follow from its own digests, or its signature is forged.
        Refused: an unknown or removed key signed it.
    """
    branch = _branch(root)
    if branch is None:
        raise NotFound(
            f"{root} has no branch forebay/data: it is neither a workspace nor a clone of one with all its branches."
        )
    names, name = git_pointer.names(root, branch), _name(subject)
    if name not in names:
        known = [
            _subject(n) for n in names if n.startswith(f"{_FOLDER}/agent-") and not n.endswith(".dsse.json")
        ]
        raise NotFound(f"There is no recipe of {subject}; there are: {', '.join(known) or 'none'}.")
    text = git_pointer.read(root, branch, name)
    recipe = json.loads(text)
    problem = _problem(recipe, subject)
    if problem:
        raise Corrupt(f"The recipe of {subject} in {branch} contradicts itself: {problem}.")
    signer = ""
    if trust is not None and _signature(name) in names:
        envelope = git_pointer.read(root, branch, _signature(name))
        said = open_envelope(envelope, ("recipe",), trust, "service")
        if said.subjects.get("recipe") != sha256_bytes(text):
            raise Corrupt(f"The signature beside the recipe of {subject} is of another one.")
        signer = said.key.name
    return {**recipe, "signed_by": signer}


def chain_of(root: Path, subject: str, trust: Trust | None = None) -> list[dict[str, Any]]:
    """Return the recipes from the base model to `subject`, in the order in which they were trained.

    Raises:
        NotFound, Corrupt, Refused: as `read_recipe`.
    """
    chain: list[dict[str, Any]] = []
    seen: set[str] = set()
    here: str | None = subject
    while here is not None:
        if here in seen:
            raise Corrupt(f"The recipes say that {here} was trained from itself.")
        seen.add(here)
        recipe = read_recipe(root, here, trust)
        chain.append(recipe)
        here = recipe["run"] and recipe["run"]["init"]["agent"]
    for child, parent in pairwise(chain):
        if child["run"]["init"]["digest"] != parent["agent"]["digest"]:
            raise Corrupt(
                f"agent/{child['agent']['version']} was trained from other weights than those of "
                f"agent/{parent['agent']['version']}."
            )
    return chain[::-1]


def _problem(recipe: Mapping[str, Any], subject: str) -> str:
    """Return where a recipe contradicts itself, empty where it does not."""
    try:
        agent, run, dataset = recipe["agent"], recipe["run"], recipe["dataset"]
        if recipe["schema"] != SCHEMA:
            return f"it is a {recipe['schema']}, and this version of Forebay reads {SCHEMA}"
        if f"agent/{agent['version']}" != subject:
            return f"it is of agent/{agent['version']}"
        if digest_files(agent["files"]) != agent["digest"]:
            return "the agent's digest does not follow from its files"
        if run is None:
            return ""
        inputs = {k: v for k, v in run.items() if k not in (*_CIRCUMSTANCES, "started")}
        if digest_json(inputs) != run["key"] or run["key"] != agent["parents"]["run"]:
            return "the key of the run does not follow from its inputs"
        if recipe["result"]["digest"] != agent["digest"]:
            return "the run gave other files than the agent's"
        from tasks.replay.manifest import Shard, dataset_root

        if (
            not dataset_root([Shard(**shard) for shard in dataset["shards"]])
            == dataset["root"]
            == run["dataset"]
        ):
            return "the dataset's root does not follow from its shards"
        listed = "".join(f"{name}\n" for name in recipe["left_out"]).encode()
        wanted = run.get("left_out", {}).get("sha256", sha256_bytes(b""))
        return "" if sha256_bytes(listed) == wanted else "the groups that were left out are others"
    except (KeyError, TypeError, ForebayError) as error:
        return f"it is not whole ({error})"


def _branch(root: Path) -> str | None:
    return next((branch for branch in _BRANCHES if git_pointer.head(root, branch) is not None), None)


def _name(subject: str) -> str:
    return f"{_FOLDER}/agent-{int(subject.partition('/')[2]):05d}.json"


def _subject(name: str) -> str:
    return f"agent/{int(Path(name).stem.partition('-')[2])}"


def _signature(name: str) -> str:
    return name.removesuffix(".json") + ".dsse.json"
