"""Recipes: all that is needed to train an agent again, in git beside the data pointers, where a clone finds it.

The ledger stays where it is; a recipe repeats of it what one agent came from. It cannot say more than it proves: the
key of a run is the digest of its inputs, an agent's digest that of its files, a dataset's root that of its shards.
Number, commit, device and metrics follow from no digest: the service's signature covers every byte of a recipe, and
where there is a ledger, that is what a recipe must say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_files, digest_json, sha256_bytes
from tasks.core.dsse import open_envelope
from tasks.core.errors import Corrupt, ForebayError, NotFound, Refused
from tasks.core.keys import Trust
from tasks.core.workspace import Workspace
from tasks.promotion.promote import Entries
from tasks.replay import git_pointer

SCHEMA = "forebay.recipe/1"
_FOLDER = "data/recipes"
_RECIPE = re.compile(rf"{_FOLDER}/agent-(\d+)\.json")
_AGENT = re.compile(r"agent/[1-9]\d{0,9}")
_REVOKED = f"{_FOLDER}/revoked.json"
_BRANCHES = (git_pointer.BRANCH, "refs/remotes/origin/forebay/data")
# What a run's start says beside the inputs that its key stands for.
_CIRCUMSTANCES = ("key", "commit", "device", "threads", "processes", "machine", "prefect")
_OF_AGENT = (
    "version",
    "digest",
    "files",
    "origin",
    "parents",
    "source",
    "tokenizer_digest",
    "template_digest",
)
_OF_RESULT = ("digest", "files", "steps", "stop_reason", "metrics")
_WORDS = ("name", "git_commit", "manifest", "manifest_sha256")
_OF_DATASET = ("name", "version", "root", "shards", "git_commit", "manifest", "manifest_sha256")


def recipe_of(ledger: Entries, workspace: Workspace, subject: str) -> dict[str, Any]:
    """Return the recipe of a registered agent ("agent/3").

    Raises:
        NotFound: it is not registered, the ledger lacks the run or the dataset it came from, or the list of the groups that
            it left out is gone.
    """
    recipe, datasets = _recorded(ledger, subject)
    run = recipe["run"]
    if run is None:
        return {**recipe, "dataset": None, "left_out": []}
    left_out = run.get("left_out")
    try:
        groups = (workspace.root / left_out["path"]).read_text().split() if left_out else []
    except FileNotFoundError:
        raise NotFound(
            f"{left_out['path']} is gone, which says what {subject} did not learn from; restore it from a backup."
        ) from None
    return {**recipe, "dataset": datasets[-1], "left_out": groups}


def _recorded(ledger: Entries, subject: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return {schema, agent, run, result} of a registered agent, and the versions that have its dataset's rows."""
    registered = ledger.last("agent.registered", subject)
    if registered is None:
        raise NotFound(f"There is no {subject}; `forebay status` lists what there is.")
    p = registered.payload
    recipe = {"schema": SCHEMA, "agent": {name: p[name] for name in _OF_AGENT}, "run": None, "result": None}
    key = p["parents"].get("run")
    if key is None:
        return recipe, []
    started, finished = ledger.last("run.started", key), ledger.last("run.finished", key)
    root = started.payload["dataset"] if started else None
    sealed = [e.payload for e in ledger.entries("dataset.sealed") if e.payload["root"] == root]
    if started is None or finished is None or not sealed:
        raise NotFound(
            f"The ledger lacks the run or the dataset that {subject} came from; run `forebay verify`."
        )
    outputs = finished.payload["outputs"]
    made = {
        **recipe,
        "run": {**started.payload, "started": started.time},
        "result": {name: outputs[name] for name in _OF_RESULT},
    }
    return made, [{**{n: s[n] for n in _OF_DATASET}, "remote": s["dvc"]["remote"]} for s in sealed]


def keep_recipes(
    ledger: Entries, workspace: Workspace, sign: Callable[[Mapping[str, Any], str], bytes] | None
) -> list[str]:
    """Commit the recipes and signatures that the data branch lacks; return the agents they are of.

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
        if name in known and (sign is None or _signature(name) in known):
            continue
        try:
            recipe = recipe_of(ledger, workspace, entry.subject)
        except NotFound:
            continue  # an agent that was registered by hand
        data = canonical_json(recipe) + b"\n"
        if name in known and git_pointer.read(workspace.root, git_pointer.BRANCH, name) != data:
            continue  # not what the ledger says, so not to be signed; `reproduce` refuses it
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
    """Return what `keep_revocations` wrote, as the repository at `root` has it; empty where nothing was revoked.

    Raises:
        Corrupt: it is something else.
    """
    branch = _branch(root)
    if branch is None or _REVOKED not in git_pointer.names(root, branch):
        return {}
    try:
        return dict(json.loads(git_pointer.read(root, branch, _REVOKED)))
    except (ValueError, TypeError, RecursionError):
        raise Corrupt(f"{_REVOKED} in {branch} is not what Forebay writes.") from None


def read_recipe(
    root: Path, subject: str, trust: Trust | None = None, unsigned: bool = False
) -> dict[str, Any]:
    """Return the recipe of an agent from the repository at `root`, checked against itself.

    Args:
        root: a workspace, or a plain clone of one.
        trust: the keys that may sign; where no service's is among them, signatures are not looked at.
        unsigned: take a recipe too that nobody signed, or a key that is not trusted.

    Returns:
        The recipe, with `signed_by`: the name of the key, "" where no trusted one signed.

    Raises:
        NotFound: the repository has no recipes, or none of this agent; those that it has are named.
        Corrupt: it does not follow from its own digests, or its signature is forged.
        Refused: nobody signed it, or an unknown or removed key.
    """
    branch = _branch(root)
    if branch is None:
        raise NotFound(
            f"{root} has no branch forebay/data: it is neither a workspace nor a clone of one with all its branches."
        )
    names, name = git_pointer.names(root, branch), _name(subject)
    if name not in names:
        known = [f"agent/{int(found[1])}" for n in names if (found := _RECIPE.fullmatch(n))]
        raise NotFound(f"There is no recipe of {subject}; there are: {', '.join(known) or 'none'}.")
    text = git_pointer.read(root, branch, name)
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        raise Corrupt(f"The recipe of {subject} in {branch} is not JSON.") from None
    problem = _problem(recipe, subject)
    if problem:
        raise Corrupt(f"The recipe of {subject} in {branch} contradicts itself: {problem}.")
    signer = ""
    if trust is not None and trust.active("service"):
        try:
            signer = _signer(root, branch, name, text, names, trust)
        except Refused as error:
            if not unsigned:
                raise Refused(
                    f"{error} The recipe of {subject} may be anybody's; --unsigned goes by it all the same."
                ) from None
    return {**recipe, "signed_by": signer}


def _signer(root: Path, branch: str, name: str, text: bytes, names: Collection[str], trust: Trust) -> str:
    """Return the name of the key that signed the bytes of a recipe.

    Raises:
        Refused: none did, or one that may not. Corrupt: the signature is forged, or of other bytes.
    """
    if _signature(name) not in names:
        raise Refused(f"{name} in {branch} is not signed, though keys.yaml trusts a key to sign it.")
    said = open_envelope(git_pointer.read(root, branch, _signature(name)), ("recipe",), trust, "service")
    if said.subjects.get("recipe") != sha256_bytes(text):
        raise Corrupt(f"The signature beside {name} in {branch} is of another one.")
    return said.key.name


def require_recorded(ledger: Entries, recipe: Mapping[str, Any]) -> None:
    """Compare a recipe with the ledger: agent, run, result and dataset must be what was recorded.

    Raises:
        NotFound: the ledger lacks what it is of. Corrupt: it says something else; what, is named.
    """
    subject = f"agent/{recipe['agent']['version']}"
    kept, datasets = _recorded(ledger, subject)
    for part in ("agent", "run", "result"):
        if _plain(kept[part]) != recipe[part]:
            raise Corrupt(f"The recipe of {subject} is not what the ledger says: its {part} is another one.")
    if kept["run"] is not None and recipe["dataset"] not in map(_plain, datasets):
        raise Corrupt(f"The recipe of {subject} is not what the ledger says: its dataset is another one.")


def _plain(value: Any) -> Any:
    """Return a value as it is once it was written and read."""
    return json.loads(canonical_json(value))


def chain_of(
    root: Path, subject: str, trust: Trust | None = None, unsigned: bool = False
) -> list[dict[str, Any]]:
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
        recipe = read_recipe(root, here, trust, unsigned)
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
            return (
                "" if isinstance(agent["source"]["name"], str) else "it does not say what the base model is"
            )
        if not _AGENT.fullmatch(run["init"]["agent"]) or run["device"] not in ("cpu", "cuda"):
            return "what it started from, or the device, is nothing that there is"
        if any(type(value) not in (int, float) for value in recipe["result"]["metrics"].values()):
            return "a metric of the run is no number"
        inputs = {k: v for k, v in run.items() if k not in (*_CIRCUMSTANCES, "started")}
        if digest_json(inputs) != run["key"] or run["key"] != agent["parents"]["run"]:
            return "the key of the run does not follow from its inputs"
        if recipe["result"]["digest"] != agent["digest"]:
            return "the run gave other files than the agent's"
        words = (*(dataset[name] for name in _WORDS), *(shard["path"] for shard in dataset["shards"]))
        known = (dataset["remote"], run["commit"]["commit"])
        if not all(isinstance(word, str) for word in (*words, *(word for word in known if word is not None))):
            return "a name in it is none"
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
    except (KeyError, TypeError, ValueError, AttributeError, ForebayError) as error:
        return f"it is not whole ({error})"


def _branch(root: Path) -> str | None:
    return next((branch for branch in _BRANCHES if git_pointer.head(root, branch) is not None), None)


def _name(subject: str) -> str:
    return f"{_FOLDER}/agent-{int(subject.partition('/')[2]):05d}.json"


def _signature(name: str) -> str:
    return name.removesuffix(".json") + ".dsse.json"
