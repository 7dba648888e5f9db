"""Shortest solutions, against numbers that are known and against exhaustive search."""

from __future__ import annotations

from itertools import permutations, product

import pytest

from tasks.arena import solvers


@pytest.mark.parametrize("disks", [1, 2, 3, 4])
def test_hanoi_takes_two_to_the_n_minus_one_moves(disks: int) -> None:
    solution = solvers.hanoi({"A": list(range(disks, 0, -1)), "B": [], "C": []}, "C")
    assert solution is not None
    assert len(solution) == 2**disks - 1


def test_lights_out_presses_are_the_only_solution_of_three_by_three() -> None:
    """The nine crosses of a 3x3 board are independent over GF(2): the shortest solution is the only set of presses."""
    for pressed in product((False, True), repeat=9):
        grid = [[False] * 3 for _ in range(3)]
        wanted = {f"{i // 3} {i % 3}" for i in range(9) if pressed[i]}
        for i in range(9):
            if pressed[i]:
                for row, column in product(range(3), repeat=2):
                    if abs(row - i // 3) + abs(column - i % 3) <= 1:
                        grid[row][column] ^= True
        solution = solvers.lights_out(grid)
        assert solution is not None
        assert set(solution) == wanted
        assert len(solution) == len(wanted)


def test_a_walk_goes_round_a_wall() -> None:
    free = {(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2)}  # (0, 1) and (1, 1) are missing
    assert solvers.walk((0, 0), (0, 2), free) == ["down", "down", "right", "right", "up", "up"]
    assert solvers.walk((0, 0), (0, 2), free - {(2, 1)}) is None
    assert solvers.walk((0, 0), (0, 0), free) == []


def test_sokoban_walks_round_the_box_to_push_it_back() -> None:
    floor = set(product(range(1, 4), range(1, 5)))
    # @ right of the box, goal further right: round it (up, left, left, down), then two pushes.
    solution = solvers.sokoban((2, 3), [(2, 2)], [(2, 4)], floor)
    assert solution is not None
    assert len(solution) == 6
    assert solution[-2:] == ["right", "right"]
    assert solvers.sokoban((2, 2), [(1, 1)], [(2, 4)], floor) is None  # a box in a corner stays there
    # Two boxes: one stands on a goal, the other is pushed up from below; in the other case each blocks the other.
    assert solvers.sokoban((2, 1), [(2, 2), (2, 3)], [(1, 2), (2, 3)], floor) == ["down", "right", "up"]
    assert solvers.sokoban((2, 1), [(2, 2), (2, 3)], [(2, 3), (2, 4)], floor) is None


@pytest.mark.parametrize(
    ("secret", "guess", "answer"),
    [
        ((1, 2, 3), (1, 2, 3), (3, 0)),
        ((1, 2, 3), (3, 1, 2), (0, 3)),
        ((1, 2, 3), (1, 4, 2), (1, 1)),
        ((1, 1, 2), (2, 1, 1), (1, 2)),
    ],
)
def test_pegs(secret: tuple[int, ...], guess: tuple[int, ...], answer: tuple[int, int]) -> None:
    assert solvers.pegs(secret, guess) == answer


def test_pegs_agree_with_textarena() -> None:
    env = pytest.importorskip("textarena.envs.Mastermind.env").MastermindEnv(code_length=3, num_numbers=5)
    env.reset(num_players=1, seed=0)
    secret = env.state.game_state["secret_code"]
    for guess in permutations(range(1, 6), 3):
        assert solvers.pegs(secret, guess) == env._evaluate_guess(list(guess))
