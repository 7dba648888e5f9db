"""Errors a user can act on: one sentence that says what was wrong, where, and what to do."""

from __future__ import annotations


class ForebayError(Exception):
    """Base of every expected failure; the command line prints it and leaves with `exit_code`."""

    exit_code = 1


class UsageError(ForebayError):
    """The request itself is wrong: a bad setting, a malformed argument."""

    exit_code = 2


class NotFound(ForebayError):
    """What was named does not exist."""

    exit_code = 3


class Conflict(ForebayError):
    """The world changed between the look and the act: a lost race, a stale expectation."""

    exit_code = 4


class Refused(ForebayError):
    """A gate, a veto or a validation said no."""

    exit_code = 5


class Corrupt(ForebayError):
    """Bytes differ from the digest that names them."""

    exit_code = 6


class Unavailable(ForebayError):
    """Something outside is missing: a port, a GPU, disk space, a server."""

    exit_code = 7
