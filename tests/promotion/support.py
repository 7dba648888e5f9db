"""A registry of plain files that real processes can share, and a ledger with agents and decisions in it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.keys import PrivateKey, Trust, trusted
from tasks.core.ledger import Ledger
from tasks.evaluation.serving import Serving, serving_evidence
from tasks.promotion.attest import sign_decision, signature_of
from tasks.promotion.evidence.item import FileRef


def make_key(name: str) -> PrivateKey:
    """A key that is the same in every process of a test."""
    return PrivateKey(name, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sha256_bytes(name.encode()))))


SERVICE, LEE, EVE = make_key("service"), make_key("lee"), make_key("eve")
TRUST = Trust((trusted(SERVICE, "service"), trusted(LEE, "approver")))


class FileAliases:
    """The `Aliases` protocol on files: versions/<n> holds a digest, aliases/<name> a version."""

    def __init__(self, root: Path, office: str = "agent") -> None:
        self.root = root
        self.office = office

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
    record_agent(ledger, version, files_digest(version), registry.office)


def record_agent(ledger: Ledger, version: int, digest: str, office: str = "agent") -> None:
    ledger.append(f"{office}.registered", f"{office}/{version}", {"version": version, "digest": digest})


def add_decision(
    ledger: Ledger, candidate: int, champion: int, verdict: str = "PASS", /, office: str = "agent", **changes
) -> str:
    """Record a decision as the gate would, and return its digest."""
    payload = decision_payload(candidate, champion, verdict, **changes)
    payload["signature"] = signature_of("beside", sign_decision(payload, SERVICE), SERVICE)
    ledger.append("decision.made", f"{office}/{candidate}", payload)
    return payload["decision"]


def envelope(ledger: Ledger, decision: str) -> bytes:
    """Return the service's signature of a decision."""
    (entry,) = [e for e in ledger.entries("decision.made") if e.payload["decision"] == decision]
    return sign_decision(entry.payload, SERVICE)


def decision_payload(candidate: int, champion: int, verdict: str = "PASS", /, **changes) -> dict:
    """The payload that the gate would record, not signed."""
    return {
        "decision": sha256_bytes(f"{candidate} over {champion}: {verdict} {changes}".encode()),
        "verdict": verdict,
        "reasons": ["Quality: as told."],
        "approval": "none",
        "policy_digest": "0" * 64,
        "candidate": {"version": candidate, "digest": files_digest(candidate)},
        "champion": {"version": champion, "digest": files_digest(champion)},
        **changes,
    }


def serving_file(evidence: Path, **changes) -> FileRef:
    """Evidence of an agent that loads in a second and answers in a tenth, and of a champion that does the same.

    Args:
        changes: to the candidate's `Serving`.
    """
    passes = ((0.1, 0.1), (0.1, 0.1))
    good = Serving("", "", 1.0, passes, passes, (4, 4), 500.0, 0.0, "a" * 64, True)
    content = serving_evidence(replace(good, **changes), good, ["1 + 1 =", "2 + 2 ="], device="cpu")
    return json_file(evidence, "serving", content)


def json_file(evidence: Path, kind: str, content: dict) -> FileRef:
    """Keep a JSON evidence file by its content."""
    data = canonical_json(content)
    name = f"{kind}/{sha256_bytes(data)}.json"
    write_atomic(evidence / name, data)
    return FileRef(name, sha256_bytes(data))


@contextmanager
def mlflow_server(root: Path) -> Iterator[str]:
    """A real MLflow server on root/mlflow.db that keeps the files itself, under root/kept; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--host", "127.0.0.1"]
    arguments += ["--port", str(port), "--artifacts-destination", str(root / "kept"), "--workers", "1"]
    with (root / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            cwd=root, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if urlopen(f"{uri}/health", timeout=1).status == 200:
                    break
            except OSError:
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
