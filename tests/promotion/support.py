"""A registry of plain files that real processes can share, and a ledger with agents and decisions in it."""

from __future__ import annotations

from pathlib import Path

from tasks.core.digest import sha256_bytes, write_atomic
from tasks.core.ledger import Ledger


class FileAliases:
    """The `Aliases` protocol on files: versions/<n> holds a digest, aliases/<name> a version."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, version: int, digest: str) -> None:
        write_atomic(self.root / "versions" / str(version), digest.encode())

    def remove(self, version: int) -> None:
        (self.root / "versions" / str(version)).unlink()

    def digest(self, version: int) -> str | None:
        path = self.root / "versions" / str(version)
        return path.read_text() if path.exists() else None

    def aliases(self) -> dict[str, int]:
        names = [p for p in (self.root / "aliases").glob("*") if not p.name.startswith(".")]
        return {path.name: int(path.read_text()) for path in names}

    def set_alias(self, alias: str, version: int) -> None:
        write_atomic(self.root / "aliases" / alias, str(version).encode())

    def delete_alias(self, alias: str) -> None:
        (self.root / "aliases" / alias).unlink(missing_ok=True)


def files_digest(version: int) -> str:
    return sha256_bytes(f"agent {version}".encode())


def open_ledger(root: Path) -> Ledger:
    return Ledger(f"sqlite:///{root / 'ledger.db'}")


def add_agent(ledger: Ledger, registry, version: int) -> None:
    registry.add(version, files_digest(version))
    record_agent(ledger, version, files_digest(version))


def record_agent(ledger: Ledger, version: int, digest: str) -> None:
    ledger.append("agent.registered", f"agent/{version}", {"version": version, "digest": digest})


def add_decision(ledger: Ledger, candidate: int, champion: int, verdict: str = "PASS", /, **changes) -> str:
    """Record a decision as the gate would, and return its digest."""
    payload = {
        "decision": sha256_bytes(f"{candidate} over {champion}: {verdict} {changes}".encode()),
        "verdict": verdict,
        "reasons": ["Quality: as told."],
        "approval": "none",
        "candidate": {"version": candidate, "digest": files_digest(candidate)},
        "champion": {"version": champion, "digest": files_digest(champion)},
        **changes,
    }
    ledger.append("decision.made", f"agent/{candidate}", payload)
    return payload["decision"]
