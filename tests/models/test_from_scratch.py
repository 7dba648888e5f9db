"""Small policies without pretraining: what their tokenizer keeps, and that they are made again byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.causal_lm import ModelError, load_policy, load_tokenizer
from models.from_scratch import Shape, make_policy, make_tokenizer
from tasks.core.digest import digest_tree

TEXTS = ["move: left\nmove: down\n###\n#@#\n", "Guess the number from 17 to 42.\nguess: 29\n"] * 20
SMALL = Shape(hidden=16, layers=1, heads=2, vocabulary=300, positions=256)
TOKENIZER = make_tokenizer(TEXTS, 300)


def pieces(text: str) -> list[str]:
    return TOKENIZER.batch_decode([[i] for i in TOKENIZER(text, add_special_tokens=False)["input_ids"]])


def test_words_grow_together_and_boards_and_digits_do_not():
    assert pieces("move: left\n") == ["move", ":", " left", "\n"]
    assert pieces("###\n29") == ["#", "#", "#", "\n", "2", "9"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_round_trips(text: str):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    one, two, other = (
        make_policy(tmp_path / name, TEXTS, SMALL, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert digest_tree(one) == digest_tree(two)
    changed = {name for name, _ in digest_tree(one).items() ^ digest_tree(other).items()}
    assert changed == {"model.safetensors"}
    assert load_policy(one).config.vocab_size == len(load_tokenizer(one))


def test_shapes_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ModelError, match="257 tokens, not 256"):
        make_tokenizer(TEXTS, 256)
    with pytest.raises(ModelError, match="multiple of 12"):
        make_policy(tmp_path / "x", TEXTS, Shape(hidden=64, heads=6), 0)
