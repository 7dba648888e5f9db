"""Methods that make one answer of several, on questions small enough to follow by hand."""

from __future__ import annotations

import pytest

from tasks.arena.best_of import Sample
from tasks.core.errors import UsageError
from tasks.evaluation.selection import CONS, RANDOM, compare

# Of four samples two are right; the right ones have the better score and are shorter. Two of three say "b" once in each.
QUESTION = [("a", 4, 0.9, 1.0), ("b", 10, 0.1, 0.0), ("b", 12, 0.2, 0.0), ("a", 6, 0.8, 1.0)]


def question(turned: bool = False) -> list[Sample]:
    """The samples; `turned`: with scores that promise the wrong ones."""
    return [
        Sample(answer, tokens, -score if turned else score, reward)
        for answer, tokens, score, reward in QUESTION
    ]


def test_each_method_on_a_question_by_hand():
    rows = {
        row.method: row
        for row in compare(
            {"good": [question()] * 3, "bad": [question(True)] * 3}, eta=0.5, prefix=3, alpha=0.025
        )
    }
    assert (rows["good"].accuracy.estimate, rows["good"].tokens) == (1.0, 4 + 6 + 3 + 3)
    assert (rows["bad"].accuracy.estimate, rows["bad"].tokens) == (0.0, 10 + 12 + 3 + 3)
    assert (rows[CONS].accuracy.estimate, rows[CONS].tokens) == (
        1.0,
        32,
    )  # two against two: the first voter's
    assert (rows["Cons@n/2"].accuracy.estimate, rows["Cons@n/2"].tokens) == (1.0, 14)
    assert (rows["Mean@n"].accuracy.estimate, rows["Mean@n"].tokens) == (0.5, 32)
    assert rows["Long@n"].accuracy.estimate == 0.0
    assert (rows["Short@n"].accuracy.estimate, rows["Short@n"].tokens) == (1.0, 4 + 6 + 6 + 6)
    assert rows[RANDOM].tokens <= rows["good"].tokens
    assert 0.3 < rows[RANDOM].accuracy.estimate < 0.8  # of one to three draws of four, about half are right
    assert rows["bad"].less_cons is not None
    assert rows["bad"].less_cons.estimate == -1.0
    assert rows[CONS].less_cons is None
    assert rows[RANDOM].less_random is None
    assert rows["good"].less_random is not None
    assert rows["good"].less_random.estimate == pytest.approx(1 - rows[RANDOM].accuracy.estimate)


def test_one_sample_a_question_is_what_every_method_gives():
    rows = compare(
        {"one": [[Sample("a", 5, 0.3, 1.0)], [Sample(None, 7, 0.3, 0.0)]]}, eta=0.5, prefix=3, alpha=0.025
    )
    assert {row.accuracy.estimate for row in rows} == {0.5}
    assert {row.tokens for row in rows} == {6.0}


@pytest.mark.parametrize(
    ("questions", "eta", "says"),
    [({}, 0.5, "there are none"), ({"a": []}, 0.5, "there are none"), ({"a": [question()]}, 0.0, "fraction")],
)
def test_what_cannot_be_compared_is_said(questions, eta, says):
    with pytest.raises(UsageError, match=says):
        compare(questions, eta=eta, prefix=3, alpha=0.025)
