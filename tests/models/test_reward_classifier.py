"""The loss by hand and by autograd in float64, packing of windows, batches, and what two kinds of base give."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from models.causal_lm import ModelError
from models.reward_classifier import (
    Encoded,
    Fit,
    _update,
    batches,
    bradley_terry,
    encode,
    fine_tune,
    load_base,
    load_scorer,
    score_rows,
)
from tests.tiny import make_tiny_model, make_tiny_tokenizer

FIT = Fit(epochs=2, learning_rate=3e-3, warmup=0.1, weight_decay=0.0, batch_pairs=8)


def make_tiny_encoder(path, labels=None):
    """A random BERT of two layers with a character tokenizer; `labels` gives it a score head."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.cls_token, tokenizer.sep_token = "<|im_start|>", "<|im_end|>"
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128, pad_token_id=0, num_labels=labels or 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (BertForSequenceClassification if labels else BertModel)(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def test_the_loss_and_its_gradient_by_hand():
    # margins log 3 and -log 3: the pairs are right with probability 3/4 and 1/4
    chosen = torch.tensor([math.log(3), 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, math.log(3)], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry(chosen, rejected)
    assert loss.tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 4)], abs=1e-15)
    loss.mean().backward()
    assert chosen.grad.tolist() == pytest.approx([-1 / 8, -3 / 8], abs=1e-15)
    assert rejected.grad.tolist() == pytest.approx([1 / 8, 3 / 8], abs=1e-15)


def test_the_loss_is_right_where_the_naive_one_overflows():
    far = torch.tensor([800.0, -800.0], dtype=torch.float64)
    assert bradley_terry(far, torch.zeros(2, dtype=torch.float64)).tolist() == pytest.approx([0.0, 800.0])
    assert torch.autograd.gradcheck(
        bradley_terry, [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    )


def test_windows_keep_the_ends_and_a_quarter_for_the_prompt():
    tokenizer = make_tiny_tokenizer()
    tokenizer.cls_token, tokenizer.sep_token = "<|im_start|>", "<|im_end|>"

    def shown(prompt, answer, width):
        (row,) = encode(tokenizer, [(prompt, answer)], width)
        assert len(row.ids) <= width
        head = tokenizer.decode(row.ids[1 : row.start - 1])
        return head, tokenizer.decode(row.ids[row.start : row.end])

    assert shown("abc", "xyz", 64) == ("abc", "xyz")
    assert shown("abcdefghij", "xy", 11) == ("efghij", "xy")  # the prompt loses its front
    assert shown("abcdefghij", "0123456789", 11) == ("ij", "456789")  # 8 tokens: 2 for the prompt, 6
    assert shown("a", "0123456789", 11) == ("a", "3456789")  # a short prompt leaves its room
    assert shown("abc", "", 64)[1] == "<|im_end|>"
    with pytest.raises(ValueError, match="window"):
        encode(tokenizer, [("a", "b")], 4)


def test_a_plain_model_gets_prompt_and_answer_and_never_nothing():
    rows = encode(make_tiny_tokenizer(), [("ab", "c"), ("", ""), ("ab", "")], 32)
    assert [(len(row.ids), row.start, row.end) for row in rows] == [(3, 2, 3), (2, 1, 2), (3, 2, 3)]


def test_every_pair_once_in_batches_of_like_length_with_groups_together():
    groups = [f"g{i // 4}" for i in range(400)]
    widths = [10 + (i // 4) % 50 for i in range(400)]
    order = torch.Generator().manual_seed(0)
    found = list(batches(groups, widths, 16, order))
    assert sorted(i for batch in found for i in batch) == list(range(400))
    assert {len(batch) for batch in found} == {16}
    assert all(len({groups[i] for i in batch}) == 4 for batch in found)
    spread = [max(widths[i] for i in b) - min(widths[i] for i in b) for b in found]
    assert sum(spread) / len(spread) < 10  # 25 or more without buckets
    assert found != list(batches(groups, widths, 16, order))  # the next epoch has another order
    assert found == list(batches(groups, widths, 16, torch.Generator().manual_seed(0)))


def test_scores_do_not_depend_on_batches_and_features_are_the_mean_over_the_answer(encoder):
    scorer = load_base(str(encoder), seed=1).eval()
    texts = [("what is it", "a" * n) for n in (1, 7, 30, 2)] + [("", "b")]
    rows = scorer.encode(texts, 128)
    told = []
    scores, features = score_rows(
        scorer, rows, token_budget=50, report=lambda done, n: told.append((done, n))
    )
    assert told[-1] == (5, 5)
    alone = [score_rows(scorer, [row]) for row in rows]
    torch.testing.assert_close(scores, torch.cat([s for s, _ in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(features, torch.cat([f for _, f in alone]), rtol=0, atol=1e-5)
    row = rows[1]
    kinds = torch.tensor([[0] * row.start + [1] * (len(row.ids) - row.start)])
    model = BertModel.from_pretrained(encoder).double().eval()
    with torch.inference_mode():
        states = model(torch.tensor([row.ids]), token_type_ids=kinds).last_hidden_state[0]
    mean = states[row.start : row.end].mean(0)
    torch.testing.assert_close(features[1], mean, rtol=0, atol=1e-5)
    expected = mean @ scorer.head.weight[0].double()
    torch.testing.assert_close(scores[1], expected, rtol=0, atol=1e-5)


def pairs_of(scorer, groups=40):
    """Answers with a `y` are better; prompts differ."""
    pairs, names = [], []
    for g in range(groups):
        for tail in ("y ab", "y ba"):
            good, bad = scorer.encode([(f"{g}:", tail), (f"{g}:", tail.replace("y", "x"))], 64)
            pairs.append((good, bad))
            names.append(f"g{g}")
    return pairs, names


def tuned(path, seed=0, **changes):
    scorer = load_base(str(path), seed=seed)
    pairs, names = pairs_of(scorer)
    fit = Fit(**{**{name: getattr(FIT, name) for name in FIT.__slots__}, **changes})
    scale = fine_tune(scorer, pairs[:60], names[:60], pairs[60:], fit, seed=seed)
    return scorer, scale, pairs[60:]


def test_it_learns_and_the_same_seed_gives_the_same_bits(encoder):
    (first, scale, held), (second, again, _) = tuned(encoder), tuned(encoder)
    assert scale == again
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    scores, _ = score_rows(first, [row for pair in held for row in pair])
    assert (scores[::2] > scores[1::2]).all()
    assert not torch.equal(tuned(encoder, seed=1)[0].head.weight, first.head.weight)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(encoder):
    found = []
    for budget in (10_000, 40):
        scorer = load_base(str(encoder), seed=0).eval()
        pairs, _ = pairs_of(scorer, 4)
        optimizer = torch.optim.SGD(scorer.parameters(), lr=0.0)
        loss = _update(scorer, optimizer, pairs, budget)
        found.append((loss, [p.grad.clone() for p in scorer.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_a_float64_reference(encoder):
    scorer = load_base(str(encoder), seed=0).eval()
    pairs, _ = pairs_of(scorer, 3)
    scores, _ = scorer([row for pair in pairs for row in pair])
    bradley_terry(scores[::2], scores[1::2]).mean().backward()
    reference = load_base(str(encoder), seed=0).double().eval()
    total = torch.zeros((), dtype=torch.float64)
    for good, bad in pairs:  # one by one, without padding
        margin = reference([good])[0] - reference([bad])[0]
        total = total + torch.log1p(torch.exp(-margin)).sum()
    (total / len(pairs)).backward()
    torch.testing.assert_close(
        scorer.head.weight.grad.double(), reference.head.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_training_ends_when_the_calibration_pairs_gain_nothing(encoder):
    scorer = load_base(str(encoder), seed=0)
    pairs, names = pairs_of(scorer)
    against = [(bad, good) for good, bad in pairs[60:]]  # the better it learns, the worse for these
    told = []
    fit = Fit(epochs=6, learning_rate=3e-3, warmup=0.1, weight_decay=0.0, batch_pairs=8)
    scale = fine_tune(scorer, pairs[:60], names[:60], against, fit, seed=0, report=lambda *t: told.append(t))
    assert told[-1][0] < told[-1][1]
    assert 0 < scale < 0.1  # margins that mislead are worth nothing


def test_a_model_with_a_head_keeps_it_and_another_number_of_labels_is_replaced(tmp_path):
    one, three = make_tiny_encoder(tmp_path / "one", 1), make_tiny_encoder(tmp_path / "three", 3)
    kept = load_base(str(one), seed=5)
    assert kept.head is None
    assert torch.equal(
        kept.model.classifier.weight, load_file(one / "model.safetensors")["classifier.weight"]
    )
    drawn = [load_base(str(three), seed=seed).model.classifier.weight for seed in (1, 1, 2)]
    assert drawn[0].shape == (1, 32)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", ["encoder", "classifier", "decoder"])
def test_what_is_saved_scores_the_same(tmp_path, kind):
    if kind == "decoder":
        base = make_tiny_model(tmp_path / "base")
    else:
        base = make_tiny_encoder(tmp_path / "base", 1 if kind == "classifier" else None)
    scorer = load_base(str(base), seed=3).eval()
    rows = scorer.encode([("a?", "b"), ("longer prompt?", "longer answer")], 64)
    (tmp_path / "saved").mkdir()
    scorer.save(tmp_path / "saved")
    again = load_scorer(tmp_path / "saved")
    assert torch.equal(score_rows(scorer, rows)[0], score_rows(again, rows)[0])
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}


@pytest.mark.parametrize("name", ["pypi:no-such-thing", "/no/such/folder"])
def test_a_missing_base_is_one_sentence(name):
    with pytest.raises(ModelError):
        load_base(name, seed=0)


def test_pickled_weights_are_not_read(tmp_path):
    base = make_tiny_encoder(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_base(str(base), seed=0)


def test_no_pairs_and_a_diverging_loss_are_named(encoder):
    scorer = load_base(str(encoder), seed=0)
    with pytest.raises(ValueError, match="needs pairs"):
        fine_tune(scorer, [], [], [], FIT, seed=0)
    with torch.no_grad():
        scorer.head.weight.fill_(float("nan"))
    row = Encoded((1, 5, 2, 6, 2), 3, 4)
    with pytest.raises(ValueError, match="not a number"):
        fine_tune(scorer, [(row, row)], ["g"], [], FIT, seed=0)
