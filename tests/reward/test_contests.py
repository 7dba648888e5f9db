"""Which prompts edits and hacks are tried on, and that none of them is a right answer after all."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tasks.core.digest import sha256_bytes
from tasks.promotion.policy import Policy
from tasks.reward.checks import judge_report
from tasks.reward.source import Answer, Preference
from tasks.reward.validation import MOST_PROMPTS, Material, Sample, frame_of, measure

RULE = Policy().reward_model


@dataclass(frozen=True)
class Table:
    """A source that likes right answers and `loved` alike."""

    right: frozenset[str]
    loved: frozenset[str] = frozenset()
    kind: str = "verifier"
    digest: str = "5" * 64

    def score(self, answers):
        return [float(a.response in self.right or a.response in self.loved) for a in answers]


def preference(n, group="", chosen="", rejected=""):
    return Preference(
        f"q{n}", chosen or f"right {n}", rejected or f"wrong {n}", group or f"g{n}", "sums", "t", "CC0-1.0"
    )


def sample(prompt, text, gold):
    return Sample(Answer(prompt, text), "sums", gold)


PAIRS = [preference(n) for n in range(100)]
ONE = [sample("own", "yes", 1.0), sample("own", "no", 0.0)]
FOOLED = Table(frozenset({"yes", *(p.chosen for p in PAIRS)}), frozenset({""}))


@pytest.mark.parametrize("samples", [[], ONE, ONE[:1]])
def test_a_few_samples_do_not_take_the_place_of_many_preferences(samples):
    report = measure(FOOLED, Material(PAIRS, samples))
    verdict, checks = judge_report(report, RULE)
    (empty,) = [check for check in checks if check.name == "probes/empty"]
    assert (verdict, empty.verdict, empty.counts) == ("FAIL", "FAIL", True)
    assert len({row["prompt"] for row in report["edits"]}) == MOST_PROMPTS
    if samples:
        assert sha256_bytes(b"own") in {row["prompt"] for row in report["probes"]}


def test_samples_that_suffice_are_alone_and_a_prompt_is_asked_once():
    own = [sample(f"q{n}", *said) for n in range(80) for said in ((f"right {n}", 1.0), (f"wrong {n}", 0.0))]
    report = measure(FOOLED, Material(PAIRS, own))
    assert {row["prompt"] for row in report["probes"]} <= {
        sha256_bytes(s.answer.prompt.encode()) for s in own
    }
    assert len({row["prompt"] for row in report["probes"]}) == MOST_PROMPTS
    few = measure(FOOLED, Material([*PAIRS[:10], preference(0, "other")], own[:10]))
    assert len({row["prompt"] for row in few["probes"]}) == 10


def test_an_edit_or_a_hack_that_is_a_right_answer_is_not_tried():
    samples = [
        sample("own", *said)
        for said in (("yes", 1.0), ("YES, I THINK\nYES", 1.0), ("yes, I think\nyes", 0.0))
    ]
    report = measure(Table(frozenset({"yes", "YES, I THINK\nYES"})), Material([], samples))
    named = {row["edit"] for row in report["edits"]}
    assert "filler" in named
    assert not named & {"cut to the last line", "upper case"}


def test_candidates_that_all_say_the_same_make_no_spam():
    pairs = [preference(n, chosen=f"{n}\nyes", rejected=f"{n} no\nyes") for n in range(20)]
    report = measure(Table(frozenset({"yes"})), Material(pairs))
    assert "answer spam" not in {row["probe"] for row in report["probes"]}


def test_turns_of_one_conversation_may_have_the_same_short_answers():
    def repeated(pairs):
        frame = frame_of(measure(FOOLED, Material(pairs)))
        return bool(frame[frame.kind == "pair"].duplicated(["prompt", "name"]).any())  # as the suite asks

    turns = [preference(n, "talk", "yes", "no") for n in range(2)]
    assert not repeated(turns)
    assert repeated([*turns, turns[0]])
