"""Sets are named by their bytes, and no group is ever on both sides of a split, whatever set it comes in."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.errors import Corrupt, NotFound
from tasks.reward.preferences import (
    distinct,
    prompt_digests,
    read_preferences,
    set_digest,
    split_preferences,
    write_preferences,
)
from tasks.reward.source import Preference


def preference(group: str, prompt: str = "", chosen: str = "good", rejected: str = "bad") -> Preference:
    return Preference(prompt or f"prompt of {group}", chosen, rejected, group, "s", "test", "MIT")


def test_a_set_is_named_by_its_bytes_and_read_back_only_unchanged(tmp_path):
    odd = "line\u2028separator \x85 \x00 \ud7ff é 𝄞\r\n"
    found = distinct([preference("b"), preference("a", chosen=odd), preference("c", prompt=odd)]).preferences
    path, digest = write_preferences(tmp_path, found)
    assert path.name == f"{digest}.jsonl"
    assert sha256_file(path) == digest == set_digest(found)
    assert read_preferences(path, digest) == list(found)
    assert distinct(reversed(found)).preferences == found  # the order of records does not matter
    path.write_bytes(path.read_bytes().replace(b"good", b"evil"))
    with pytest.raises(Corrupt, match="was changed"):
        read_preferences(path, digest)
    path.unlink()
    with pytest.raises(NotFound, match="import them again"):
        read_preferences(path, digest)


@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_no_group_on_both_sides(seed, holdout):
    draw = random.Random(seed)
    found = [preference(f"g{draw.randrange(40)}", rejected=str(i)) for i in range(120)]
    split = split_preferences(found, holdout=holdout)
    assert not {p.group for p in split.train} & {p.group for p in split.heldout}
    assert sorted(map(repr, [*split.train, *split.heldout])) == sorted(map(repr, found))
    # Another set with some of the same groups puts them on the same sides; a larger share holds out more.
    other = split_preferences([replace(p, chosen="other") for p in found[:50]], holdout=holdout)
    assert {p.group for p in other.heldout} <= {p.group for p in split.heldout}
    more = split_preferences(found, holdout=min(0.95, holdout + 0.05))
    assert set(split.heldout) <= set(more.heldout)


def test_the_share_is_about_what_was_asked_for():
    split = split_preferences([preference(f"g{i}") for i in range(4000)], holdout=0.3)
    assert len(split.heldout) == pytest.approx(1200, abs=4 * (4000 * 0.3 * 0.7) ** 0.5)


def test_prompts_are_told_by_digest():
    found = [preference("a"), preference("a", rejected="worse"), preference("b")]
    assert prompt_digests(found) == sorted(sha256_bytes(text) for text in (b"prompt of a", b"prompt of b"))
