"""The history of `tests.lineage.world` told with all that a page shows: contents of datasets, curves, canaries, strange words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tasks.core.digest import canonical_json, sha256_bytes
from tasks.lineage.page.document import build
from tasks.lineage.page.gather import gather
from tasks.lineage.page.types import Audit
from tasks.lineage.verify import verify
from tasks.replay.manifest import Manifest
from tests.lineage.signed import SignedWorld, adopt_keys
from tests.lineage.tables import shard_bytes
from tests.lineage.world import World
from tests.promotion.support import LEE

TIME = "2026-03-03T12:00:00+00:00"
NASTY = "<script>alert('x')</script>\u202egnp.exe \"quotes\" </script><img src=x onerror=alert(1)> ${x} {{ 7 * 7 }}"


class ToldWorld(SignedWorld):
    """Decisions signed and approved, datasets with contents, runs with curves; names and reasons attack the reader."""

    def learnt(self, manifest: Manifest) -> list[str]:
        """Of the first group alone."""
        return ["g1"]

    def append(self, kind, subject, payload):
        if kind == "dataset.sealed":
            payload = {**payload, "contents": self.contents(payload)}
        elif kind == "run.started":
            payload = {**payload, "settings": {**payload["settings"], "guards": {"note": NASTY}}}
            curve = self.workspace.runs / subject[:16] / "metrics.jsonl"
            curve.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"step": i, "reward_estimate": i / 50, "kl_k3": 0.1, "entropy": float("nan")}
                for i in range(1, 51)
            ]
            curve.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "reward')
        elif kind == "run.finished":
            outputs = {**payload["outputs"], "resources": {"cpu_seconds": 7205.0, "memory_mib": 2048.0}}
            payload = {**payload, "outputs": outputs}
        elif kind.startswith("promotion."):
            payload = {**payload, "reason": f"told so {NASTY}"}
        return super().append(kind, subject, payload)

    def shard(self, number, sampled):
        return shard_bytes(f"s{number}", sampled)

    def contents(self, sealed: dict[str, Any]) -> list[dict[str, Any]]:
        half = sealed["new_rows"] // 2
        kind = {"env": "calculator", "env_version": "1", "source": "rollout", "licence": "Apache-2.0"}
        other = {**kind, "source": NASTY, "licence": "CC-BY-NC-4.0"}
        return [{**part, "rows": half, "groups": 2} for part in (kind, other)]


def told_world(root) -> ToldWorld:
    """agent/1 (base) -> agent/2 -> agent/3, the champion; agent/4 is trained and not judged."""
    world = ToldWorld(root)
    adopt_keys(world)
    world.crown(world.base())
    world.generation(1)
    world.generation(2)
    world.seal([3])
    world.train(3)
    return world


def revoke(world: World, what: str, groups: list[str], episodes: Sequence[str] = ()) -> int:
    """Record a revocation as `forebay revoke` does."""
    data = canonical_json({"groups": groups, "episodes": list(episodes)})
    digest = sha256_bytes(data)
    lists = world.put(world.workspace.evidence / "revoked" / f"{digest}.json", data)
    payload = {
        "what": what,
        "reason": f"a person asked {NASTY}",
        "by": LEE.name,
        "lists": {**lists, "groups": len(groups)},
    }
    return world.ledger.append("data.revoked", what, payload).seq


def audit(world: World, ref: str = "agent@champion", verified: bool = True) -> Audit:
    report = asdict(verify(world.ledger, world.workspace, ref)) if verified else None
    return gather(world.ledger, world.workspace, ref, time=TIME, report=report)


def page(world: World, ref: str = "agent@champion", verified: bool = True) -> str:
    return build(audit(world, ref, verified))
