"""The same loss and the same gradient of every parameter as TRL's own trainer, on one replayed batch.

TRL's side is `GRPOTrainer.compute_loss` on its padded tensors; ours is the whole path: `pack` into rows of a
few shared prefixes, `packed_logprobs`, objective, aggregation over micro-batches.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import objectives
from models.objectives import Batch, Counts
from models.packing import Sample, pack, packed_logprobs
from tests.tiny import make_tiny_model

trl = pytest.importorskip("trl", reason="the peer of this comparison is not installed")

LONGEST = 8
DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,  # what it says of the engine's log-probabilities matters here, nothing else
}


def _plain(name, **options):
    return lambda batch: objectives.get(name).loss(batch, **options)


def _kl(estimator):
    return lambda batch: objectives.penalised(
        objectives.grpo(batch), batch, kl_coefficient=0.3, estimator=estimator
    )


def _unbiased_kl(batch):
    """TRL supposes that the proximal policy wrote the tokens."""
    return _kl("k3-unbiased")(replace(batch, behaviour_logprobs=batch.old_logprobs))


def _folded(batch):
    return objectives.corrected(objectives.get("vespo_trl"), batch, "token-tis", high=1.2)


def _corrected(weight, **bounds):
    return lambda batch: objectives.corrected(objectives.get("grpo"), batch, weight, **bounds)


def _masked(batch):
    return objectives.scaled(objectives.grpo(batch), batch, objectives.sequence_mask(batch, 0.05))


CASES = {  # attributes of TRL's trainer; our losses; our aggregation
    "grpo": ({}, _plain("grpo"), "seq-mean-token-mean"),
    "bnpo": ({"loss_type": "bnpo"}, _plain("grpo"), "token-mean"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, _plain("dr_grpo"), "constant"),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, _plain("dapo"), "token-mean"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.1}, _plain("cispo_trl", cap=1.1), "token-mean"),
    "sapo": ({"loss_type": "sapo"}, _plain("sapo"), "seq-mean-token-mean"),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06},
        _plain("gspo", eps_lo=0.05, eps_hi=0.06),
        "seq-mean-token-mean",
    ),
    "vespo": ({"loss_type": "vespo"}, _plain("vespo_trl"), "token-mean"),
    "vespo, corrected": ({"loss_type": "vespo"}, _folded, "token-mean"),
    "token tis": ({"use_vllm": True}, _corrected("token-tis", high=1.2), "seq-mean-token-mean"),
    "token mis": ({"use_vllm": True}, _corrected("token-mis", low=0.8, high=1.2), "seq-mean-token-mean"),
    "kl": ({"beta": 0.3}, _kl("k3"), "seq-mean-token-mean"),
    "unbiased kl": ({"beta": 0.3}, _unbiased_kl, "seq-mean-token-mean"),
    "sequence mask": ({"off_policy_mask_threshold": 0.05}, _masked, "seq-mean-token-mean"),
}


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """Model, TRL's trainer around it, samples of two prompts, log-probabilities of the other policies, advantages."""
    path = make_tiny_model(tmp_path_factory.mktemp("model"), seed=3)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (n,), generator=g).tolist() for n in (5, 3)]
    lengths = (8, 3, 6, 1, 7, 5)
    samples = [
        Sample(
            prompts[i // 3],
            torch.randint(3, 90, (n,), generator=g).tolist(),
            [t != 2 for t in range(n)],  # the third token is a tool's
        )
        for i, n in enumerate(lengths)
    ]
    tokens = sum(sum(s.trained) for s in samples)
    with torch.no_grad():
        (row,) = pack(samples, 10_000)
        exact = torch.empty(tokens)
        exact[row.index] = packed_logprobs(model, row)[0]
    noise = 0.25 * torch.randn(3, tokens, generator=g)
    logprobs = dict(
        zip(("old_logprobs", "behaviour_logprobs", "reference_logprobs"), exact + noise, strict=True)
    )
    advantages = torch.tensor([1.0, -0.5, 0.7, -1.2, 0.4, -0.9])
    return model, _trainer(model, path, tmp_path_factory.mktemp("trl")), samples, logprobs, advantages


def _trainer(model, path, out):
    from datasets import Dataset

    args = trl.GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=LONGEST,
        beta=0.0,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 6}),
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    trainer.model.eval()  # no accumulation over steps: TRL divides by one batch
    return trainer


def _padded(rows, *, left=False, filler=0):
    width = max(map(len, rows))
    pads = [[filler] * (width - len(row)) for row in rows]
    return torch.tensor(
        [pad + list(row) if left else list(row) + pad for row, pad in zip(rows, pads, strict=True)]
    )


def _theirs(replay, case, attributes):
    model, trainer, samples, logprobs, advantages = replay

    def rows(values, filler):
        left = iter(values.tolist())
        return _padded([[next(left) if t else filler for t in s.trained] for s in samples], filler=filler)

    tokens = len(logprobs["old_logprobs"])
    weights = (logprobs["old_logprobs"] - logprobs["behaviour_logprobs"]).exp()
    weights = (
        weights * ((weights >= 0.8) & (weights <= 1.2)) if case == "token mis" else weights.clamp(max=1.2)
    )
    inputs = {
        "prompt_ids": _padded([s.prompt_ids for s in samples], left=True),
        "prompt_mask": _padded([[1] * len(s.prompt_ids) for s in samples], left=True),
        "completion_ids": _padded([s.response_ids for s in samples]),
        "completion_mask": _padded([[1] * len(s.response_ids) for s in samples]),
        "tool_mask": rows(torch.ones(tokens), 0).long(),
        "advantages": advantages,
        "old_per_token_logps": rows(logprobs["old_logprobs"], 0.0),
        "sampling_per_token_logps": rows(logprobs["behaviour_logprobs"], 0.0),
        "ref_per_token_logps": rows(logprobs["reference_logprobs"], 0.0),
        "num_items_in_batch": torch.tensor(float(tokens)),
    }
    if case in ("vespo, corrected", "token tis", "token mis"):
        inputs["importance_sampling_ratio"] = rows(weights, 1.0)
    for name, value in (DEFAULTS | attributes).items():
        setattr(trainer, name, value)
    trainer.args.use_bias_correction_kl = case == "unbiased kl"
    model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters()]


def _ours(replay, losses_of, how):
    model, _, samples, logprobs, advantages = replay
    whole = Counts(len(logprobs["old_logprobs"]), len(samples))
    model.zero_grad()
    total = 0.0
    rows = pack(samples, 16)
    assert len(rows) > 1
    for row in rows:
        batch = Batch(
            packed_logprobs(model, row)[0],
            advantages[list(row.samples)][row.sequence],
            row.sequence,
            row.sequences,
            **{name: values[row.index] for name, values in logprobs.items()},
        )
        loss = objectives.aggregate(losses_of(batch), batch, how, whole, constant=LONGEST)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_trl(replay, case):
    attributes, losses_of, how = CASES[case]
    their_loss, their_gradients = _theirs(replay, case, attributes)
    our_loss, our_gradients = _ours(replay, losses_of, how)
    assert our_loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
    assert max(float(g.abs().max()) for g in their_gradients) > 1e-2
    for ours, theirs in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_cases_differ(replay):
    """Else a term that neither side applies would look like agreement."""
    losses = [_theirs(replay, case, CASES[case][0])[0] for case in CASES]
    assert len({round(loss, 5) for loss in losses}) == len(CASES)
