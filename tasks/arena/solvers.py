"""Shortest solutions of small puzzles by breadth-first search, from what a player sees of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import product
from typing import TypeVar

Cell = tuple[int, int]
S = TypeVar("S", bound=Hashable)

MOVES: Mapping[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def shortest(
    start: S, moves: Callable[[S], Iterable[tuple[str, S]]], solved: Callable[[S], bool]
) -> list[str] | None:
    """The fewest actions that lead from `start` to a solved state; None if none does.

    Args:
        moves: the (action, next state) pairs of a state; earlier ones win ties.
    """
    came: dict[S, tuple[S, str] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if solved(state):
            actions = []
            while (step := came[state]) is not None:
                state, action = step
                actions.append(action)
            return actions[::-1]
        for action, following in moves(state):
            if following not in came:
                came[following] = state, action
                queue.append(following)
    return None


def walk(start: Cell, goal: Cell, free: Collection[Cell]) -> list[str] | None:
    """The shortest way over `free` cells."""

    def moves(cell: Cell) -> Iterable[tuple[str, Cell]]:
        for action, (down, right) in MOVES.items():
            if (there := (cell[0] + down, cell[1] + right)) in free:
                yield action, there

    return shortest(start, moves, lambda cell: cell == goal)


def sokoban(
    player: Cell, boxes: Collection[Cell], goals: Collection[Cell], floor: Collection[Cell]
) -> list[str] | None:
    """The fewest moves that push every box onto a goal; `floor` holds every cell that is not a wall."""
    State = tuple[Cell, frozenset[Cell]]

    def moves(state: State) -> Iterable[tuple[str, State]]:
        (row, column), now = state
        for action, (down, right) in MOVES.items():
            there, beyond = (row + down, column + right), (row + 2 * down, column + 2 * right)
            if there in now and beyond in floor and beyond not in now:
                yield action, (there, now - {there} | {beyond})
            elif there in floor and there not in now:
                yield action, (there, now)

    wanted = frozenset(goals)
    return shortest((player, frozenset(boxes)), moves, lambda state: state[1] <= wanted)


def hanoi(towers: Mapping[str, Sequence[int]], target: str) -> list[str] | None:
    """The fewest moves "A C" (from, to) that bring all disks to `target`; a tower lists its disks from the bottom."""
    names = tuple(towers)
    disks = sum(map(len, towers.values()))
    State = tuple[tuple[int, ...], ...]

    def moves(state: State) -> Iterable[tuple[str, State]]:
        for a, b in product(range(len(names)), repeat=2):
            if a != b and state[a] and (not state[b] or state[b][-1] > state[a][-1]):
                following = list(state)
                following[a], following[b] = state[a][:-1], (*state[b], state[a][-1])
                yield f"{names[a]} {names[b]}", tuple(following)

    start = tuple(tuple(towers[name]) for name in names)
    return shortest(start, moves, lambda state: len(state[names.index(target)]) == disks)


def lights_out(grid: Sequence[Sequence[bool]]) -> list[str] | None:
    """The fewest presses "row column" that turn all lights of a square grid off; a press toggles a cross of cells."""
    n = len(grid)
    cells = list(product(range(n), repeat=2))
    crosses = {
        f"{row} {column}": sum(1 << (r * n + c) for r, c in cells if abs(r - row) + abs(c - column) <= 1)
        for row, column in cells
    }
    start = sum(1 << (row * n + column) for row, column in cells if grid[row][column])
    return shortest(
        start, lambda lit: ((press, lit ^ cross) for press, cross in crosses.items()), lambda lit: lit == 0
    )


def pegs(secret: Sequence[int], guess: Sequence[int]) -> tuple[int, int]:
    """Black and white pegs of a Mastermind guess: right digits in the right place, and in a wrong one."""
    black = sum(a == b for a, b in zip(secret, guess, strict=True))
    common = sum(min(list(secret).count(digit), list(guess).count(digit)) for digit in set(guess))
    return black, common - black
