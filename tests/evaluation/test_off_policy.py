"""Off-policy evaluation against hand-worked numbers, full enumeration and simulation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from tasks.evaluation.off_policy import (
    ESTIMATORS,
    Log,
    Model,
    Rule,
    baseline,
    compare,
    confidence_sequence,
    estimate_value,
    evaluate,
    overlap,
    sequence_of_difference,
    sequence_of_value,
    single_turn,
)

UNBIASED = ("is", "pdis", "dr")


class World:
    """Two turns of two actions each: the first decides the state, every turn pays.

    Everything is known, so that every mean can be summed up. `scale` makes a prompt hard: it pays less.
    """

    pays = (np.array([0.0, 0.25]), np.array([[0.5, 0.125], [0.25, 0.75]]))  # [a], [state, a]

    def __init__(self, first: float, second: tuple[float, float]) -> None:
        self.first = np.array([1 - first, first])
        self.second = np.array([[1 - p, p] for p in second])  # [state, a]

    def paths(self):
        """(actions, probability) of all episodes; state 1 ends at once after action 1 in it."""
        for a, b in itertools.product(range(2), range(2)):
            yield (a, b), self.first[a] * self.second[a, b]

    def ratios(self, behaviour: World, path: tuple[int, int]) -> list[float]:
        a, b = path
        with np.errstate(divide="ignore"):
            return [
                float(np.log(self.first[a]) - np.log(behaviour.first[a])),
                float(np.log(self.second[a, b]) - np.log(behaviour.second[a, b])),
            ]

    def rewards(self, path: tuple[int, int], scale: float = 1.0) -> list[float]:
        a, b = path
        return [scale * self.pays[0][a], scale * self.pays[1][a, b]]

    def value(self, scale: float = 1.0) -> float:
        return float(sum(p * sum(self.rewards(path, scale)) for path, p in self.paths()))

    def model(self, paths, scales) -> Model:
        """The true q and v of this policy, [B, 2] each."""
        last = (self.second * self.pays[1]).sum(1)  # [state]
        q = [
            [s * (self.pays[0][a] + last[a]), s * self.pays[1][a, b]]
            for (a, b), s in zip(paths, scales, strict=True)
        ]
        v = [[s * self.value(), s * last[a]] for (a, _), s in zip(paths, scales, strict=True)]
        return Model(np.array(q), np.array(v))

    def sample(self, rng: np.random.Generator, prompts: int, each: int):
        first = rng.choice(2, p=self.first, size=prompts * each)
        second = (rng.random(prompts * each) < self.second[first, 1]).astype(int)
        return [tuple(map(int, pair)) for pair in zip(first, second, strict=True)]


BEHAVIOUR = World(0.5, (0.4, 0.5))
NEAR = World(0.6, (0.5, 0.6))
FAR = World(0.9, (0.2, 0.9))


def log_of(paths, prompts, scales=None) -> Log:
    scales = scales or [1.0] * len(paths)
    rewards = np.array([BEHAVIOUR.rewards(path, scale) for path, scale in zip(paths, scales, strict=True)])
    return Log(rewards, np.full(len(paths), 2), tuple(prompts), ("w",) * len(paths))


def ratios_of(policy: World, paths) -> np.ndarray:
    return np.array([policy.ratios(BEHAVIOUR, path) for path in paths])


def drawn(rng, prompts: int, each: int = 4):
    """A log of the behaviour in which prompts are easy or hard at even odds."""
    paths = BEHAVIOUR.sample(rng, prompts, each)
    scales = np.repeat(rng.choice([0.5, 1.0], prompts), each).tolist()
    return log_of(paths, np.repeat([f"p{i}" for i in range(prompts)], each), scales), paths


def test_six_estimators_by_hand():
    """Weights 1/2, 1 and 2, 1 after each of two turns; rewards 0, 1 and 1/4, 1/2."""
    log = Log(np.array([[0.0, 1.0], [0.25, 0.5]]), np.array([2, 2]), ("a", "b"), ("e", "e"))
    ratios = np.log([[0.5, 2.0], [2.0, 0.5]])  # rho: .5, 1 and 2, 1
    model = Model(np.array([[0.5, 0.5], [0.25, 0.5]]), np.array([[0.5, 0.25], [0.5, 0.25]]))
    found = {name: estimate_value(log, ratios, name, model=model) for name in ESTIMATORS}
    # is: (1 + .75) / 2; pdis: (1 + 2 * .25 + .5) / 2; pdwis: .5 / 2.5 + 1.5 / 2.
    # dr: .5 + (.5 (0 - .5 + .25) + 1 (1 - .5) + 2 (.25 - .25 + .25) + 1 (.5 - .5)) / 2 = .5 + .875 / 2
    # wdr: .5 + (-.125 + .5) / 2.5 + .5 / 2
    expected = {"is": 0.875, "wis": 0.875, "pdis": 1.0, "pdwis": 0.95, "dr": 0.9375, "wdr": 0.9}
    assert found == pytest.approx(expected, rel=1e-12)


def test_cut_weights_by_hand():
    log = single_turn([1.0, 0.0, 1.0, 0.0])
    ratios = np.log([[0.5], [0.5], [2.5], [0.5]])
    rule = Rule(estimator="is", ceiling=2.0, looks="once")
    found = evaluate(log, ratios, rule)
    assert found.estimate == pytest.approx(2.5 / 4)
    # Of the weight 1 that there is in the mean, .5 + .5 + 2 + .5 = 3.5 of 4 are left: 1/8 may earn 0 or 1.
    assert found.bias == pytest.approx((0.0, 0.125))
    assert found.overlap[0].missing == pytest.approx(0.125)
    assert found.overlap[0].cut == 0.25
    # A self-normalised mean of 2.5 / 3.5 has given the missing eighth that value.
    found = evaluate(log, ratios, replace(rule, estimator="wis"))
    assert found.estimate == pytest.approx(2.5 / 3.5)
    assert found.bias == pytest.approx((-0.125 * 2.5 / 3.5, 0.125 * 1 / 3.5))


def test_what_is_missing_of_both_policies_counts_against_their_difference():
    """All rewards 1; a tenth of the candidate's episodes and a fifth of the champion's are not in the log."""
    log = single_turn([1.0] * 50)
    found = compare(
        log, np.full((50, 1), math.log(0.9)), np.full((50, 1), math.log(0.8)), Rule(estimator="wis")
    )
    assert found.estimate == 0
    assert found.bias == pytest.approx((-0.1, 0.2))
    assert (found.low, found.high) == pytest.approx((-0.1, 0.2))


def test_overlap_by_hand():
    found = overlap(single_turn([0.0] * 4), np.log([[1.0], [1.0], [2.0], [4.0]]), ceiling=3.0)
    assert found.ess == pytest.approx(64 / 22)
    assert found.ess_share == pytest.approx(16 / 22)
    assert found.mean_weight == 2
    assert found.chi_square == pytest.approx(22 / 4 - 1)
    assert found.max_share == found.top_share == 0.5
    assert found.cut == 0.25
    assert found.missing == 0
    # The same in two prompts of mean weight 1 and 3.
    log = single_turn([0.0] * 4, ["a", "a", "b", "b"])
    assert overlap(log, np.log([[1.0], [1.0], [2.0], [4.0]])).prompts == pytest.approx(16 / 10)


def test_the_top_percent_of_three_hundred_is_three():
    weights = np.r_[np.full(297, 1.0), 10.0, 20.0, 30.0]
    found = overlap(single_turn(np.zeros(300)), np.log(weights)[:, None])
    assert found.top_share == pytest.approx(60 / 357)


@pytest.mark.parametrize("policy", [NEAR, FAR, World(1.0, (0.0, 1.0))])
@pytest.mark.parametrize("estimator", UNBIASED)
def test_unbiased_over_all_logs_of_three(policy, estimator):
    """The mean over every log of two episodes of a prompt and one of another, each by its probability."""
    chances = list(BEHAVIOUR.paths())
    total = 0.0
    for chosen in itertools.product(chances, repeat=3):
        paths = [path for path, _ in chosen]
        log = log_of(paths, ["a", "a", "b"])
        value = estimate_value(log, ratios_of(policy, paths), estimator)
        total += math.prod(p for _, p in chosen) * value
    assert total == pytest.approx(policy.value(), rel=1e-12)


def test_doubly_robust_is_unbiased_with_a_wrong_model():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0, 1, 2), rng.uniform(0, 1, (2, 2))  # q of nothing in particular
    v = float(FAR.first @ first), (FAR.second * second).sum(1)
    total = 0.0
    for (a, b), p in BEHAVIOUR.paths():
        model = Model(np.array([[first[a], second[a, b]]]), np.array([[v[0], v[1][a]]]))
        total += p * estimate_value(log_of([(a, b)], ["a"]), ratios_of(FAR, [(a, b)]), "dr", model=model)
    assert total == pytest.approx(FAR.value(), rel=1e-12)


def test_the_self_normalised_are_biased_and_consistent():
    chances = list(BEHAVIOUR.paths())
    for estimator in ("wis", "pdwis", "wdr"):
        total = sum(
            pa * pb * estimate_value(log_of([a, b], ["a", "b"]), ratios_of(FAR, [a, b]), estimator)
            for (a, pa), (b, pb) in itertools.product(chances, repeat=2)
        )
        assert abs(total - FAR.value()) > 0.003  # the exact bias for two episodes
    rng = np.random.default_rng(1)
    paths = BEHAVIOUR.sample(rng, 40_000, 1)
    log = log_of(paths, [str(i) for i in range(len(paths))])
    for estimator in ESTIMATORS:
        assert estimate_value(log, ratios_of(FAR, paths), estimator) == pytest.approx(FAR.value(), abs=0.012)


def test_a_true_model_takes_the_variance_away():
    """Rewards are fixed by the path here, so that only actions vary: with the true q nothing is left of them."""
    rng = np.random.default_rng(2)
    values = {name: [] for name in ("is", "pdis", "dr", "true")}
    for _ in range(300):
        log, paths = drawn(rng, 20)
        ratios = ratios_of(FAR, paths)
        for name in ("is", "pdis", "dr"):
            values[name].append(estimate_value(log, ratios, name))
        scales = log.returns / [sum(BEHAVIOUR.rewards(path)) for path in paths]
        model = FAR.model(paths, scales)
        values["true"].append(estimate_value(log, ratios, "dr", model=model))
    spread = {name: float(np.std(found)) for name, found in values.items()}
    between = 0.25 * FAR.value() / math.sqrt(20)  # of the prompts, which no model can foresee
    assert spread["true"] == pytest.approx(between, rel=0.15)
    assert spread["dr"] < 0.8 * spread["is"]


def test_the_baseline_leaves_an_episodes_own_reward_out():
    log = single_turn([1.0, 0.0, 0.0, 1.0], ["a", "a", "b", "b"], ["e", "e", "f", "f"])
    first = baseline(log).v
    changed = baseline(single_turn([0.0, 0.0, 0.0, 1.0], ["a", "a", "b", "b"], ["e", "e", "f", "f"])).v
    assert first[0] == changed[0]
    assert first[1] > changed[1]
    assert first[2] > changed[2]  # the other environment's prompts say what is usual
    # By hand for episode 0: of all others' prompts (0 + 1 + 2 * .5) / 4 = .5; of its environment's nothing more; of
    # its prompt (0 + 2 * .5) / 3.
    assert first[0, 0] == pytest.approx(1 / 3)


def test_on_policy_the_answer_is_the_mean_reward():
    rng = np.random.default_rng(3)
    log, _ = drawn(rng, 30)
    none = np.zeros_like(log.rewards)
    for estimator in ESTIMATORS:
        found = evaluate(log, none, Rule(estimator=estimator))
        assert found.estimate == pytest.approx(float(log.returns.mean()), abs=1e-12)
    same = compare(log, none, none, Rule())
    assert (same.estimate, same.low, same.high, same.standard_error) == (0, 0, 0, 0)
    assert found.overlap[0].ess == len(log.prompts)
    assert found.bias == (0, 0)


def test_on_policy_the_interval_is_the_t_interval_over_prompts():
    from scipy import stats

    rng = np.random.default_rng(4)
    log, _ = drawn(rng, 25)
    found = evaluate(log, np.zeros_like(log.rewards), Rule(estimator="wis", looks="once"))
    means = log.returns.reshape(25, 4).mean(1)
    low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    t = stats.t(24)
    error = means.std(ddof=1) / 5
    assert found.mde == pytest.approx((t.ppf(0.975) + t.ppf(0.8)) * error, rel=1e-9)


def test_the_order_and_the_names_of_prompts_do_not_matter():
    rng = np.random.default_rng(5)
    log, paths = drawn(rng, 20)
    ratios, order = ratios_of(FAR, paths), rng.permutation(80)
    other = Log(
        log.rewards[order],
        log.turns[order],
        tuple("x" + log.prompts[i] for i in order),
        log.environments,
    )
    for estimator in ESTIMATORS:
        rule = Rule(estimator=estimator)
        a, b = evaluate(log, ratios, rule), evaluate(other, ratios[order], rule)
        assert (a.estimate, a.low, a.high) == pytest.approx((b.estimate, b.low, b.high), rel=1e-9)


def test_scaled_weights_leave_the_self_normalised_as_they_are():
    rng = np.random.default_rng(6)
    log, paths = drawn(rng, 20)
    ratios = ratios_of(NEAR, paths)
    scaled = ratios + np.array([[1.0, 0.0]])
    for estimator in ("wis", "pdwis", "wdr"):
        same = estimate_value(log, ratios, estimator)
        assert estimate_value(log, scaled, estimator) == pytest.approx(same, rel=1e-12)
    assert estimate_value(log, scaled, "is") == pytest.approx(
        math.e * estimate_value(log, ratios, "is"), rel=1e-12
    )


def test_affine_rewards_move_everything_alike():
    rng = np.random.default_rng(7)
    rewards = (rng.random(120) < 0.4).astype(float)
    prompts = [str(i // 4) for i in range(120)]
    ratios = rng.normal(0, 0.5, (120, 1))
    plain = evaluate(single_turn(rewards, prompts), ratios, Rule())
    moved = evaluate(single_turn(10 * rewards - 4, prompts, support=(-4, 6)), ratios, Rule(margin=-4))
    for name in ("estimate", "low", "high", "anytime_low", "anytime_high"):
        assert getattr(moved, name) == pytest.approx(10 * getattr(plain, name) - 4, rel=1e-9)
    assert moved.mde == pytest.approx(10 * plain.mde, rel=1e-9)


def test_an_episode_that_ends_early_keeps_its_weight():
    """Its later turns do not exist: the weight stays, nothing is earned, and the model says 0."""
    log = Log(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 2]), ("a", "b"), ("e", "e"))
    ratios = np.log([[2.0, 1.0], [0.5, 0.5]])
    assert estimate_value(log, ratios, "pdwis") == pytest.approx(2 / 2.5 + 0.25 / 2.25)
    assert (baseline(log).v[0, 1], baseline(log).q[0, 1]) == (0, 0)


def test_intervals_and_sequences_cover():
    """Nominal is 95 %: intervals about that, sequences at least that, over their whole length at once."""
    rng = np.random.default_rng(8)
    runs, rule = 300, Rule(looks="once")
    value, gain = 0.75 * NEAR.value(), 0.75 * (NEAR.value() - BEHAVIOUR.value())
    hits = dict.fromkeys(("interval", "difference", "value_sequence", "difference_sequence"), 0)
    for _ in range(runs):
        log, paths = drawn(rng, 40)
        ratios = ratios_of(NEAR, paths)
        found = evaluate(log, ratios, rule)
        hits["interval"] += found.low <= value <= found.high
        found = compare(log, ratios, np.zeros_like(ratios), rule)
        hits["difference"] += found.low <= gain <= found.high
        low, high = sequence_of_value(log, ratios, rule)
        hits["value_sequence"] += bool((low <= value).all() and (value <= high).all())
        low, high = sequence_of_difference(log, ratios, np.zeros_like(ratios), rule)
        hits["difference_sequence"] += bool((low <= gain).all() and (gain <= high).all())
    # 272 of 300 is the 0.1 % quantile of a coverage of 95 %.
    assert min(hits.values()) >= 272, hits


def test_the_confidence_sequence_is_its_formula_step_by_step():
    """Each bet, guess and variance is made of earlier values alone; guesses stay within [0, 1]."""
    values, alpha = [0.0, 4.0, 0.5, 3.0, 1.0, 0.0, 2.5], 0.05
    won = paid = staked = 0.0
    best, bounds, guess, variance, squares = -math.inf, [], 0.5, 0.25, 0.25
    for t, x in enumerate(values, start=1):
        bet = min(math.sqrt(2 * math.log(1 / alpha) / (variance * t * math.log(1 + t))), 0.75)
        won, staked = won + bet * x, staked + bet
        paid += (-math.log(1 - bet) - bet) * (x - guess) ** 2
        best = max(best, (won - math.log(1 / alpha) - paid) / staked)
        bounds.append(best)
        guess = min(1.0, (0.5 + sum(values[:t])) / (t + 1))
        squares += (x - guess) ** 2
        variance = squares / (t + 1)
    assert guess == 1.0
    assert confidence_sequence(values, alpha).tolist() == pytest.approx(bounds, rel=1e-12)


def test_a_confidence_sequence_of_rare_large_values_errs_less_than_alpha():
    """Values of mean 1/2 that are 0 or 10: bounded far above 1, as weights are."""
    rng = np.random.default_rng(9)
    wrong = 0
    for _ in range(500):
        values = np.where(rng.random(300) < 0.05, 10.0, 0.0)
        wrong += bool((confidence_sequence(values, 0.05) > 0.5).any())
    assert wrong <= 38  # 99.9 % quantile of 25 expected


def test_the_steps_of_the_confidence_sequence_are_a_supermartingale():
    """E exp(l (x - m) - psi(l) (x - g)^2) <= 1 for the bets that it makes, over two-point values of mean m."""
    for m, high, bet, guess in itertools.product(
        (0.1, 0.5, 0.9), (1.0, 5.0, 50.0), (0.1, 0.75), (0.0, 0.5, 1.0)
    ):
        p = m / high
        psi = -math.log1p(-bet) - bet
        mean = sum(
            chance * math.exp(bet * (x - m) - psi * (x - guess) ** 2) for x, chance in ((high, p), (0, 1 - p))
        )
        assert mean <= 1 + 1e-12


def test_a_confidence_sequence_closes_in():
    rng = np.random.default_rng(10)
    bound = confidence_sequence((rng.random(4000) < 0.6).astype(float), 0.025)
    assert (np.diff(bound) >= 0).all()
    assert 0.55 < bound[-1] < 0.6
    assert confidence_sequence([], 0.025).shape == (0,)


def test_a_clear_gain_passes_and_a_clear_loss_fails():
    rng = np.random.default_rng(11)
    log, paths = drawn(rng, 400)
    ratios, none = ratios_of(World(0.8, (0.2, 0.8)), paths), np.zeros((len(paths), 2))
    for looks in ("once", "any time"):
        rule = Rule(looks=looks)
        won = compare(log, ratios, none, rule)
        lost = compare(log, none, ratios, rule)
        assert (won.verdict, lost.verdict) == ("PASS", "FAIL"), looks
        assert won.estimate == pytest.approx(-lost.estimate, rel=1e-9)
        assert "above the margin" in won.reasons[0]
    assert compare(log, ratios, none, Rule(margin=0.5)).verdict == "FAIL"
    assert won.anytime_low < won.low  # what looking at any time costs


def test_poor_overlap_is_inconclusive_whatever_the_estimate_says():
    """Weights of mean 1 and variance e^3 - 1, so that the log is worth a twentieth of its episodes."""
    rng = np.random.default_rng(12)
    log = single_turn(rng.random(2000), [str(i // 2) for i in range(2000)])
    ratios = math.sqrt(3) * rng.normal(0, 1, (2000, 1)) - 1.5
    for looks in ("once", "any time"):
        found = evaluate(log, ratios, Rule(margin=-1.0, looks=looks))
        assert found.verdict == "INCONCLUSIVE"
        assert "below the floor" in found.reasons[0]
        assert found.overlap[0].prompts > 20
        assert evaluate(log, ratios, Rule(margin=-1.0, looks=looks, min_ess=0.0)).verdict == "PASS"


def test_few_prompts_are_inconclusive_however_many_episodes():
    log = single_turn([1.0] * 90, [str(i % 9) for i in range(90)])
    found = evaluate(log, np.zeros((90, 1)), Rule(margin=-1.0))
    assert found.verdict == "INCONCLUSIVE"
    assert "9.0 prompts" in found.reasons[0]


def test_what_the_log_never_did_widens_the_interval():
    """Nine in ten of the policy's episodes are not in the log: equal weights of a tenth, and a perfect ESS."""
    log = single_turn([1.0] * 200)
    found = evaluate(log, np.full((200, 1), math.log(0.1)), Rule(margin=0.5, looks="once"))
    assert found.overlap[0].ess_share == pytest.approx(1)
    assert found.estimate == pytest.approx(1)
    assert found.low == pytest.approx(0.1)
    assert found.verdict == "INCONCLUSIVE"
    assert any("90.0%" in reason for reason in found.reasons)


def test_one_prompt_that_outweighs_all_carries_no_conclusion():
    ratios = np.r_[[[200.0]], np.zeros((49, 1))]
    found = evaluate(single_turn(np.r_[1.0, np.zeros(49)]), ratios, Rule(margin=0.5, looks="once", min_ess=0))
    assert found.verdict == "INCONCLUSIVE"
    assert found.overlap[0].ess == pytest.approx(1)
    assert all(math.isfinite(x) for x in (found.estimate, found.low, found.high))


def test_a_policy_without_any_weight_is_inconclusive_over_the_whole_support():
    log = single_turn([1.0] * 20)
    for estimator in ESTIMATORS:
        found = evaluate(log, np.full((20, 1), -np.inf), Rule(estimator=estimator, looks="once"))
        assert found.verdict == "INCONCLUSIVE"
        assert (found.low, found.high) == (0, 1)
        assert found.overlap[0].missing == 1
    with pytest.raises(ValueError, match="no weight to any logged episode"):
        estimate_value(log, np.full((20, 1), -np.inf), "wis")


def test_weights_beyond_all_numbers_stay_numbers():
    rng = np.random.default_rng(13)
    ratios = rng.normal(0, 400, (60, 3))
    log = Log(
        np.c_[np.zeros((60, 2)), rng.random(60)], np.full(60, 3), tuple(map(str, range(60))), ("e",) * 60
    )
    for estimator in ESTIMATORS:
        found = evaluate(log, ratios, Rule(estimator=estimator))
        assert found.verdict == "INCONCLUSIVE"
        assert all(math.isfinite(x) for x in (found.estimate, found.low, found.high, found.anytime_low))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"rewards": np.zeros((0, 1))}, "at least one episode"),
        ({"prompts": ("a",)}, "differ in length"),
        ({"turns": np.array([0, 1])}, "1 to 1 turns"),
        ({"rewards": np.array([[np.nan], [0.0]])}, "must be finite"),
        ({"rewards": np.array([[1.5], [0.0]])}, r"sum to within \[0.0, 1.0\]"),
        ({"rewards": np.array([[0.5, 0.5], [0.0, 0.0]])}, "after an episode's last turn must be 0"),
    ],
)
def test_a_log_that_does_not_fit_is_refused_in_a_sentence(parts, sentence):
    good = {
        "rewards": np.array([[0.0], [1.0]]),
        "turns": np.array([1, 1]),
        "prompts": ("a", "b"),
        "environments": ("e", "e"),
    }
    Log(**good)
    with pytest.raises(ValueError, match=sentence):
        Log(**(good | parts))


@pytest.mark.parametrize(
    ("ratios", "sentence"),
    [
        (np.zeros((2, 1)), "do not fit a log"),
        (np.array([[0.0, 0.0], [np.nan, 0.0]]), "numbers below infinity"),
        (np.array([[np.inf, 0.0], [0.0, 0.0]]), "numbers below infinity"),
        (np.array([[0.0, 0.0], [0.0, 0.1]]), "after an episode's last turn must be 0"),
    ],
)
def test_ratios_that_do_not_fit_are_refused_in_a_sentence(ratios, sentence):
    log = Log(np.zeros((2, 2)), np.array([2, 1]), ("a", "b"), ("e", "e"))
    with pytest.raises(ValueError, match=sentence):
        evaluate(log, ratios, Rule())


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Model(np.zeros((2, 1)), np.zeros((2, 2))), "do not fit the log"),
        (Model(np.full((2, 2), np.nan), np.zeros((2, 2))), "must be finite"),
        (Model(np.ones((2, 2)), np.zeros((2, 2))), "after an episode's last turn must be 0"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_a_sentence(model, sentence):
    log = Log(np.zeros((2, 2)), np.array([2, 1]), ("a", "b"), ("e", "e"))
    with pytest.raises(ValueError, match=sentence):
        evaluate(log, np.zeros((2, 2)), Rule(), model)


@pytest.mark.parametrize(
    "values",
    [{"alpha": 0.5}, {"power": 0.5}, {"ceiling": 0.9}, {"min_ess": 1.1}, {"estimator": "magic"}],
)
def test_a_rule_that_makes_no_sense_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values)).replace("_", "[_ ]")):
        Rule(**values)


def test_a_confidence_sequence_refuses_values_below_zero():
    with pytest.raises(ValueError, match="at least 0"):
        confidence_sequence([0.5, -0.1], 0.05)
