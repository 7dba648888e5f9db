"""Identity: SHA-256 of content, canonical JSON, Merkle roots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the bytes of the file at `path`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Encode `value` so that equal values give equal bytes.

    Keys are sorted, separators are compact, text is UTF-8; NaN and infinity raise ValueError because
    JSON has no spelling for them and a digest must be reproducible by other programs.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`."""
    return sha256_bytes(canonical_json(value))


def merkle_root(leaves: Sequence[str]) -> str:
    """Return the Merkle root over hexadecimal leaf digests, in the given order.

    Leaves and inner nodes are hashed with different prefixes (RFC 6962, section 2.1), so that an inner
    node cannot pass for a leaf; an odd node is promoted unchanged.
    """
    level = [hashlib.sha256(b"\x00" + bytes.fromhex(leaf)).digest() for leaf in leaves]
    if not level:
        return sha256_bytes(b"")
    while len(level) > 1:
        pairs = [
            hashlib.sha256(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)
        ]
        level = pairs + level[len(pairs) * 2 :]
    return level[0].hex()


def digest_tree(root: Path, ignore: Iterable[str] = ()) -> dict[str, str]:
    """Return {relative POSIX path: SHA-256} of every regular file under `root`, sorted by path."""
    skipped = set(ignore)
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    named = ((p.relative_to(root).as_posix(), p) for p in paths)
    return {name: sha256_file(path) for name, path in named if name not in skipped}


def digest_files(files: Mapping[str, str]) -> str:
    """Return the one digest that stands for a tree of files {relative path: SHA-256}."""
    return digest_json(dict(files))
