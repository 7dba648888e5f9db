"""A history with keys, and what a forger without one can do to its ledger."""

from __future__ import annotations

import sqlite3

from tasks.core.heads import write_head
from tasks.core.keys import write_trust
from tasks.core.ledger import GENESIS, _digest
from tasks.promotion.attest import answer_payload, sign_decision, signature_of, write_signature
from tests.lineage.world import World
from tests.promotion.support import LEE, SERVICE, TRUST

SIGNED = ("promotion.committed", "decision.made")


class SignedWorld(World):
    """The same history with keys: every decision signed and approved, every head signed."""

    def append(self, kind, subject, payload):
        if kind == "decision.made":
            record = self.workspace.root / payload["record"]["path"]
            data = sign_decision(payload, SERVICE)
            path = self.workspace.relative(write_signature(record, data))
            payload = {**payload, "signature": signature_of(path, data, SERVICE)}
        seq = super().append(kind, subject, payload)
        entry = self.ledger.last()
        assert entry is not None
        if kind in SIGNED:
            write_head(self.ledger, self.workspace.heads, entry, SERVICE, TRUST)
        if kind == "decision.made":
            self.ledger.append(
                "approval.granted",
                subject,
                answer_payload("approval", payload["decision"], "good", LEE, TRUST),
            )
        return seq


def adopt_keys(world: World) -> None:
    """Trust the service and Lee, and record it."""
    write_trust(world.workspace.trust, TRUST)
    for key in TRUST.keys:
        payload = {"name": key.name, "role": key.role, "id": key.id, "public": key.public}
        world.ledger.append("key.trusted", f"key/{key.name}", payload)


def rows(world) -> list[dict]:
    with sqlite3.connect(world.workspace.state / "ledger.db") as raw:
        raw.row_factory = sqlite3.Row
        return [dict(row) for row in raw.execute("SELECT * FROM ledger ORDER BY seq")]


def put_back(world, rows: list[dict], *, rechain: bool) -> None:
    """Write these rows as the whole ledger; with `rechain`, numbered and hashed anew as an honest one would be."""
    prev = GENESIS
    with sqlite3.connect(world.workspace.state / "ledger.db") as raw:
        raw.execute("DELETE FROM ledger")
        for seq, row in enumerate(rows, start=1):
            if rechain:
                row = {**row, "seq": seq, "prev": prev}
                row["digest"] = prev = _digest(row)
            raw.execute(
                "INSERT INTO ledger VALUES (:seq, :time, :kind, :subject, :payload, :prev, :digest)", row
            )
