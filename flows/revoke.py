"""Revoke data: it leaves all later sampling, who learnt from it is flagged, and on request its bytes are erased."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import keys, progress
from flows.context import Context
from tasks.core.digest import sha256_file
from tasks.core.errors import Conflict, ForebayError, NotFound, Refused, UsageError
from tasks.core.ledger import Entry, LedgerView
from tasks.lineage.flagged import Descendant, Step, descendants_of, open_flags, retrain_plan
from tasks.lineage.recipe import keep_revocations
from tasks.lineage.revocation import (
    ERASED,
    ERASING,
    REINSTATED,
    REVOKED,
    Hit,
    Place,
    Target,
    find_hit,
    find_rows,
    foresee,
    pinned,
    quoted,
    read_lists,
    revoked,
    standing_entries,
    write_lists,
)

if TYPE_CHECKING:
    import pyarrow as pa

_LOOKS = 8  # for episodes that come in while they are erased


def revoke(context: Context, what: str, reason: str, dry_run: bool = False) -> dict[str, Any]:
    """Revoke a target (see `Target`) and say who learnt from it; the same target again adds nothing.

    Args:
        reason: why, for everybody who asks later.
        dry_run: only say what it would hit; nothing is written.

    Returns:
        {revoked, new, entry, by, reason, episodes, groups, datasets, files, descendants, flagged_champions, plan}.

    Raises:
        UsageError: no such kind of target, or no reason. NotFound: no row is of it.
    """
    target = pinned(context.ledger, Target.parse(what))
    if not reason.strip() and not dry_run:
        raise UsageError("Say why with --reason: who looks at a flagged agent later must know.")
    ledger, workspace = context.ledger, context.workspace
    known = _entry_of(context, target)
    if known is not None:
        return _report(context, known, new=False)
    hit = find_hit(ledger, workspace, target)
    foreseen = foresee(target, hit)
    found = descendants_of(ledger, workspace, foreseen)
    payload = {
        "what": str(target),
        "reason": reason,
        **_by(context),
        "lists": {"path": "", "sha256": "", "groups": len(hit.groups), "episodes": len(hit.episodes)},
        "roots": list(hit.roots),
        "files": [asdict(place) for place in hit.places],
        "descendants": [each.plain() for each in found],
    }
    if dry_run:
        plan = retrain_plan(ledger, workspace, revoked(ledger, workspace).with_also(foreseen))
        return _shown(payload, found, plan, entry=None, new=True)
    payload["lists"] = write_lists(workspace, hit)

    def check(view: LedgerView) -> None:
        if any(entry.payload["what"] == str(target) for entry in standing_entries(view)):
            raise Conflict(f"{target} was revoked meanwhile; look at `forebay revoke --list`.")

    entry = ledger.append(REVOKED, str(target), payload, check)
    _sign(context, entry)
    return _report(context, entry, new=True)


def reinstate(context: Context, what: str, reason: str) -> dict[str, Any]:
    """Take a revocation back; flags that rest on it alone go with it.

    Raises:
        NotFound: it is not revoked. Refused: its bytes were erased, or are about to be. UsageError: no reason.
    """
    if not reason.strip():
        raise UsageError("Say why with --reason.")
    entry = _entry_of(context, Target.parse(what))
    target = what if entry is None else entry.payload["what"]
    if entry is None:
        raise NotFound(f"{target} is not revoked; `forebay revoke --list` shows what is.")

    def check(view: LedgerView) -> None:
        if any(e.payload["revocation"] == entry.seq for e in view.entries(ERASING)):
            raise Refused(
                f"{target} was erased; what is gone cannot be reinstated. Import it again under another name."
            )
        if all(e.seq != entry.seq for e in standing_entries(view)):
            raise Conflict(f"{target} was reinstated meanwhile.")

    payload = {"what": str(target), "revocation": entry.seq, "reason": reason, **_by(context)}
    made = context.ledger.append(REINSTATED, str(target), payload, check)
    _sign(context, made)
    return {
        "reinstated": str(target),
        "entry": made.seq,
        "reason": reason,
        "flags": len(open_flags(context.ledger, context.workspace)),
    }


def listing(context: Context) -> dict[str, Any]:
    """Return what is revoked, who is flagged for it (champions first), and the plan to retrain."""
    ledger = context.ledger
    now = revoked(ledger, context.workspace)
    ended = {e.payload["intent"] for e in ledger.entries(ERASED)}
    begun = ledger.entries(ERASING)
    going = {e.payload["revocation"] for e in begun if e.seq not in ended}
    erased = {e.payload["revocation"] for e in begun} - going
    return {
        "revoked": [
            {
                "what": e.payload["what"],
                "entry": e.seq,
                "time": e.time,
                "by": e.payload["by"],
                "reason": e.payload["reason"],
                "groups": e.payload["lists"]["groups"],
                "episodes": e.payload["lists"]["episodes"],
                "erased": e.seq in erased,
            }
            for e in standing_entries(ledger)
        ],
        "descendants": [each.plain() for each in descendants_of(ledger, context.workspace, now)],
        "plan": _plan(retrain_plan(ledger, context.workspace, now)),
    }


def published(context: Context) -> dict[str, Any]:
    """Return what a clone must know: {revoked: {target: reason}, flagged: {agent: why}, erased: {SHA-256: reason}}."""
    erasing = context.ledger.entries(ERASING)
    return {
        "revoked": {e.payload["what"]: e.payload["reason"] for e in standing_entries(context.ledger)},
        "flagged": {flag.ref: flag.why for flag in open_flags(context.ledger, context.workspace)},
        "erased": {
            file["sha256"]: f"{e.payload['what']}: {e.payload['reason']}"
            for e in erasing
            for file in e.payload["files"]
        },
    }


def schedule_plan(context: Context, plan: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hand the plan's steps to the runner, or say with which command to run each; return a sentence for each step."""
    from flows.deployments import start_run

    said = []
    for step in plan:
        parameters = {"collect": "never", "dataset": step["dataset"], "start": step["start"]}
        name = start_run(context.workspace, "retrain", parameters)
        said.append(
            f"The run `{name}` replaces {step['agent']}."
            if name
            else f"No runner is up; run `{step['command']}` to replace {step['agent']}."
        )
    return said


# ---------------------------------------------------------------------------------------------------------- erasing


def erase(context: Context, what: str, reason: str) -> dict[str, Any]:
    """Erase the bytes of what is revoked from workspace, cache and remote; digests and the record stay.

    Whole groups go: what is left of a group is never learnt from. Shards that hold other groups too are written anew
    without them, as a new version of their dataset. The intent is recorded first and the end last; a run that was
    killed is finished by the next one.

    Returns:
        {erased, entry, files, copies, versions: [subject of each new dataset version]}.

    Raises:
        NotFound: it is not revoked. Conflict: another process erases.
        Unavailable: DVC's remote does not delete; nothing is claimed, run again.
    """
    with context.exclusive("erasing data"):
        ended = _finish_erasing(context)
        entry = _entry_of(context, Target.parse(what))
        if entry is None:
            raise NotFound(f"{what} is not revoked; `forebay revoke {what} --reason …` comes first.")
        mine = [done for done in ended if done.payload["revocation"] == entry.seq]
        before = [e for e in context.ledger.entries(ERASED) if e.payload["revocation"] == entry.seq]
        groups = _groups_of(context, entry)
        left = _left(context, entry, groups)
        if any(left) or not before:
            intent = _intend(context, entry, reason or entry.payload["reason"], groups, *left)
            mine += _carry_out(context, intent)
        return _erased(mine or before[-1:])


def _finish_erasing(context: Context) -> list[Entry]:
    ended = {e.payload["intent"] for e in context.ledger.entries(ERASED)}
    opened = [e for e in context.ledger.entries(ERASING) if e.seq not in ended]
    return [done for intent in opened for done in _carry_out(context, intent)]


def _groups_of(context: Context, entry: Entry) -> frozenset[str]:
    """Return the groups that a revocation takes out: those that it hit, and what came in of its value later."""
    target = Target.parse(entry.payload["what"])
    groups = frozenset(read_lists(context.workspace, entry.payload["lists"])["groups"])
    if target.kind in ("dataset", "shard"):
        return groups  # what was sealed since was never revoked
    with suppress(NotFound):
        groups |= find_hit(context.ledger, context.workspace, target).groups
    return groups


def _left(
    context: Context, entry: Entry, groups: Iterable[str]
) -> tuple[dict[Place, pa.Table], tuple[Place, ...]]:
    """Return what is still to be erased: the files with rows of the groups, and the sets of preferences that quote them."""
    rows = find_rows(context.ledger, context.workspace, groups)
    return rows, _quoting(context, entry, groups, rows)


def _quoting(
    context: Context, entry: Entry, groups: Iterable[str], rows: Mapping[Place, pa.Table]
) -> tuple[Place, ...]:
    """Return the sets of preferences with a pair of an erased group, or of the value that is revoked."""
    earlier = [e.payload for e in context.ledger.entries(ERASING) if e.payload["revocation"] == entry.seq]
    lists = [p["lists"] for p in (entry.payload, *earlier) if "lists" in p]
    episodes = _episodes(rows).union(*(read_lists(context.workspace, each)["episodes"] for each in lists))
    hit = Hit(episodes, frozenset(groups), (), ())
    return quoted(context.workspace, foresee(Target.parse(entry.payload["what"]), hit))


def _episodes(rows: Mapping[Place, pa.Table]) -> frozenset[str]:
    return frozenset(name for table in rows.values() for name in table["episode_id"].to_pylist())


def _intend(
    context: Context,
    entry: Entry,
    reason: str,
    groups: frozenset[str],
    rows: Mapping[Place, pa.Table],
    quoting: Sequence[Place],
) -> Entry:
    """Write what takes the place of the shards, keep the facts of the rows, and record what is about to go."""
    from tasks.lineage.erasure import Shards, keep_facts
    from tasks.replay import dvc_store, shards
    from tasks.replay.seal import locked, newest, restore

    workspace, ledger = context.workspace, context.ledger
    places = {place.path: place for place in rows}
    names = sorted({place.dataset for place in rows if place.dataset and place.sha256})
    datasets, locators, gone = [], [], []
    for name in names:
        sealed = newest(ledger, name)
        assert sealed is not None  # a shard of it was found
        restore(workspace, sealed.manifest)  # what is rewritten, or kept, must be here whole
        with locked(workspace, name):
            _drop_strays(context, name)
            last = ledger.last()
            number = 0 if last is None else last.seq
            hit = [shard for shard in sealed.manifest.shards if shard.path in places]
            replaces = []
            for at, shard in enumerate(hit):
                path = shards.folder_of(workspace, name) / f"e{number:05d}-{at:05d}.parquet"
                new = shards.rewrite(workspace, shard, groups, path)
                locators.append(dvc_store.locator(workspace.root / shard.path))
                gone.append({"path": shard.path, "sha256": shard.sha256})
                replaces.append({"old": asdict(shard), "new": new and asdict(new)})
            datasets.append({"name": name, "replaces": replaces})
    look = Shards(ledger, workspace)
    # A run's own shard goes whole, and so do the facts of all its rows.
    kept = {
        place.sha256: table if place.dataset else look.rows(asdict(place))
        for place, table in rows.items()
        if place.sha256
    }
    known = {file["path"] for file in gone}
    for place in places.values():
        if place.path not in known:  # open segments, shards of runs
            with suppress(FileNotFoundError):  # a segment that is being sealed: looked for again at the end
                sha256 = place.sha256 or sha256_file(workspace.root / place.path)
                gone.append({"path": place.path, "sha256": sha256})
    gone += [{"path": place.path, "sha256": place.sha256} for place in quoting]
    payload = {
        "what": entry.payload["what"],
        "revocation": entry.seq,
        "reason": reason,
        **_by(context),
        "groups": len({name for table in rows.values() for name in table["group_id"].to_pylist()}),
        "lists": write_lists(workspace, Hit(_episodes(rows), groups, (), ())),
        "facts": keep_facts(workspace, kept),
        "datasets": datasets,
        "files": gone,
        "locators": locators,
        "segments": sorted(
            (place.path, group)
            for place, table in rows.items()
            if not place.sha256
            for group in table["group_id"].unique().to_pylist()
        ),
    }
    return ledger.append(ERASING, entry.payload["what"], payload)


def _carry_out(context: Context, intent: Entry, looks: int = _LOOKS) -> list[Entry]:
    """Do what an intent says, each step harmless where it was done before, look again, and record the end.

    What came in meanwhile, from a seal or an import that was under way, is an intent of its own, recorded before this one
    has ended: an erasure counts as done when nothing is left.

    Raises:
        Conflict: episodes of the erased groups keep coming in.
    """
    from tasks.replay import dvc_store
    from tasks.replay.manifest import Shard
    from tasks.replay.seal import locked, seal_rewritten
    from tasks.replay.segments import drop_groups, unsealed_files

    workspace, ledger, p = context.workspace, context.ledger, intent.payload
    say = progress.current().say
    groups = frozenset(read_lists(workspace, p["lists"])["groups"] if "lists" in p else ())
    groups |= {group for _, group in p["segments"]}
    copies = sum(_erase_unrecorded(context, name, p["datasets"]) for name in _at_hand(context))
    versions = []
    for each in p["datasets"]:
        replaced: dict[str, Shard | None] = {
            pair["old"]["sha256"]: pair["new"] and Shard(**pair["new"]) for pair in each["replaces"]
        }
        with locked(workspace, each["name"]):
            sealed = seal_rewritten(workspace, ledger, each["name"], replaced, intent.seq)
        versions.append(sealed.manifest.subject)
        say(f"    {sealed.manifest.subject} holds what is left: {sealed.manifest.rows} episodes")
    for name in sorted({name for name, _ in unsealed_files(workspace)}):
        with locked(workspace, name):  # no seal reads them
            for found, path in unsealed_files(workspace):
                if found == name:
                    drop_groups(path, groups)
    segments = {path for path, _ in p["segments"]}
    for file in p["files"]:
        if file["path"] in segments:
            continue
        path = workspace.root / file["path"]
        copies += _unlink(path)
        if path.parent.name == "fresh":
            _unlink(path.with_suffix(".sha256"))
        for cached in (workspace.state / "decoded").glob(f"{file['sha256']}.*"):
            copies += _unlink(cached)
    shutil.rmtree(
        workspace.state / "judged", ignore_errors=True
    )  # replies of a judge may quote what it judged
    if p["locators"]:
        copies += dvc_store.erase(workspace, p["locators"])
    payload = {
        "what": p["what"],
        "revocation": p["revocation"],
        "intent": intent.seq,
        "reason": p["reason"],
        "by": p["by"],
        "files": p["files"],
        "copies": copies,
        "versions": versions,
    }
    entry = next(e for e in ledger.entries(REVOKED) if e.seq == p["revocation"])
    with _nobody_seals(context):
        left = _left(context, entry, groups)
        if not any(left):
            return [_end(context, intent, payload)]
    if not looks:
        raise Conflict(f"Episodes of {p['what']} keep coming in; stop what writes them, then run again.")
    say("    more of it came in meanwhile")
    more = _intend(context, entry, p["reason"], groups, *left)
    return [_end(context, intent, payload), *_carry_out(context, more, looks - 1)]


@contextmanager
def _nobody_seals(context: Context) -> Iterator[None]:
    """Hold the locks of all datasets, always in the same order."""
    from tasks.replay.seal import locked

    with ExitStack() as stack:
        for name in _at_hand(context):
            stack.enter_context(locked(context.workspace, name))
        yield


def _at_hand(context: Context) -> list[str]:
    """Return the names of all datasets, with those that wait to be sealed for the first time."""
    from tasks.replay.segments import unsealed_files

    sealed = {e.payload["name"] for e in context.ledger.entries("dataset.sealed")}
    return sorted(sealed | {name for name, _ in unsealed_files(context.workspace)})


def _erase_unrecorded(context: Context, name: str, rewritten: Sequence[Mapping[str, Any]]) -> int:
    """Erase the shards of a seal that was killed after its push: the next one writes them from what is left then.

    Args:
        rewritten: what the intent is about to seal, per dataset.

    Returns:
        How many copies there were.
    """
    from tasks.replay import dvc_store, shards
    from tasks.replay.seal import locked

    workspace = context.workspace
    folder = shards.folder_of(workspace, name)
    with locked(workspace, name):
        known = {
            shard["path"] for e in context.ledger.entries("dataset.sealed") for shard in e.payload["shards"]
        }
        known |= {pair["new"]["path"] for each in rewritten for pair in each["replaces"] if pair["new"]}
        strays = [path for path in sorted(folder.glob("*.parquet")) if workspace.relative(path) not in known]
        if not strays:
            return 0
        copies = dvc_store.erase(workspace, [dvc_store.locator(path) for path in strays])
        copies += sum(map(_unlink, strays))
        dvc_store.track_anew(workspace, folder)  # the pointer must not name them
        return copies


def _end(context: Context, intent: Entry, payload: Mapping[str, Any]) -> Entry:
    def check(view: LedgerView) -> None:
        if any(e.payload["intent"] == intent.seq for e in view.entries(ERASED)):
            raise Conflict(f"{payload['what']} was erased by another process.")

    done = context.ledger.append(ERASED, payload["what"], payload, check)
    _sign(context, done)
    return done


def _drop_strays(context: Context, name: str) -> None:
    """Remove rewritten shards of a run that was killed before it recorded its intent."""
    from tasks.replay import shards

    known = {shard["path"] for e in context.ledger.entries("dataset.sealed") for shard in e.payload["shards"]}
    for path in shards.folder_of(context.workspace, name).glob("e*.parquet"):
        if context.workspace.relative(path) not in known:
            path.unlink()


def _unlink(path: Path) -> int:
    try:
        path.unlink()
    except FileNotFoundError:
        return 0
    return 1


def _erased(done: Sequence[Entry]) -> dict[str, Any]:
    found = [entry.payload for entry in done]
    return {
        "erased": found[-1]["what"],
        "entry": done[-1].seq,
        "files": [file["path"] for p in found for file in p["files"]],
        "copies": sum(p["copies"] for p in found),
        "versions": [version for p in found for version in p["versions"]],
    }


# ---------------------------------------------------------------------------------------------------------- helpers


def _entry_of(context: Context, target: Target) -> Entry | None:
    """Return the revocation of a target that holds; a dataset without its version is the one version that is revoked.

    Raises:
        UsageError: several versions are.
    """
    held = standing_entries(context.ledger)
    found = [e for e in held if e.payload["what"] == str(target)]
    if not found and target.kind == "dataset" and "/" not in target.name:
        found = [e for e in held if e.payload["what"].rpartition("/v")[0] == str(target)]
        if len(found) > 1:
            versions = ", ".join(e.payload["what"] for e in found)
            raise UsageError(f"Several versions of {target} are revoked ({versions}); name one.")
    return found[-1] if found else None


def _report(context: Context, entry: Entry, new: bool) -> dict[str, Any]:
    now = revoked(context.ledger, context.workspace)
    found = descendants_of(context.ledger, context.workspace, now)
    plan = retrain_plan(context.ledger, context.workspace, now)
    return _shown(entry.payload, found, plan, entry=entry.seq, new=new)


def _shown(
    p: Mapping[str, Any], found: Sequence[Descendant], plan: Sequence[Step], *, entry: int | None, new: bool
) -> dict[str, Any]:
    return {
        "revoked": p["what"],
        "new": new,
        "entry": entry,
        "by": p["by"],
        "reason": p["reason"],
        "episodes": p["lists"]["episodes"],
        "groups": p["lists"]["groups"],
        "roots": list(p["roots"]),
        "files": [dict(file) for file in p["files"]],
        "descendants": [each.plain() for each in found],
        "plan": _plan(plan),
    }


def _plan(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{**asdict(step), "command": step.command} for step in steps]


def _by(context: Context) -> dict[str, str]:
    """Who does it: by their own key where this workspace trusts one of theirs, else by the name of the account."""
    try:
        key = keys.approver_key(context)
    except ForebayError:
        return {"by": getpass.getuser()}
    return {"by": key.name, "key": key.id}


def _sign(context: Context, entry: Entry) -> None:
    """Sign the ledger up to here where the workspace has keys, and tell git: who cuts it off again is found out."""
    with _said():
        keys.sign_head(context, entry)
    with _said():
        keep_revocations(context.workspace, published(context), entry.time)


@contextmanager
def _said() -> Iterator[None]:
    """Say what went wrong beside the ledger; the ledger has it, and the next entry makes up for it."""
    try:
        yield
    except ForebayError as error:
        progress.current().say(f"    recorded in the ledger, but not beside it: {error}")
