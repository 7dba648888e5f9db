from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from models import adapters, objectives
from models.packing import Sample, packed_logprobs
from models.turn_samples import turn_samples
from tasks.training import fields, parallel
from tasks.training.parallel import Scorer, World
from tasks.training.settings import Correction, DeepThinkingReward, Diversity, Penalties, TrainingSettings
from tasks.training.shards import Episodes, Passes
from tasks.training.update import Update, accumulate_gradients, needs
from tests.training import processes

ALONE = World(torch.device("cpu"))
EPISODES = replace(processes.episodes(), lags=tuple(range(12)))
LOOSE = TrainingSettings(grad_clip=1e9, token_budget=10_000)


def _policy(noise: float = 0.0) -> Scorer:
    """GPT-2, because Llama's norms compute in float32 even where the weights are float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        size = {"vocab_size": 99, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.2)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
    return parallel.split(model, ALONE)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return _policy()


@pytest.fixture(scope="module")
def near() -> Tensor:
    """Log-probabilities [N] of a policy not far from the one in training."""
    return parallel.score(_policy(0.01), EPISODES.samples, 10_000, None, ALONE)[0]


def _learn(
    scorer: Scorer, settings: TrainingSettings, episodes: Episodes = EPISODES, **known: Tensor
) -> Update:
    return accumulate_gradients(scorer, episodes, settings, None, ALONE, **known)


def _gradient(scorer: Scorer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


def _alone(scorer: Scorer, episodes: Episodes = EPISODES) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of the trained tokens of each sample, each by a forward pass of its own."""
    logprobs, entropies = [], []
    for sample in episodes.samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        logs = scorer.model(input_ids=ids).logits[0].log_softmax(-1)
        places = torch.tensor([len(sample.prompt_ids) + n for n, t in enumerate(sample.trained) if t])
        logprobs.append(logs[places - 1, ids[0, places]])
        entropies.append(-(logs[places - 1].exp() * logs[places - 1]).sum(-1))
    return logprobs, entropies


def _per_sample(values: Tensor, episodes: Episodes = EPISODES) -> list[Tensor]:
    return list(values.split([sum(sample.trained) for sample in episodes.samples]))


def _advantages(episodes: Episodes = EPISODES) -> list[float]:
    """`group_norm` by hand."""
    found = []
    for group, reward in zip(episodes.groups, episodes.rewards, strict=True):
        rewards = torch.tensor(
            [r for g, r in zip(episodes.groups, episodes.rewards, strict=True) if g == group],
            dtype=torch.float64,
        )
        found.append(float((reward - rewards.mean()) / (rewards.std() + 1e-6)))
    return found


def _check(scorer: Scorer, update: Update, loss: Tensor) -> None:
    """Loss, norm and gradient of the update are those of `loss`, to rounding in float64."""
    got = _gradient(scorer)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(scorer.parameters()))])
    assert (got - want).norm() <= 1e-10 * want.norm()
    assert want.norm() > 1e-6
    assert update.metrics["loss"] == pytest.approx(loss.item(), rel=1e-10, abs=1e-12)
    assert update.metrics["grad_norm"] == pytest.approx(float(want.norm()), rel=1e-10)


def test_the_gradient_is_that_of_the_formula(scorer):
    """reinforce over a batch, each sample run alone."""
    update = _learn(scorer, LOOSE.model_copy(update={"objective": "reinforce"}))
    logprobs, entropies = _alone(scorer)
    loss = -sum(a * logs.sum() for a, logs in zip(_advantages(), logprobs, strict=True)) / sum(
        map(len, logprobs)
    )
    _check(scorer, update, loss)
    assert update.metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-9)


@pytest.mark.parametrize("budget", [1, 30])
@pytest.mark.parametrize("objective", objectives.names())
def test_rows_add_up_to_the_whole(scorer, near, objective, budget):
    settings = LOOSE.model_copy(
        update={
            "objective": objective,
            "aggregation": "seq-mean-token-mean" if budget == 1 else "constant",
            "unit": "turn" if budget == 1 else "trajectory",
            "penalties": Penalties(kl=0.1, entropy=0.01),
            "diversity": Diversity(entropy=0.05),
        }
    )
    known = {"old_logprobs": near, "reference_logprobs": near + 0.1, "diversity": torch.rand(12).double()}
    whole = _learn(scorer, settings, **known)
    want = _gradient(scorer)
    parts = _learn(scorer, settings.model_copy(update={"token_budget": budget}), **known)
    assert (_gradient(scorer) - want).norm() <= 1e-10 * want.norm()
    assert want.norm() > 1e-6
    assert parts.metrics.pop("tokens_packed") > whole.metrics.pop("tokens_packed")
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-9, abs=1e-9)
    for number, group in whole.groups.items():
        assert asdict(parts.groups[number]) == pytest.approx(asdict(group), rel=1e-9)


def test_every_term_by_hand(scorer, near):
    """GRPO around the proximal policy, sequence-tis, k3 to the reference, entropy, DSDR, by turns."""
    diversity = torch.linspace(0, 1, 12, dtype=torch.float64)
    reference = near + 0.2
    settings = LOOSE.model_copy(
        update={
            "objective": "grpo",
            "options": {"eps_hi": 0.3},
            "aggregation": "seq-mean-token-sum",
            "unit": "turn",
            "correction": Correction(weight="sequence-tis", high=1.5, sequence_mask=0.1),
            "penalties": Penalties(kl=0.3, kl_estimator="k3", entropy=0.02),
            "diversity": Diversity(entropy=0.4, reward=0.5, temperature=3.0),
        }
    )
    update = _learn(scorer, settings, old_logprobs=near, reference_logprobs=reference, diversity=diversity)
    right = torch.tensor(EPISODES.rewards) == 1
    earned = torch.tensor(EPISODES.rewards, dtype=torch.float64) + 0.5 * diversity * right
    advantages = _advantages(replace(EPISODES, rewards=tuple(earned.tolist())))
    loss, local, kls, turns, masked = torch.zeros(()), torch.zeros(()), [], 0, 0
    rows = zip(
        *_alone(scorer),
        *map(_per_sample, (near, reference, EPISODES.behaviour_logprobs, EPISODES.turns)),
        strict=True,
    )
    for number, (new, h, old, ref, mu, turn) in enumerate(rows):
        a, group = advantages[number], EPISODES.groups[number]
        for here in (turn == 0, turn == 1):
            if not here.any():
                continue
            turns += 1
            rho = (new[here] - old[here]).exp()
            surrogate = -torch.minimum(rho * a, rho.clamp(0.8, 1.3) * a)
            weight = (old[here] - mu[here].double()).sum().exp().clamp(max=1.5)
            stale = (mu[here].double() - new[here]).mean() > 0.1
            if a < 0 and stale:
                weight = weight * 0
                masked += 1
            d = ref[here] - new[here]
            kls.append(d.exp() - 1 - d)
            loss = loss + (surrogate * weight + 0.3 * kls[-1] - 0.02 * h[here]).sum()
        if right[number]:
            mates = [n for n, g in enumerate(EPISODES.groups) if g == group and right[n]]
            share = (3 * diversity[number]).exp() / (3 * diversity[mates]).exp().sum()
            local = local + share * ((new - mu.double()).exp() * new).mean()
    _check(scorer, update, loss / turns + 0.4 * local / 3)
    assert update.metrics["kl_reference"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-9)
    assert 0 < masked < turns
    assert update.metrics["masked_sequences"] == pytest.approx(masked / turns)


def test_the_policy_as_it_is_stands_in_for_the_proximal_one(scorer):
    settings = LOOSE.model_copy(
        update={"objective": "decoupled_ppo", "token_budget": 30, "correction": Correction()}
    )
    assert "old_logprobs" in needs(settings)
    given, _ = parallel.score(scorer, EPISODES.samples, 30, None, ALONE)
    want, gradient = _learn(scorer, settings, old_logprobs=given), _gradient(scorer)
    got = _learn(scorer, settings)
    assert got == want
    assert torch.equal(_gradient(scorer), gradient)


def test_groups_are_measured(scorer):
    update = _learn(scorer, LOOSE.model_copy(update={"objective": "topr"}))
    logprobs, _ = _alone(scorer)
    behaviour = _per_sample(EPISODES.behaviour_logprobs)
    weights = [
        (new.detach() - mu.double()).sum().exp().item() for new, mu in zip(logprobs, behaviour, strict=True)
    ]
    rows = list(zip(EPISODES.groups, weights, _advantages(), logprobs, strict=True))
    assert sorted(update.groups) == [0, 1, 2]
    for number, measured in update.groups.items():
        w = [w for group, w, _, _ in rows if group == number]
        assert measured.ess == pytest.approx(sum(w) ** 2 / (len(w) * sum(x * x for x in w)), rel=1e-9)
        # TOPR: c is 1 for a good answer, min(W, 1) for a bad one.
        pushes = [(abs(a) * (1 if a > 0 else min(w, 1)), len(new)) for g, w, a, new in rows if g == number]
        mean = sum(c * n for c, n in pushes) / sum(n for _, n in pushes)
        assert measured.signal == pytest.approx(mean, rel=1e-9)


def test_the_gradient_is_clipped(scorer):
    loose = _learn(scorer, LOOSE)
    want = _gradient(scorer)
    norm = loose.metrics["grad_norm"]
    tight = _learn(scorer, LOOSE.model_copy(update={"grad_clip": norm / 4}))
    assert tight.metrics["grad_norm"] == pytest.approx(norm)
    torch.testing.assert_close(_gradient(scorer), want / 4, rtol=1e-4, atol=1e-12)


def test_an_estimator_of_turns_reads_entropies_first(scorer):
    """EMPG by hand: confident turns count more."""
    settings = LOOSE.model_copy(
        update={"objective": "reinforce", "advantage": "empg", "advantage_options": {"zeta": 0.0, "k": 2.0}}
    )
    update = _learn(scorer, settings)
    logprobs, entropies = _alone(scorer)
    parts = [
        (a, logs[turn == t], h[turn == t].detach().mean())
        for a, logs, h, turn in zip(
            _advantages(), logprobs, entropies, _per_sample(EPISODES.turns), strict=True
        )
        for t in (0, 1)
        if (turn == t).any()
    ]
    level = torch.stack([h for _, _, h in parts])
    level = (level - level.min()) / (level.max() - level.min())
    factor = (-2 * level).exp() / (-2 * level).exp().mean()
    found = torch.tensor([a for a, _, _ in parts], dtype=torch.float64) * factor
    found -= found.mean()
    loss = -sum(a * logs.sum() for a, (_, logs, _) in zip(found, parts, strict=True)) / len(EPISODES.turns)
    _check(scorer, update, loss)


def test_only_what_is_needed_is_computed(scorer, monkeypatch):
    runs = []
    monkeypatch.setattr(
        Scorer, "forward", lambda self, row: (runs.append(row), packed_logprobs(self.model, row))[1]
    )

    def passes(**settings: object) -> int:
        runs.clear()
        _learn(scorer, LOOSE.model_copy(update=settings), reference_logprobs=EPISODES.behaviour_logprobs)
        return len(runs)

    assert passes() == 1
    assert passes(correction=Correction(weight="token-tis"), objective="grpo") == 1
    assert passes(penalties=Penalties(kl=0.1)) == 1
    assert passes(advantage="empg") == 2
    assert passes(objective="m2po") == 2


def test_what_the_loss_needs():
    assert needs(LOOSE) == {"behaviour_logprobs"}
    assert needs(LOOSE.model_copy(update={"objective": "reinforce"})) == set()
    some = {"objective": "reinforce", "penalties": Penalties(kl=0.1)}
    assert needs(LOOSE.model_copy(update=some)) == {"reference_logprobs"}
    some = {"objective": "reinforce", "correction": Correction(weight="token-mis")}
    assert needs(LOOSE.model_copy(update=some)) == {"old_logprobs", "behaviour_logprobs"}
    some = {"objective": "reinforce", "diversity": Diversity(entropy=0.1)}
    assert needs(LOOSE.model_copy(update=some)) == {"diversity", "behaviour_logprobs"}


def test_a_correction_that_counts_twice_is_refused(scorer):
    settings = {"objective": "tis", "correction": Correction(weight="token-tis")}
    with pytest.raises(ValueError, match="twice"):
        _learn(scorer, LOOSE.model_copy(update=settings))


def test_data_without_log_probabilities(scorer):
    update = _learn(
        scorer,
        LOOSE.model_copy(update={"objective": "reinforce"}),
        replace(EPISODES, behaviour_logprobs=None),
    )
    assert update.metrics["ess"] == 1
    assert "chi2" not in update.metrics
    with pytest.raises(ValueError, match="needs behaviour_logprobs"):
        _learn(scorer, LOOSE, replace(EPISODES, behaviour_logprobs=None))


def _conversations(memory: int) -> Episodes:
    """Episodes of one to four turns with observations between them, in groups of four, read with this memory."""
    rng = random.Random(5)
    samples, turns, read = [], [], []
    for number in range(12):
        answer: list[int] = []
        trained: list[bool] = []
        numbers: list[int] = []
        for turn in range(1 + number % 4):
            wrote, saw = rng.randrange(1, 4), rng.randrange(1, 3)
            answer += [rng.randrange(9, 90) for _ in range(wrote + saw)]
            trained += [True] * wrote + [False] * saw
            numbers += [turn] * (wrote + saw)
        samples.append(Sample([5, 6, 7 + number // 4], answer, trained))
        turns += [turn for turn, mine in zip(numbers, trained, strict=True) if mine]
        read += [(number, one) for one in turn_samples(samples[-1], numbers, memory)]
    behaviour = torch.tensor([-4.6 + rng.uniform(-0.3, 0.3) for _ in turns])
    return replace(
        EPISODES,
        samples=tuple(samples),
        turns=torch.tensor(turns),
        behaviour_logprobs=behaviour,
        parts=Passes(tuple(one for _, one in read), tuple(number for number, _ in read)),
    )


def _read_in_parts(scorer: Scorer, episodes: Episodes, memory: int) -> list[list[Tensor]]:
    """Log-probabilities of each turn of each episode, by a forward pass for every turn."""
    found, turns = [], iter(episodes.turns.tolist())
    for sample in episodes.samples:
        own = [next(turns) if mine else -1 for mine in sample.trained]
        numbers = [
            max(own[: place + 1]) for place in range(len(own))
        ]  # an observation has that of the action
        parts = []
        for turn in range(max(numbers) + 1):
            read = [i for i, n in zip(sample.response_ids, numbers, strict=True) if turn - memory <= n < turn]
            wrote = [i for i, n in zip(sample.response_ids, own, strict=True) if n == turn]
            ids = torch.tensor([[*sample.prompt_ids, *read, *wrote]])
            logs = scorer.model(input_ids=ids).logits[0].log_softmax(-1)
            places = torch.arange(ids.shape[1] - len(wrote), ids.shape[1])
            parts.append(logs[places - 1, ids[0, places]])
        found.append(parts)
    return found


@pytest.mark.parametrize("memory", [1, 2])
@pytest.mark.parametrize("unit", ["turn", "trajectory"])
@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_what_was_read_in_parts_is_learnt_in_parts(scorer, memory, unit, budget):
    """GSPO's ratio, by turns or over all turns of a trajectory that each read what is in its memory."""
    episodes = _conversations(memory)
    settings = LOOSE.model_copy(
        update={
            "objective": "gspo_token",
            "unit": unit,
            "aggregation": "seq-mean-token-mean",
            "token_budget": budget,
        }
        | {"options": {"eps_lo": 0.2, "eps_hi": 0.3}}
    )
    update = _learn(scorer, settings, episodes)
    advantages, loss, count = _advantages(episodes), torch.zeros(()), 0
    scored = _read_in_parts(scorer, episodes, memory)
    behaviour = iter(
        episodes.behaviour_logprobs.double().split([len(part) for parts in scored for part in parts])
    )
    for a, parts in zip(advantages, scored, strict=True):
        pairs = [(new, next(behaviour)) for new in parts]
        if unit == "trajectory":
            pairs = [tuple(torch.cat(side) for side in zip(*pairs, strict=True))]
        for new, old in pairs:
            ratio = (new - old).mean().exp()
            loss = loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)
            count += 1
    _check(scorer, update, loss / count)


@pytest.mark.parametrize("objective", objectives.names())
@pytest.mark.parametrize("unit", ["turn", "trajectory"])
def test_rows_of_turns_add_up_to_the_whole(scorer, objective, unit):
    episodes = _conversations(2)
    near = parallel.score(_policy(0.01), episodes.passes.samples, 10_000, None, ALONE)[0]
    settings = LOOSE.model_copy(
        update={
            "objective": objective,
            "unit": unit,
            "penalties": Penalties(kl=0.1),
            "diversity": Diversity(entropy=0.05),
        }
    )
    known = {"old_logprobs": near, "reference_logprobs": near + 0.1, "diversity": torch.rand(12).double()}
    whole = _learn(scorer, settings, episodes, **known)
    want = _gradient(scorer)
    parts = _learn(scorer, settings.model_copy(update={"token_budget": 1}), episodes, **known)
    assert (_gradient(scorer) - want).norm() <= 1e-10 * want.norm()
    assert want.norm() > 1e-6
    assert parts.metrics.pop("tokens_packed") > whole.metrics.pop("tokens_packed")
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-9, abs=1e-9)


def test_a_whole_conversation_and_one_read_in_parts_in_one_update(scorer):
    """A memory of three turns is all of four, so they must agree with episodes that are read whole."""
    parts = _conversations(3)
    whole = replace(parts, parts=None)
    mixed = Passes(
        tuple(parts.samples[:6])
        + tuple(s for n, s in zip(parts.passes.episode, parts.passes.samples, strict=True) if n >= 6),
        tuple(range(6)) + tuple(n for n in parts.passes.episode if n >= 6),
    )
    for unit in ("turn", "trajectory"):
        settings = LOOSE.model_copy(update={"objective": "vespo", "unit": unit})
        want = _learn(scorer, settings, whole)
        gradient = _gradient(scorer)
        for read in (parts.parts, mixed):
            got = _learn(scorer, settings, replace(parts, parts=read))
            assert (_gradient(scorer) - gradient).norm() <= 1e-10 * gradient.norm()
            assert got.metrics["loss"] == pytest.approx(want.metrics["loss"], rel=1e-10)
            assert got.metrics["tokens"] == want.metrics["tokens"]


@pytest.mark.parametrize("unit", ["trajectory", "turn"])
@pytest.mark.parametrize("objective", ["vespo", "m2po", "gspo"])
def test_an_answer_without_trained_tokens_teaches_nothing(scorer, objective, unit):
    silent = Sample([5, 6, 7], [8, 9], [False, False])
    more = replace(
        EPISODES,
        samples=(*EPISODES.samples, silent),
        rewards=(*EPISODES.rewards, 1.0),
        groups=(*EPISODES.groups, 3),
        lags=(*EPISODES.lags, 0),
    )
    settings = LOOSE.model_copy(update={"objective": objective, "unit": unit, "token_budget": 1})
    want, gradient = _learn(scorer, settings), _gradient(scorer)
    got = _learn(scorer, settings, more)
    assert torch.equal(_gradient(scorer), gradient)
    assert got.metrics["loss"] == want.metrics["loss"]
    assert got.metrics["ess"] == pytest.approx(want.metrics["ess"])
    assert sorted(got.groups) == [0, 1, 2]


def test_dsdr_of_the_worked_example():
    """The reference's group of four: unit vectors and formulas given."""

    class Given:
        def encode(self, texts):
            return torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]])

    texts = ["$a=b$ $c=d$", "$a=b$ $e=f$ $g=h$", "none", "$c=d$ $k=l$"]
    found = fields.answer_diversity(texts, [0] * 4, Given(), 1.0)
    want = torch.tensor([0.274408, 0.524408, 0.191074, 0.642259], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    four = replace(
        EPISODES,
        samples=EPISODES.samples[:4],
        rewards=(1.0, 1.0, 0.0, 1.0),
        groups=(0,) * 4,
        turns=EPISODES.turns[: sum(sum(s.trained) for s in EPISODES.samples[:4])],
    )
    settings = TrainingSettings(diversity=Diversity(reward=0.001, temperature=5.0))
    shares = fields.entropy_shares(four, settings, found)
    torch.testing.assert_close(
        shares, torch.tensor([0.092745, 0.323714, 0, 0.583541]).double(), rtol=0, atol=1e-6
    )
    advantages = _per_sample(fields.token_advantages(four, settings, diversity=found), four)
    for values, number in zip(advantages, (0.499587, 0.500087, -1.499997, 0.500323), strict=True):
        torch.testing.assert_close(values, torch.full_like(values, number), rtol=0, atol=1e-5)


def test_dsdr_without_weights_is_the_backbone(scorer):
    want, gradient = _learn(scorer, LOOSE), _gradient(scorer)
    got = _learn(
        scorer,
        LOOSE.model_copy(update={"diversity": Diversity(reward=0.0, entropy=0.0)}),
        diversity=torch.linspace(0, 1, 12, dtype=torch.float64),
    )
    assert got == want
    assert torch.equal(_gradient(scorer), gradient)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_sampo_without_its_step_advantage_is_gspo(scorer, near, aggregation):
    """The ratio is GSPO's over a turn, the advantage is that of the group (arXiv 2602.21534, equation 8)."""
    band = {"eps_lo": 0.05, "eps_hi": 0.05}
    common = {"aggregation": aggregation, "unit": "turn", "options": band}
    near_data = replace(EPISODES, behaviour_logprobs=near.float())
    sampo = {"objective": "sampo", "advantage": "gigpo", "advantage_options": {"omega": 0.0}}
    gspo = {"objective": "gspo", "advantage": "group_norm_per_turn"}
    want = _learn(scorer, LOOSE.model_copy(update=common | gspo), near_data)
    gradient = _gradient(scorer)
    got = _learn(scorer, LOOSE.model_copy(update=common | sampo), near_data)
    assert got.metrics == pytest.approx(want.metrics, rel=1e-9, abs=1e-12)
    assert (_gradient(scorer) - gradient).norm() <= 1e-10 * gradient.norm()
    assert gradient.norm() > 1e-6
    whole = {"objective": "sampo", "advantage": "gigpo"}
    _learn(scorer, LOOSE.model_copy(update=common | whole), near_data)
    assert (_gradient(scorer) - gradient).norm() > 1e-3 * gradient.norm()


def test_gigpo_compares_turns_with_the_same_observation():
    settings = TrainingSettings(advantage="gigpo")
    found = fields.token_advantages(EPISODES, settings)
    plain = fields.token_advantages(EPISODES, TrainingSettings())
    # The first turns of a group answer the same prompt, so that they alone have a step advantage.
    first = EPISODES.turns == 0
    assert not torch.allclose(found[first], plain[first], atol=1e-3)
    for values, turn in zip(_per_sample(found), _per_sample(EPISODES.turns), strict=True):
        for number in (0, 1):
            assert len(values[turn == number].unique()) <= 1  # one number a turn


def test_the_deep_thinking_ratio_is_part_of_the_reward(scorer):
    paid = LOOSE.model_copy(
        update={"deep_thinking": DeepThinkingReward(coefficient=0.5), "objective": "reinforce"}
    )
    plain = LOOSE.model_copy(update={"objective": "reinforce"})
    ratios = torch.linspace(0, 0.4, len(EPISODES.samples), dtype=torch.float64)
    rated = replace(EPISODES, deep_thinking=ratios)
    by_hand = replace(
        EPISODES, rewards=tuple(r + 0.5 * d for r, d in zip(EPISODES.rewards, ratios.tolist(), strict=True))
    )
    found = fields.token_advantages(rated, paid)
    torch.testing.assert_close(found, fields.token_advantages(by_hand, plain), rtol=0, atol=1e-12)
    assert torch.equal(fields.token_advantages(rated, plain), fields.token_advantages(EPISODES, plain))
    _learn(scorer, plain, by_hand)
    wanted = _gradient(scorer)
    update = _learn(scorer, paid, rated)
    torch.testing.assert_close(_gradient(scorer), wanted, rtol=1e-9, atol=1e-12)
    # Reported is what the environment gave, and the ratio beside it.
    assert update.metrics["reward"] == pytest.approx(sum(EPISODES.rewards) / len(EPISODES.rewards))
    assert update.metrics["deep_thinking_ratio"] == pytest.approx(0.2)
    assert "deep_thinking_ratio" not in _learn(scorer, plain).metrics
    assert needs(paid) == needs(plain) | {"deep_thinking"}
    with pytest.raises(ValueError, match="an episode has none"):
        _learn(scorer, paid)


def test_a_turn_that_broke_the_format_pays_alone():
    """The worked example of two trajectories of three turns: B answers its second turn in no proper form."""
    first, second, third = 10, 11, 12  # observations; the prompt is the first of them

    def played(*seen: int) -> Sample:
        response = (1, seen[0], 1, seen[1], 1)
        return Sample((first,), response, (True, False, True, False, True))

    episodes = Episodes(
        samples=(played(second, third), played(second, second)),
        rewards=(10.0, 0.0),
        groups=(0, 0),
        lags=(0, 0),
        turns=torch.tensor([0, 1, 2, 0, 1, 2]),
        behaviour_logprobs=None,
        group_ids=("g",),
        texts=("", ""),
        valid=torch.tensor([True, True, True, True, False, True]),
    )
    want = {
        "gigpo": [1.619957, 2.067503, 0.912851, -1.613892, -1.511376, -1.475044],
        "gigpo_mean": [9.529167, 11.383333, 5.016667, -9.495833, -8.316667, -8.116667],
        "group_norm_per_turn": [0.912851] * 3 + [-0.906785, -0.924982, -0.906785],
    }
    for name, numbers in want.items():
        found = fields.token_advantages(episodes, TrainingSettings(advantage=name))
        torch.testing.assert_close(found, torch.tensor(numbers).double(), rtol=0, atol=1e-5)
    assert fields.valid_share(episodes) == pytest.approx(5 / 6)
    assert fields.valid_share(replace(episodes, valid=None)) == 1.0


def test_scores_without_the_adapter_are_the_reference():
    scorer = _policy()
    before = parallel.score(scorer, EPISODES.samples, 30, None, ALONE)[0]
    adapters.attach(scorer.model, 2, 4.0, ["c_attn"], seed=0)
    settings = LOOSE.model_copy(update={"penalties": Penalties(kl=1.0), "objective": "reinforce"})
    optimizer = torch.optim.AdamW([p for p in scorer.parameters() if p.requires_grad], lr=0.1)
    update = _learn(scorer, settings, reference_logprobs=before)
    assert abs(update.metrics["kl_reference"]) < 1e-12
    optimizer.step()
    with adapters.without(scorer.model):
        assert torch.equal(parallel.score(scorer, EPISODES.samples, 30, None, ALONE)[0], before)
    assert _learn(scorer, settings, reference_logprobs=before).metrics["kl_reference"] > 1e-6
