"""The exercise from end to end, on a small model that has learnt the form of the answers."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.think_at_n import Question, judged, main, worked
from tests.tiny import make_tiny_model, teach


def test_the_worked_answer_is_right():
    asked, written, answer = worked([42, 20, 51])
    assert asked + written == "largest of 42, 20, 51: 42 beats 20, 51 beats 42, so 51\n"
    assert judged([1], written, Question([1], answer), ended=True).right
    assert judged([1], written, Question([1], "42"), ended=True).answer == "51"


@pytest.mark.parametrize(
    ("text", "ended"), [(" 42 beats 20\n", True), (" so 51 beats\n", True), (" 42, so 5", False)]
)
def test_what_has_no_last_number_or_no_end_has_no_answer(text, ended):
    response = judged([1], text, Question([1], "5"), ended)
    assert (response.answer, response.right) == (None, False)


def test_the_whole_exercise_runs(tmp_path, capsys):
    draw = random.Random(0)
    lines = ["".join(worked(draw.sample(range(10, 100), 3))[:2]) for _ in range(64)]
    base = teach(make_tiny_model(tmp_path / "base"), lines, steps=60)
    size = ["--questions", "3", "--dev", "1", "--samples", "4", "--control", "1", "--prefix", "8"]
    main(["--base-model", str(base), *size, "--json"])
    found = json.loads(capsys.readouterr().out)
    methods = {row["method"]: row for row in found["methods"]}
    whole = methods["Cons@n"]["tokens"]
    assert whole == pytest.approx(4 * found["mean_tokens"])
    assert methods["Think@n (DTR)"]["tokens"] < whole
    assert methods["random, Think@n's tokens"]["tokens"] <= methods["Think@n (DTR)"]["tokens"] + 0.5
    assert {"DTR", "DTR, prefix", "length", "random", "self_certainty, prefix"} <= {
        row["score"] for row in found["scores"]
    }
    assert len(found["development"]["divergence_by_layer"]) == 2
