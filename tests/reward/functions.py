"""Verifiers that users might name by import path."""

from __future__ import annotations

VERSION = "1"


def says_yes(prompt: str, response: str) -> float:
    return float("yes" in response)


def out_of_range(prompt: str, response: str) -> float:
    return 2.0


def broken(prompt: str, response: str) -> float:
    raise KeyError(prompt)


NUMBER = 3
