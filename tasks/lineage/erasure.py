"""What stays of erased rows, and the facts of any shard: read from its bytes, or from what was kept when they went.

An entry `data.erasing` names the files that go (`files`), which shard took the place of which (`datasets[].replaces`), the ids
of the groups (`lists`) and the facts of the rows that no file has any more (`facts`). A shard whose bytes were erased still
says by these who was in it; one that is missing for any other reason is brought back from the remote, or missed aloud:
what cannot be looked at is never taken for harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt, NotFound
from tasks.core.workspace import Workspace
from tasks.promotion.promote import Entries

if TYPE_CHECKING:
    import pyarrow as pa

ERASING, ERASED = "data.erasing", "data.erased"
FACTS = (
    "episode_id",
    "group_id",
    "prompt_sha256",
    "source",
    "licence",
    "behaviour_digest",
    "reward_digest",
)
_KEPT_TABLES = 4096  # shards whose facts stay in memory: some hundred bytes an episode


def keep_facts(workspace: Workspace, rows: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Keep the facts of rows that are about to be erased as evidence; return {path, sha256, rows}.

    Args:
        rows: {SHA-256 of the file that held them: their facts}.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty = pa.table({name: pa.array([], pa.string()) for name in (*FACTS, "shard")})
    parts = [
        table.select(FACTS).append_column("shard", pa.array([digest] * table.num_rows, pa.string()))
        for digest, table in sorted(rows.items())
    ]
    table = pa.concat_tables([empty, *parts])
    folder = workspace.evidence / "erased"
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".facts.tmp"  # one erasure at a time
    pq.write_table(table, aside, compression="zstd")
    digest = sha256_file(aside)
    path = aside.rename(folder / f"{digest}.parquet")
    return {"path": workspace.relative(path), "sha256": digest, "rows": table.num_rows}


class Shards:
    """The facts of shards: a table with the columns `FACTS`, erased rows included.

    Args:
        checked: hash every file that is read.
    """

    def __init__(self, ledger: Entries, workspace: Workspace, checked: bool = False) -> None:
        self._ledger, self._workspace, self._checked = ledger, workspace, checked
        self._erased: dict[str, Mapping[str, Any] | None] = {}  # digest: the facts that were kept of it
        self._new: dict[str, Mapping[str, Any] | None] = {}
        for entry in ledger.entries(ERASING):
            for file in entry.payload.get("files", ()):
                self._erased[file["sha256"]] = entry.payload.get("facts")
            for each in entry.payload["datasets"]:
                for pair in each["replaces"]:
                    self._erased[pair["old"]["sha256"]] = entry.payload.get("facts")
                    self._new[pair["old"]["sha256"]] = pair.get("new")

    def erased(self, sha256: str) -> bool:
        """Tell whether these bytes were erased on purpose, or are about to be."""
        return sha256 in self._erased

    def with_heirs(self, digests: Iterable[str]) -> set[str]:
        """Return these shards and all that took their place."""
        found, wanted = set(), set(digests)
        while wanted:
            found |= wanted
            heirs = (self._new.get(digest) for digest in wanted)
            wanted = {heir["sha256"] for heir in heirs if heir} - found
        return found

    def facts(self, shard: Mapping[str, Any]) -> pa.Table:
        """Return the facts of all rows that a shard was sealed with (`path` and `sha256` name it).

        Raises:
            NotFound, Unavailable: it is missing, was not erased, and cannot be brought back. Corrupt: it was changed.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        digest = shard["sha256"]
        if digest not in self._erased:
            return self.rows(shard)
        parts = [pa.table({name: pa.array([], pa.string()) for name in FACTS})]
        kept, heir = self._erased[digest], self._new.get(digest)
        if kept:
            table = _kept(self._workspace.root / kept["path"], kept["sha256"])
            parts.append(table.filter(pc.equal(table["shard"], digest)).select(FACTS))
        if heir:
            parts.append(self.facts(heir))
        return pa.concat_tables(parts)

    def rows(self, shard: Mapping[str, Any]) -> pa.Table:
        """Return the facts of the rows that the file of a shard holds now: none where it was erased.

        Raises:
            NotFound, Unavailable, Corrupt: as `facts`.
        """
        import pyarrow as pa

        path, digest = self._workspace.root / shard["path"], shard["sha256"]
        if not path.exists():
            if digest in self._erased:
                return pa.table({name: pa.array([], pa.string()) for name in FACTS})
            self._bring_back(shard)
        if self._checked and (now := sha256_file(path)) != digest:
            raise Corrupt(
                f"Shard {shard['path']} is corrupt: its SHA-256 is {now}, recorded is {digest}; restore it from the remote."
            )
        return _read(path, digest)

    def _bring_back(self, shard: Mapping[str, Any]) -> None:
        from tasks.replay import dvc_store
        from tasks.replay.seal import locked
        from tasks.replay.shards import folder_of

        path = self._workspace.root / shard["path"]
        for entry in reversed(self._ledger.entries("dataset.sealed")):
            if any(each["sha256"] == shard["sha256"] for each in entry.payload["shards"]):
                name = entry.payload["name"]
                with locked(self._workspace, name):
                    if not path.exists():
                        dvc_store.pull(self._workspace, folder_of(self._workspace, name))
                break
        if not path.exists():
            raise NotFound(
                f"Shard {shard['path']} is missing and was not erased; restore it from a backup: who learnt from it cannot "
                "be told without it."
            )


@lru_cache(_KEPT_TABLES)
def _read(path: Path, sha256: str) -> pa.Table:
    # A shard is read whole and hashed elsewhere before it teaches anything; here it is only asked who is in it.
    return _parquet(path, list(FACTS))


@lru_cache(64)
def _kept(path: Path, sha256: str) -> pa.Table:
    if not path.exists():
        raise NotFound(f"{path}, which says what was erased, is gone; restore it from a backup.")
    if sha256_file(path) != sha256:
        raise Corrupt(f"{path} was changed: its bytes are not those of the digest {sha256[:12]}….")
    return _parquet(path, [*FACTS, "shard"])


def _parquet(path: Path, columns: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=columns)
        return table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))  # any may be null
    except (pa.ArrowInvalid, OSError) as error:
        raise Corrupt(
            f"Shard {path} cannot be read ({' '.join(str(error).split())}); run `forebay verify`."
        ) from None
