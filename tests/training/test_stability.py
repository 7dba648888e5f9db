"""Signals of a collapse: what is found in made-up curves, in a real collapse of the laboratory, and on the page."""

from __future__ import annotations

import json
import math
import random

import pytest

from tasks.training.stability import SIGNALS, Rule, Signal, Watch, departure, find_collapse
from tasks.training.stability_page import Run, stability_page, verdict

HEALTHY = {
    "far_negative": 0.001,
    "kl_k3": 0.02,
    "grad_norm": 1.0,
    "entropy": 0.4,
    "response_length": 30.0,
    "valid_format": 0.7,
}
ILL = {
    "far_negative": 0.3,
    "kl_k3": 0.8,
    "grad_norm": 30.0,
    "entropy": 0.01,
    "response_length": 200.0,
    "valid_format": 0.1,
}


def curve(steps: int = 200, seed: int = 0, **since: tuple[str, int] | int) -> list[dict[str, float]]:
    """Healthy updates with a third of noise; a metric in `since` is ill from that update on."""
    draw = random.Random(seed)
    return [
        {
            "step": step,
            **{
                name: (ILL if step >= since.get(name, steps + 1) else HEALTHY)[name] * draw.uniform(0.7, 1.3)
                for name in HEALTHY
            },
        }
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_gives_no_alarm(seed: int):
    assert find_collapse(curve(seed=seed)) == ()


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.driver)
@pytest.mark.parametrize("seed", range(3))
def test_each_signal_is_found_where_it_began(signal: Signal, seed: int):
    onset = random.Random(seed).randrange(40, 160)
    (found,) = find_collapse(curve(seed=seed, **{signal.metric: onset}))
    assert (found.driver, found.onset) == (signal.driver, onset)
    assert onset <= found.noticed <= onset + 10
    assert found.before == pytest.approx(HEALTHY[signal.metric], rel=0.2)
    assert found.after == pytest.approx(ILL[signal.metric], rel=0.2)


def test_what_departed_first_comes_first_and_equals_keep_the_order_of_causes():
    found = find_collapse(curve(far_negative=100, kl_k3=90, grad_norm=120))
    assert [one.driver for one in found] == ["policy drift", "stale negatives", "gradient explosion"]
    found = find_collapse(curve(far_negative=100, kl_k3=100))
    assert [one.driver for one in found] == ["stale negatives", "policy drift"]


def test_one_outlier_is_no_collapse_and_slow_growth_is_one():
    rows = curve()
    rows[99]["kl_k3"] = rows[99]["grad_norm"] = 1e9
    assert find_collapse(rows) == ()
    for row in rows[120:]:
        row["kl_k3"] = 0.02 * 1.06 ** (row["step"] - 120)
    (found,) = find_collapse(rows)
    crossed = 120 + math.log(0.2 / 0.02) / math.log(1.06)
    assert found.onset == math.ceil(crossed)


def test_what_is_no_number_departs_and_what_is_not_measured_is_not_looked_at():
    rows = curve()
    for row in rows[150:]:
        row["grad_norm"] = math.nan
        del row["far_negative"]
    (found,) = find_collapse(rows)
    assert (found.driver, found.onset) == ("gradient explosion", 151)
    assert find_collapse([]) == ()
    assert find_collapse([{"step": 1}]) == ()


def test_the_sum_by_hand():
    """kl_k3 of .4 is twice what is healthy: each update adds 1 to the sum, the fifth tells."""
    rows = [{"step": step, "kl_k3": 0.4 if step > 3 else 0.1} for step in range(1, 20)]
    (found,) = find_collapse(rows, Rule(alarm=5.0))
    assert (found.onset, found.noticed) == (4, 8)
    entropy = next(signal for signal in SIGNALS if signal.metric == "entropy")
    assert departure(0.05, 0.4, entropy) == pytest.approx(1.0)  # an eighth of the start is the border
    assert departure(0.4, 0.4, entropy) == 0.0
    assert departure(0.8, 0.4, entropy) < 0  # more entropy is no harm


def test_the_page_says_it_and_marks_the_onset():
    rows = curve(far_negative=60)
    found = find_collapse(rows)
    page = stability_page(Run("ab" * 32, 200, "finished"), rows, found)
    assert verdict(found) in page
    assert "at update 60, by stale negatives" in page
    assert "sequence_mask" in page
    assert page.count("<figure>") == len(HEALTHY)
    assert page.count('class="margin"') == len(HEALTHY)  # the upright line
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    more = [row | {"kl_mass_negative_below": 0.25, "masked_sequences": 0.5} for row in rows]
    page = stability_page(Run("ab" * 32, 200, "finished"), more, found)
    assert "KL on tokens with A &lt; 0 and a ratio below 1, a share of all: 0.25 to 0.25." in page
    assert "Sequences that the sequence mask removed: 0.5 to 0.5." in page
    healthy = stability_page(Run("ab" * 32, 200, "finished"), curve(), ())
    assert "no signal of a collapse" in healthy
    assert 'class="margin"' not in healthy


@pytest.mark.slow
def test_a_real_collapse(tmp_path, monkeypatch):
    """One policy of the laboratory, on stale data from update 31 on; `benchmarks.collapse` has more of them."""
    from benchmarks import collapse, lab

    monkeypatch.setattr(lab, "OUT", tmp_path)
    settings = {"kind": "collapse", "seed": 1, "updates": 50, "onset": 31}
    told = collapse.judge({"settings": settings, **collapse.cell(settings)})
    assert told["driver"] == "stale negatives"
    assert 0 <= told["off"] * settings["updates"] <= 10
    assert told["lowest_after"] < told["before"]


@pytest.mark.parametrize("seed", range(20))
def test_followed_while_it_goes_on_a_run_is_judged_as_afterwards(seed: int):
    draw = random.Random(seed)
    ill = {name: draw.randrange(11, 120) for name in HEALTHY if draw.random() < 0.4}
    rows = curve(seed=seed, **ill)
    found = find_collapse(rows)
    watch, told = Watch(), None
    for row in rows:
        watch = Watch.from_json(json.loads(json.dumps(watch.seen(row["step"], row).to_json())))
        told = told or (watch.collapse() and row["step"])
    assert watch.collapse() == ((found[0].driver, found[0].onset) if found else None)
    assert told == (min(one.noticed for one in found) if found else None)


def test_weights_from_before_the_suspicion_are_good():
    watch = Watch()
    for row in ({"step": row["step"], "kl_k3": row["kl_k3"]} for row in curve(kl_k3=50)):
        watch = watch.seen(row["step"], row)
        if row["step"] < 50:
            assert watch.suspected() is None
        if row["step"] in (50, 51):
            assert watch.suspected() == 50
            assert watch.collapse() is None or row["step"] == 52
    assert watch.collapse() == ("policy drift", 50)
