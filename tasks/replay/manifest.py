"""The identity of a dataset version: which shards it is made of, and the one digest that stands for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from tasks.core.digest import canonical_json, digest_json, merkle_root
from tasks.replay.schema import SCHEMA_VERSION


@dataclass(frozen=True)
class Shard:
    """One immutable Parquet file: path relative to the workspace, SHA-256 of its bytes, how much it holds."""

    path: str
    sha256: str
    rows: int
    groups: int
    bytes: int


@dataclass(frozen=True, order=True)
class Behaviour:
    """A policy that episodes were sampled from: registry version ("agent/1") and checkpoint digest."""

    version: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Version `version` of dataset `name`: the shards of all versions up to this one, oldest first.

    `root` is the identity of the rows: equal shards in equal order have equal roots, whatever the dataset is
    called. `created_at` is the time of the youngest episode, so that the same episodes give the same
    manifest.
    """

    schema_version: int
    name: str
    version: int
    root: str
    parent: str | None
    shards: tuple[Shard, ...]
    rows: int
    groups: int
    total_bytes: int
    new_rows: int
    behaviour: tuple[Behaviour, ...]
    created_at: str

    @property
    def subject(self) -> str:
        """How people and the ledger name this version: "main/v3"."""
        return f"{self.name}/v{self.version}"

    @classmethod
    def append(
        cls,
        name: str,
        parent: Manifest | None,
        new: Sequence[Shard],
        behaviour: Iterable[Behaviour],
        created_at: str,
    ) -> Self:
        """Return the version after `parent` that holds its shards and the `new` ones."""
        shards = (*parent.shards, *new) if parent else tuple(new)
        return cls(
            schema_version=SCHEMA_VERSION,
            name=name,
            version=parent.version + 1 if parent else 1,
            root=dataset_root(shards),
            parent=parent.root if parent else None,
            shards=shards,
            rows=sum(shard.rows for shard in shards),
            groups=sum(shard.groups for shard in shards),
            total_bytes=sum(shard.bytes for shard in shards),
            new_rows=sum(shard.rows for shard in new),
            behaviour=tuple(sorted({*(parent.behaviour if parent else ()), *behaviour})),
            created_at=max(created_at, parent.created_at) if parent else created_at,
        )

    @classmethod
    def rewrite(
        cls,
        parent: Manifest,
        replaced: Mapping[str, Shard | None],
        behaviour: Iterable[Behaviour],
    ) -> Self:
        """Return the version after `parent` in which shards have been replaced (by SHA-256; None: by nothing).

        Args:
            behaviour: the policies that the rows which are left were sampled from.
        """
        kept = (replaced.get(shard.sha256, shard) for shard in parent.shards)
        shards = tuple(shard for shard in kept if shard is not None)
        return cls(
            schema_version=SCHEMA_VERSION,
            name=parent.name,
            version=parent.version + 1,
            root=dataset_root(shards),
            parent=parent.root,
            shards=shards,
            rows=sum(shard.rows for shard in shards),
            groups=sum(shard.groups for shard in shards),
            total_bytes=sum(shard.bytes for shard in shards),
            new_rows=0,
            behaviour=tuple(sorted(set(behaviour))),
            created_at=parent.created_at,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a manifest from the values of a manifest file or ledger payload; other keys are ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        known["shards"] = tuple(Shard(**shard) for shard in values["shards"])
        known["behaviour"] = tuple(Behaviour(**behaviour) for behaviour in values["behaviour"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        return {**values, "shards": list(values["shards"]), "behaviour": list(values["behaviour"])}

    def to_bytes(self) -> bytes:
        """Return the bytes of the manifest file."""
        return canonical_json(self.to_dict()) + b"\n"


def dataset_root(shards: Sequence[Shard]) -> str:
    """Return the identity of a dataset version: the schema version and the Merkle root over its shard
    digests.
    """
    return digest_json(
        {"schema_version": SCHEMA_VERSION, "merkle_root": merkle_root([s.sha256 for s in shards])}
    )
