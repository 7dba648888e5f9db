"""Conversations with a teacher: what ends them, what they earn, what the student sees, and what feedback is worth."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import random
from collections import Counter
from functools import partial

import pytest

from tasks.arena.environment import Expert, Listed, get, names, verifier_digest
from tasks.arena.feedback import (
    WITHHELD,
    Conversation,
    Feedback,
    reveals,
    success_by_turn,
    transcript,
    turns_to_success,
)
from tasks.arena.guarded import Guarded
from tasks.arena.playing import expert_baseline, play
from tasks.arena.teachers import Scripted
from tasks.arena.topics import TOPICS, Ordered, best_action, bits, is_question, possible
from tasks.core.errors import UsageError

PREFIXES = ("feedback", "feedback_shuffled")


def env_of(topic: str, **changes) -> Feedback:
    return dataclasses.replace(get(f"feedback/{topic}"), **changes)


@dataclasses.dataclass(frozen=True)
class Says:
    """A teacher who always says the same."""

    text: str
    identity = "says"
    parallel = 3

    def reply(self, conversation: Conversation) -> str:
        return self.text


def test_every_topic_has_a_truthful_and_a_shuffled_teacher() -> None:
    expected = {f"{prefix}/{topic}" for prefix in PREFIXES for topic in TOPICS}
    assert expected <= set(names())
    for name in expected:
        env = get(name)
        assert (env.name, env.max_turns) == (name, 4)
        assert isinstance(env, Listed)
        assert isinstance(env, Expert)
        assert pickle.loads(pickle.dumps(env)).version == env.version
    with pytest.raises(UsageError, match="nearest name is 'feedback/number'"):
        get("feedback/numbr")


@pytest.mark.parametrize("topic", TOPICS)
def test_prompts_are_those_of_the_control_and_no_prompt_is_in_both_splits(topic: str) -> None:
    true, shuffled = (get(f"{prefix}/{topic}") for prefix in PREFIXES)
    for split in ("train", "heldout"):
        pairs = list(zip(true.tasks(split, 40, 3), shuffled.tasks(split, 40, 3), strict=True))
        assert all((a.prompt, a.payload) == (b.prompt, b.payload) for a, b in pairs)
        assert all(a.id != b.id for a, b in pairs)
    assert not {t.prompt for t in true.tasks("train", 200, 0)} & {
        t.prompt for t in true.tasks("heldout", 100, 1)
    }
    assert true.version != shuffled.version
    assert verifier_digest(true) != verifier_digest(shuffled)
    assert env_of(topic, max_turns=10).tasks("train", 5, 0)[0].prompt == true.tasks("train", 5, 0)[0].prompt


@pytest.mark.parametrize("name", [f"{prefix}/{topic}" for prefix in PREFIXES for topic in TOPICS])
def test_a_conversation_ends_with_the_first_right_answer_or_with_its_turns(name: str) -> None:
    env = get(name)
    rng = random.Random(name)
    for task in env.tasks("train", 30, 0):
        answer = task.payload["answer"]
        wrong = [action for action in env.choices(task) if action != answer]
        before = rng.sample(wrong, rng.randrange(4))
        for turn in range(1, len(before) + 1):
            step = env.step(task, before[:turn])
            assert (step.done, step.reward, step.components) == (False, 0.0, {})
            assert step.observation.endswith(f"\n{env.topic.cue}")
            assert step.valid
        last = env.step(task, [*before, f" {answer} "])
        assert (last.done, last.reward, last.components["success"]) == (True, 1.0, 1.0)
        never = env.step(task, rng.sample(wrong, 4))
        assert (never.done, never.reward, never.observation) == (True, 0.0, "")
        assert env.step(task, ["nonsense"]).valid is False


def test_what_the_teacher_says_cannot_change_the_reward() -> None:
    """Nor is anything said after the right answer."""
    task = env_of("number").tasks("train", 1, 0)[0]
    answer = task.payload["answer"]
    wrong = [number for number in "0123456789" if number != answer]
    teachers = [Scripted(TOPICS["number"]), Says("Well done, that is right!"), Says("")]
    for actions in ([answer], [*wrong[:2], answer], wrong[:4]):
        ends = [env_of("number", teacher=teacher).step(task, actions) for teacher in teachers]
        assert {(end.reward, end.observation, end.done) for end in ends} == {
            (float(answer in actions), "", True)
        }


def test_the_student_sees_the_public_history_alone() -> None:
    """Two tasks with other answers and the same remarks look the same but for the number of the game."""
    env = env_of("number")
    texts = set()
    for task in env.tasks("train", 60, 0):
        if int(task.payload["answer"]) > 6:
            steps = [env.step(task, actions) for actions in (["3"], ["3", "6"])]
            texts.add(transcript("", zip(("3", "6"), steps, strict=True)))
    assert texts == {" 3\nIt is higher than 3.\nguess: 6\nIt is higher than 6.\nguess:"}
    seen = Counter(task.payload["answer"] for task in env.tasks("train", 2000, 1))
    assert max(seen.values()) / min(seen.values()) < 1.5


def test_remarks() -> None:
    number, letter, total, thing = (TOPICS[name].remark for name in ("number", "letter", "sum", "thing"))
    assert (number("7", "3"), number("2", "3")) == ("It is higher than 3.", "It is lower than 3.")
    assert (letter("c", "a"), letter("a", "c")) == ("It is later than a.", "It is earlier than c.")
    assert number("7", "12") == "That is no number of this game."
    assert total("85", "75") == "The tens digit is too low."
    assert total("85", "89") == "The ones digit is too high."
    assert total("85", "71") == "The ones digit is too low."
    assert total("85", "eighty") == "That is no number of two digits."
    assert thing("big red round", "red?") == "Yes, red."
    assert thing("big red round", "small?") == "No, small."
    assert thing("big red round", "big red square") == "That is not it."
    assert thing("big red round", "green?") == "Say three words, or one and a question mark."


# What feedback is worth


def test_higher_or_lower_is_a_bit_at_most_and_four_turns_find_fifteen_numbers() -> None:
    for size, found in ((15, 15), (16, 15), (40, 15)):
        topic = Ordered("n", tuple(map(str, range(size))), "number", "higher", "lower")
        env = Feedback(topic, Scripted(topic))
        (prompt, _), *_ = itertools.islice(topic.candidates("0"), 1)
        task = env_of("number").tasks("train", 1, 0)[0]
        tasks = [dataclasses.replace(task, prompt=prompt, payload={"answer": one}) for one in topic.things]
        solved = 0
        for one in tasks:
            steps = play(env, one, partial(env.expert, one))
            solved += int(steps[-1].reward)
        assert solved == found
    number = TOPICS["number"]
    for answer, action in itertools.permutations("0123456789", 2):
        told = bits(number, {}, [(action, number.remark(answer, action))])
        assert told >= 0.0
    halves = bits(
        Ordered("n", tuple("0123456"), "number", "higher", "lower"), {}, [("3", "It is higher than 3.")]
    )
    assert halves == 1.0
    mean = sum(bits(number, {}, [("4", number.remark(answer, "4"))]) for answer in "012356789") / 9
    assert mean < 1.0  # 4 of 9 below, 5 above: the entropy of that split
    assert mean == pytest.approx(0.99108, abs=1e-5)


def test_ceilings_and_baselines() -> None:
    ceilings = {"number": (1.0, 0.4), "letter": (1.0, 0.4), "thing": (1.0, 0.5), "sum": (1.0, 4 / 90)}
    for topic, (ceiling, retry) in ceilings.items():
        env = env_of(topic)
        tasks = env.tasks("heldout", 60, 0)
        assert expert_baseline(env, tasks) == ceiling
        assert env.retry_baseline(tasks) == pytest.approx(retry)
        action, share = env.constant_baseline(tasks)
        assert share == sum(task.payload["answer"] == action for task in tasks) / 60
    number = env_of("number").tasks("heldout", 20, 0)
    assert env_of("number").random_baseline(number, 0) == pytest.approx(1 - 0.9**4)
    for name in ("random_baseline", "retry_baseline"):
        with pytest.raises(UsageError, match="at least one task"):
            getattr(env_of("number"), name)([], *([0] if name == "random_baseline" else []))
    with pytest.raises(UsageError, match="at least one turn"):
        env_of("number", max_turns=0)


def test_shuffled_feedback_tells_nothing_of_the_answer() -> None:
    """Whoever believes it does no better than one who never repeats, and the remark is independent of the truth."""
    env = get("feedback_shuffled/number")
    tasks = env.tasks("train", 1500, 0)
    told: Counter[tuple[bool, bool]] = Counter()
    for task in tasks:
        if task.payload["answer"] != "4":
            above = int(task.payload["answer"]) > 4
            told[above, "higher" in env.step(task, ["4"]).observation] += 1
    share = {above: told[above, True] / (told[above, True] + told[above, False]) for above in (True, False)}
    assert share[True] == pytest.approx(share[False], abs=0.06)
    assert share[True] == pytest.approx(5 / 9, abs=0.05)
    trusting = expert_baseline(env, tasks[:600])
    assert trusting is not None
    assert trusting == pytest.approx(env.retry_baseline(tasks), abs=0.05)


def test_a_shuffled_teacher_keeps_to_one_truth_until_it_is_tried() -> None:
    env = get("feedback_shuffled/number")
    for task in env.tasks("train", 100, 2):
        answer = task.payload["answer"]
        actions = [number for number in "0369" if number != answer][:3]
        left = possible(env.topic, task.payload, env.said(task, actions))
        assert left  # no contradiction: no remark of another truth among them
        step = env.step(
            task, [next(number for number in left if number != answer)] if left != [answer] else ["0"]
        )
        assert step.observation.startswith("It is ") or step.done
    ten = dataclasses.replace(env, max_turns=10)
    task = ten.tasks("train", 1, 0)[0]
    wrong = [number for number in "0123456789" if number != task.payload["answer"]]
    said = ten.said(task, wrong)  # all that there is was tried, and it still has something to say
    assert all(remark.startswith("It is ") for _, remark in said)


def test_what_was_said_leaves_fewer_answers() -> None:
    topic = TOPICS["thing"]
    said = [("red?", "No, red."), ("big blue round", "That is not it.")]
    assert possible(topic, {}, said[:1]) == [
        "big blue round", "big blue square", "small blue round", "small blue square",
    ]  # fmt: skip
    assert possible(topic, {}, said) == ["big blue square", "small blue round", "small blue square"]
    assert bits(topic, {}, said[:1]) == 1.0
    assert bits(topic, {}, said) == 0.0  # the attempt itself took one away, the remark nothing more
    assert bits(topic, {}, [("red?", "No, red."), ("red?", "Yes, red.")]) == 0.0
    assert is_question(best_action(topic, {}, [], 4))
    assert not is_question(best_action(topic, {}, [], 1))
    with pytest.raises(UsageError, match="No answer of the topic thing"):
        best_action(topic, {}, [("red?", "No, red."), ("red?", "Yes, red.")], 2)


# Fixed rules


def test_components_by_fixed_rules() -> None:
    env = env_of("thing")
    task = next(t for t in env.tasks("train", 50, 0) if t.payload["answer"] == "big red round")
    end = env.step(task, ["big?", "hello", "red?", "big red round"])
    assert end.components == {
        "success": 1.0,
        "valid_format": 0.75,
        "repeated": 0.0,
        "questions": 0.5,
        "premature": 0.5,  # "hello" is no question, and at the end round and square are both left
        "withheld": 0.0,
    }
    end = env.step(task, ["big?", "red?", "round?", "big red round"])
    assert (end.components["premature"], end.components["questions"]) == (0.0, 0.75)
    end = env.step(task, ["big red square"] * 4)
    assert (end.components["premature"], end.components["repeated"], end.reward) == (1.0, 0.75, 0.0)
    assert (
        env_of("sum").step(env_of("sum").tasks("train", 1, 0)[0], ["11"] * 4).components["premature"] == 0.0
    )


def test_a_teacher_who_gives_the_answer_away_is_not_heard() -> None:
    env = env_of("thing", teacher=Says("Look: it is Big, RED, round!"))
    task = next(t for t in env.tasks("train", 50, 0) if t.payload["answer"] == "big red round")
    assert env.step(task, ["red?"]).observation == f"{WITHHELD}\nsay:"
    assert env.step(task, ["red?"] * 4).components["withheld"] == 0.75
    other = next(t for t in env.tasks("train", 50, 0) if t.payload["answer"] != "big red round")
    assert env.step(other, ["red?"]).observation == "Look: it is Big, RED, round!\nsay:"
    turns = [(task, ["red?"]), (other, ["big red round"]), (task, ["big red round"])]
    assert env.steps(turns) == [env.step(*turn) for turn in turns]


@pytest.mark.parametrize(
    ("text", "private", "public", "found"),
    [
        ("It is 42.", "42", "", True),
        ("It is 42.", "42", "from 42 to 50", False),
        ("It is 421.", "42", "", False),
        ("red, BIG", "big red", "", False),
        ("a Big,red thing", "big red", "red big", True),
        ("", "7", "", False),
    ],
)
def test_what_reveals_the_answer(text: str, private: str, public: str, found: bool) -> None:
    assert reveals(text, private, public) is found


def test_success_by_turn_never_falls_and_unsolved_conversations_count() -> None:
    solved = [1, 2, None, 4, 3, None, None, 2]
    shares = success_by_turn(solved, 4)
    assert shares == [1 / 8, 3 / 8, 4 / 8, 5 / 8]
    assert success_by_turn(solved, 6) == [*shares, 5 / 8, 5 / 8]
    assert turns_to_success(solved, 4) == (1 + 2 + 5 + 4 + 3 + 5 + 5 + 2) / 8
    for broken in (success_by_turn, turns_to_success):
        with pytest.raises(UsageError, match="at least one"):
            broken([], 4)


def test_behind_a_guard_it_is_the_same() -> None:
    env = get("feedback/letter")
    tasks = env.tasks("train", 4, 0)
    turns = [(task, list(actions)) for task in tasks for actions in ("a", "ab", "abcd")]
    with Guarded(env) as guarded:
        assert guarded.steps(turns) == env.steps(turns)
        assert verifier_digest(guarded) == verifier_digest(env)
