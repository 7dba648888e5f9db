"""Shards that are real tables of episodes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.replay.manifest import Behaviour
from tasks.replay.schema import arrow_schema
from tests.replay.support import episode

OF_A_GROUP = 8
ORIGINS = (("rollout", "Apache-2.0", "calculator"), ("support | desk\n", "CC-BY-4.0", "chat"))


def shard_bytes(name: str, sampled: Sequence[Behaviour], groups: Sequence[str] = ()) -> bytes:
    """Return a shard with a group of the calculator and an imported one of another source and licence.

    Args:
        name: of the groups: `name`-0 and `name`-1, unless `groups` names them.
    """
    rows = [
        episode(
            group, index, source=source, licence=licence, env=env,
            behaviour_version=sampled[0].version, behaviour_digest=sampled[0].digest,
        )
        for group, (source, licence, env) in zip(groups or (f"{name}-0", f"{name}-1"), ORIGINS, strict=False)
        for index in range(OF_A_GROUP)
    ]  # fmt: skip
    columns = {column: [getattr(row, column) for row in rows] for column in arrow_schema().names}
    to = io.BytesIO()
    pq.write_table(pa.table(columns, schema=arrow_schema()), to)
    return to.getvalue()
