import errno
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.atomic import write_atomic, write_file_atomic
from tasks.core.digest import canonical_json, digest_tree, merkle_root, sha256_file
from tasks.core.errors import Unavailable

HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)


def reference_root(leaves: list[str]) -> bytes:
    """RFC 6962 section 2.1 by its recursive definition: split at the largest power of two below n."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + bytes.fromhex(leaves[0])).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + reference_root(leaves[:k]) + reference_root(leaves[k:])).digest()


@given(st.lists(HEX, min_size=1, max_size=33))
def test_merkle_root_equals_the_recursive_definition(leaves):
    assert merkle_root(leaves) == reference_root(leaves).hex()


@given(st.lists(HEX, min_size=2, max_size=9, unique=True), st.randoms())
def test_merkle_root_depends_on_order_and_every_leaf(leaves, random):
    other = leaves[:]
    index = random.randrange(len(leaves))
    other[index] = hashlib.sha256(bytes.fromhex(leaves[index])).hexdigest()
    assert merkle_root(other) != merkle_root(leaves)
    assert merkle_root(leaves[::-1]) != merkle_root(leaves)
    assert merkle_root(leaves[:-1]) != merkle_root(leaves)


def test_canonical_json_is_order_free_and_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.5, "ü"]}) == '{"a":[1.5,"ü"],"b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})


def test_write_atomic_leaves_the_old_bytes_when_the_disk_is_full(tmp_path: Path):
    target = tmp_path / "f"
    write_atomic(target, b"old")

    def fail(aside: Path) -> None:
        aside.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Unavailable, match="is full"):
        write_file_atomic(target, fail)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_digest_tree_names_every_file(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "y").write_bytes(b"2")
    tree = digest_tree(tmp_path)
    assert tree == {"a/x": hashlib.sha256(b"1").hexdigest(), "y": sha256_file(tmp_path / "y")}
