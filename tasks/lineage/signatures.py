"""Signatures behind an agent: who is trusted, by `keys.yaml` and by the ledger; heads, decisions and answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tasks.core.errors import Corrupt, ForebayError, NotFound, UsageError
from tasks.core.heads import HeadProblem, check_heads
from tasks.core.keys import Trust, TrustedKey, read_trust, trust_bytes
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.report import Problem
from tasks.lineage.types import Lineage
from tasks.promotion.attest import Changed, Unsigned, check_answer, check_decision, read_signature
from tasks.promotion.kept_heads import kept_head, kept_names


@dataclass(frozen=True)
class Trusted:
    """Who may sign here.

    Attributes:
        trust: the keys; where `keys.yaml` differs from the ledger's record of a key, as the ledger has it, so that
            what the key signed is not blamed for it. None where there are none, or none that can be read.
        adopted: the entry with which the workspace adopted keys, None where it never did.
        problems: with `keys.yaml`.
    """

    trust: Trust | None
    adopted: int | None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def find_trust(ledger: Ledger, workspace: Workspace) -> Trusted:
    """Read the trusted keys and compare them with what the ledger recorded of each."""
    recorded = ledger.entries("key.trusted")
    adopted = recorded[0].seq if recorded else None
    path, name = workspace.trust, workspace.trust.name
    if not path.exists():
        lost = adopted is not None or any(workspace.heads.glob("*.json"))
        problem = Problem("missing", name, "the trusted keys", "", None)
        return Trusted(None, adopted, (problem,) if lost else ())
    try:
        trust = read_trust(path)
    except (UsageError, UnicodeDecodeError) as error:
        return Trusted(None, adopted, (Problem("unreadable", name, "the trusted keys", "", str(error)),))
    removed = {entry.payload["id"]: entry for entry in ledger.entries("key.removed")}
    problems, mended = [], {key.id: key for key in trust.keys}
    for entry in recorded:
        p = entry.payload
        key, gone = trust.find(p["id"]), removed.get(p["id"])
        odd = _differs(key, entry, gone)
        if odd is None:
            continue
        owner = f"the key `{p['name']}` (ledger entry {entry.seq}): {odd}"
        problems.append(Problem("wrong key", name, owner, p["id"], key.id if key else None))
        if "public" in p:
            was = (
                key.removed
                if key and gone is None
                else gone.payload.get("removed", gone.seq - 1)
                if gone
                else None
            )
            mended[p["id"]] = TrustedKey(name=p["name"], role=p["role"], public=p["public"], removed=was)
    notes: tuple[str, ...] = ()
    if not problems and path.read_bytes() != trust_bytes(trust):
        notes = (
            f"{name} is not written as `forebay keys` writes it; the keys in it are those of the ledger.",
        )
    return Trusted(Trust(tuple(mended.values())), adopted, tuple(problems), notes)


def _differs(key: TrustedKey | None, entry: Entry, gone: Entry | None) -> str | None:
    """Say how a key of `keys.yaml` differs from what the ledger has of it; None where it does not."""
    p = entry.payload
    if key is None:
        return "it is not there, or another key has its place"
    if key.name != p["name"] or key.role != p.get("role", key.role):
        return f"it stands there as `{key.name}`, {key.role}"
    if gone is None:
        return None  # a person may take a key out by hand, in git
    at = gone.payload.get("removed")
    if key.removed is None:
        return f"ledger entry {gone.seq} removed it, and it stands there as one that counts"
    if key.removed >= gone.seq or (at is not None and key.removed != at):
        return f"ledger entry {gone.seq} removed it after another entry than {key.removed}"
    return None


def verify_heads(
    ledger: Ledger, workspace: Workspace, trust: Trust
) -> tuple[int, list[HeadProblem], list[Problem]]:
    """Return how many signed heads there are, what the ledger contradicts, and the problems to report."""
    signed, found = check_heads(ledger, workspace.heads, trust, kept_head(workspace))
    folder = workspace.relative(workspace.heads)
    problems = [_head_problem(problem, folder) for problem in found]
    named = {problem.path for problem in problems}
    if not signed:
        problems.append(Problem("missing", folder, "signed heads", "", None))
        return signed, found, problems
    here = {path.name for path in workspace.heads.glob("*.json")}
    for name in sorted(kept_names(workspace) - here):
        if f"{folder}/{name}" not in named:
            owner = (
                f"The signed head {name} of the ledger was deleted; git's branch forebay/heads has kept it"
            )
            problems.append(Problem("missing", f"{folder}/{name}", owner, "", None))
    return signed, found, problems


def _head_problem(problem: HeadProblem, folder: str) -> Problem:
    """The fault is the head's file's where that is not validly signed, else the ledger's, which contradicts it."""
    deleted = problem.problem == "missing" and not problem.name and "was deleted" in problem.says
    own = problem.name and problem.problem in ("forged", "wrong key")
    path = f"{folder}/{problem.name or f'{problem.seq:08d}.json'}" if own or deleted else "ledger"
    return Problem(problem.problem, path, problem.says, problem.expected, problem.found)


def verify_signatures(
    ledger: Ledger, workspace: Workspace, found: Lineage, trusted: Trusted
) -> tuple[int, list[Problem], list[str]]:
    """Check the signatures of the decisions in `found` and of the answers to them.

    Returns:
        How many hold, the problems, and what is unsigned since it is from before the workspace had keys.
    """
    good, problems, unsigned = 0, [], []
    for entry in sorted(_behind(ledger, found), key=lambda e: e.seq):
        owner = f"{entry.kind.replace('.', ' ')} of {entry.subject} (ledger entry {entry.seq})"
        path = entry.payload["record"]["path"] if entry.kind == "decision.made" else "ledger"
        early = trusted.adopted is None or entry.seq < trusted.adopted
        if early and ("signature" not in entry.payload or trusted.trust is None):
            unsigned.append(owner)
        elif trusted.trust is None:
            continue  # named already: without keys.yaml nothing can be told
        elif (problem := _check(workspace, entry, trusted.trust, path, owner)) is not None:
            problems.append(problem)
        else:
            good += 1
    return good, problems, unsigned


def _behind(ledger: Ledger, found: Lineage) -> Iterable[Entry]:
    wanted = {key for kind, key in found.nodes if kind == "decision"}
    entries = {e.payload["decision"]: e for e in ledger.entries("decision.made")}  # the newest of each
    answers = [*ledger.entries("approval.granted"), *ledger.entries("approval.rejected")]
    return [
        *(entries[key] for key in sorted(wanted & entries.keys())),
        *(entry for entry in answers if entry.payload["decision"] in wanted),
    ]


def _check(workspace: Workspace, entry: Entry, trust: Trust, path: str, owner: str) -> Problem | None:
    try:
        if entry.kind == "decision.made":
            envelope = read_signature(workspace.root, entry)
            check_decision(entry, envelope, trust, at=entry.seq)
        else:
            check_answer(entry, trust, at=entry.seq)
    except (NotFound, Changed, OSError):
        return None  # hashing the file has named it
    except Unsigned:
        return Problem("unsigned", path, owner, "", None)
    except Corrupt as error:
        return Problem("forged", path, f"{owner}: {error}", "", None)
    except ForebayError as error:
        return Problem("wrong key", path, f"{owner}: {error}", "", None)
    return None
