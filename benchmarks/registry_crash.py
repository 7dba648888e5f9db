"""Do MLflow and the ledger agree again when promotions, rollbacks and repairs are killed, on the real registry?

    python -m benchmarks.registry_crash [--kills 50] [--seed 0]

`benchmarks.promotion_crash` kills hundreds of promotions over a registry of plain files, so that its figure is about
promotion. This one is about MLflow (a SQLite store) in a real workspace with a small model, through the functions that
the commands call. In turn an agent is promoted, rolled back, or somebody changes MLflow by hand (moves or deletes an
alias, deletes the champion's version, alters its digest tag, deletes the whole registered model) and `forebay reconcile`
repairs it; the process is SIGKILLed before or after every call that changes something: the ledger's appends, MLflow's
calls, the signed head, its commit in git. Afterwards another process runs `forebay reconcile`, and everything has to agree.
Each step runs in a forked process that has MLflow imported and never used: a real start would take seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import keys
from flows.champions import promote_agent, register_agent, rollback_champion
from flows.context import Context
from flows.registry import reconcile_registry
from models.machine import describe
from tasks.core.digest import digest_tree
from tasks.core.heads import check_heads
from tasks.promotion.attest import sign_decision, signature_of, write_signature
from tasks.promotion.drift import look
from tasks.promotion.promote import champion, places, standing
from tests.promotion.support import decision_payload

fork = multiprocessing.get_context("fork")
_CLIENT = (
    "create_logged_model", "finalize_logged_model", "create_registered_model", "create_model_version",
    "set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag",
)  # fmt: skip
DRIFTS = ("alias moved", "alias deleted", "version deleted", "tag changed", "model deleted")


class Killer:
    """SIGKILLs its own process at the n-th boundary; `at` 0 only counts."""

    def __init__(self, at: int) -> None:
        self.at, self.passed = at, 0

    def boundary(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, thing: Any, *names: str) -> None:
        for name in names:
            setattr(thing, name, self._wrapped(getattr(thing, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.boundary()
            result = call(*args, **kwargs)
            self.boundary()
            return result

        return wrapped


def apart(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run `work` in a process of its own; return its exit code and what it gave (None where it was killed)."""
    answers = fork.SimpleQueue()

    def body() -> None:
        answers.put(work())

    process = fork.Process(target=body)
    process.start()
    process.join()
    return int(process.exitcode or 0), None if answers.empty() else answers.get()


def act(root: Path, word: str, version: int, at: int) -> int:
    """One promotion, rollback or repair as the command does it; return how many boundaries it passed."""
    from mlflow import MlflowClient

    context, killer = Context.open(root), Killer(at)
    killer.around(context.ledger, "append", "_end")
    killer.around(MlflowClient, *_CLIENT)
    killer.around(keys, "write_head", "keep_heads")
    if word == "promotion":
        promote_agent(context, f"agent/{version}", "drill")
    elif word == "rollback":
        rollback_champion(context, "drill")
    else:
        reconcile_registry(context)
    return killer.passed


def candidate(root: Path) -> int:
    """Register another agent and record that it passed against the champion."""
    context = Context.open(root)
    base, number = context.agent("1").payload, len(context.ledger.entries("agent.registered")) + 1
    folder = context.workspace.models / f"candidate-{number}"
    shutil.copytree(root / base["path"], folder, copy_function=os.link)
    (folder / "NOTICE.txt").write_text(f"candidate {number}")
    version = register_agent(
        context,
        folder,
        digest_tree(folder),
        origin="trained",
        parents=base["parents"],
        source={"name": "drill"},
        metrics={},
        tokenizer=base["tokenizer_digest"],
        template=base["template_digest"],
    )
    now = champion(context.ledger)
    assert now is not None
    roles = {
        role: {"version": v, "digest": context.agent(str(v)).payload["digest"]}
        for role, v in (("candidate", version), ("champion", now))
    }
    payload, key = decision_payload(version, now, **roles), keys.service_key(context)
    envelope = sign_decision(payload, key)
    path = write_signature(context.workspace.evidence / "decisions" / f"{payload['decision']}.json", envelope)
    payload["signature"] = signature_of(context.workspace.relative(path), envelope, key)
    keys.sign_head(context, context.ledger.append("decision.made", f"agent/{version}", payload))
    return version


def tamper(root: Path, what: str) -> None:
    """Do to MLflow what somebody might."""
    context = Context.open(root)
    now, place = standing(context.ledger), places(context.ledger)
    assert now.champion is not None
    at, registry = place[now.champion], context.registry
    if what == "alias moved":
        registry.set_alias("champion", place[1] if now.champion != 1 else at)
    elif what == "alias deleted":
        registry.delete_alias("champion")
    elif what == "version deleted":
        registry._client.delete_model_version("agent", str(at))
    elif what == "tag changed":
        registry.tag(at, {"forebay.digest": "0" * 64})
    else:
        registry._client.delete_registered_model("agent")


def disagreements(root: Path, was: int, may: set[int]) -> list[str]:
    """Run `forebay reconcile` and say what does not agree afterwards."""
    context = Context.open(root)
    reconcile_registry(context)
    now, place, found = standing(context.ledger), places(context.ledger), []
    aliases = {name: place[v] for name, v in now.aliases().items() if v is not None}
    if now.intent is not None:
        found.append(f"intent {now.intent.seq} is open")
    if context.registry.aliases() != aliases:
        found.append(f"aliases {context.registry.aliases()}, ledger {aliases}")
    if now.champion not in may:
        found.append(f"champion {now.champion}, was {was}")
    found += [drift.says for drift in look(context.ledger, context.registry)]
    for version in set(now.aliases().values()) - {None}:
        digest = context.agent(str(version)).payload["digest"]
        if context.registry.served(place[version]) != digest:
            found.append(f"MLflow serves other files for agent/{version}")
        held = [at for at, v in (context.registry.versions() or {}).items() if v.digest == digest]
        if held != [place[version]]:
            found.append(f"agent/{version} is registered as {held}")
    context.ledger.verify_chain()
    kept = keys.kept_head(context.workspace)
    found += [
        p.says for p in check_heads(context.ledger, context.workspace.heads, keys.trust(context), kept)[1]
    ]
    return found


def campaign(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill until so many were hit; return how they ended and whatever did not agree."""
    chance = random.Random(seed)
    reach: dict[str, int] = {}
    turns: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    hits: dict[str, set[int]] = {}
    wrong: list[str] = []
    done, turn = 0, 0
    while done < kills:
        kind = ("promotion", "drift", "rollback", "drift")[turn % 4]
        turn += 1
        word = DRIFTS[turns["drift"] % len(DRIFTS)] if kind == "drift" else kind
        code, was = apart(lambda: champion(Context.open(root).ledger))
        version = apart(lambda: candidate(root))[1] if kind == "promotion" else 0
        if kind == "rollback" and len(standing(Context.open(root).ledger).champions) < 2:
            continue
        if kind == "drift":
            apart(lambda word=word: tamper(root, word))
        turns[kind] += 1
        # The first of each kind is left alone, to count its boundaries; later ones are killed at one of them.
        at = chance.randint(1, reach[word]) if word in reach else 0
        code, passed = apart(lambda kind=kind, version=version, at=at: act(root, kind, version, at))
        killed = code == -signal.SIGKILL
        if at == 0:
            reach[word] = passed or 0
        elif killed:
            done += 1
            hits.setdefault(word, set()).add(at)
        if code not in (0, -signal.SIGKILL):
            wrong.append(f"{word}, boundary {at}: exit code {code}")
        before = Context.open(root).ledger
        line = standing(before).champions
        may = {was} if kind == "drift" else {was, line[-1]}
        code, says = apart(lambda was=was, may=may: disagreements(root, was, may))
        wrong += [
            f"{word}, boundary {at}: {text}" for text in (says if code == 0 else [f"reconcile: {code}"])
        ]
        ended[f"{word}: {'killed' if killed else 'whole'}"] += 1
    return {
        "kills": done,
        "boundaries": reach,
        "killed_at": {word: len(found) for word, found in hits.items()},
        "ended": dict(ended),
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/registry_crash.json"))
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        from tests.tiny import make_tiny_model

        root, base = Path(name) / "ws", make_tiny_model(Path(name) / "tiny")
        apart(lambda: _lay(root, base))
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store

        assert mlflow is not None
        started = time.perf_counter()
        found = {"machine": describe(), **campaign(root, words.kills, words.seed)}
        found["seconds"] = time.perf_counter() - started
    print(json.dumps(found, indent=2), flush=True)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(found, indent=2))
    if found["wrong"]:
        raise SystemExit("Something did not agree; see above.")


def _lay(root: Path, base: Path) -> None:
    from tests.flows.conftest import lay_workspace

    lay_workspace(root, base)


if __name__ == "__main__":
    main()
