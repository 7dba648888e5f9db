from __future__ import annotations

import pytest

from models.packing import Sample
from models.turn_samples import turn_samples

#                 action 0 | answer | action 1 | answer | action 2 | answer | action 3
RESPONSE = [10, 11, 20, 12, 21, 22, 13, 14, 23, 15]
TRAINED = [True, True, False, True, False, False, True, True, False, True]
TURNS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
WHOLE = Sample([1, 2], RESPONSE, TRAINED, 0.7)


def read(memory: int, sample: Sample = WHOLE, turns: list[int] = TURNS) -> list[tuple[list[int], list[int]]]:
    return [(list(s.prompt_ids), list(s.response_ids)) for s in turn_samples(sample, turns, memory)]


def test_a_memory_of_one_turn_is_the_prompt_and_the_turn_before() -> None:
    assert read(1) == [
        ([1, 2], [10, 11]),
        ([1, 2, 10, 11, 20], [12]),
        ([1, 2, 12, 21, 22], [13, 14]),
        ([1, 2, 13, 14, 23], [15]),
    ]


def test_a_memory_of_two_turns() -> None:
    assert read(2)[1:] == [
        ([1, 2, 10, 11, 20], [12]),
        ([1, 2, 10, 11, 20, 12, 21, 22], [13, 14]),
        ([1, 2, 12, 21, 22, 13, 14, 23], [15]),
    ]


def test_a_long_memory_is_all_there_was() -> None:
    for prompt, action in read(9):
        assert prompt == [1, 2, *RESPONSE[: RESPONSE.index(action[0])]]
    assert read(3) == read(9)


def test_trained_tokens_keep_their_order_and_temperature() -> None:
    for memory in (1, 2, 3):
        samples = turn_samples(WHOLE, TURNS, memory)
        written = [i for s in samples for i, mine in zip(s.response_ids, s.trained, strict=True) if mine]
        assert written == [i for i, mine in zip(RESPONSE, TRAINED, strict=True) if mine]
        assert {s.temperature for s in samples} == {0.7}


def test_turns_that_nothing_is_learnt_from_have_no_sample_and_are_read() -> None:
    trained = [False, False, *TRAINED[2:]]
    assert read(1, Sample([1, 2], RESPONSE, trained)) == read(1)[1:]
    assert read(1, Sample([1, 2], RESPONSE, [False] * 10)) == []


def test_numbers_of_turns_may_have_gaps() -> None:
    assert read(2, Sample([1], [5, 6, 7], [True, False, True]), [0, 0, 4]) == [([1], [5]), ([1], [7])]


@pytest.mark.parametrize(("memory", "turns"), [(0, TURNS), (-1, TURNS), (1, TURNS[1:])])
def test_what_cannot_be(memory: int, turns: list[int]) -> None:
    with pytest.raises(ValueError, match=r"memory|turn numbers"):
        turn_samples(WHOLE, turns, memory)
