"""Objectives by name, or by import path, with what they need of a batch and the constants they know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from typing import Any, Final, Literal

from models.objectives.batch import Batch, Losses

LossFunction = Callable[..., Losses]
"""An objective: a pure function of a `Batch`; further arguments are its own constants, with defaults."""

Correction = Literal["outside", "inside", "own"]
"""What becomes of a correction of old against behaviour: `outside` multiplies the token losses by it, `inside`
folds it into the objective's own ratio (`Batch.correction`), `own` has none, as the objective weighs by the
behaviour itself."""

_FIELDS: Final = tuple(field.name for field in fields(Batch) if field.default is None)
_PROPERTIES: Final = ("needs", "correction", "coupled")


@dataclass(frozen=True, slots=True)
class Objective:
    """A known objective. `needs` names the fields of `Batch` that must be there, beyond logprobs and
    advantages; `loss` refuses a batch without them, and constants it does not know. A `coupled` one clips or
    masks a token by what else is in the batch, so that micro-batches do not add up to the whole."""

    name: str
    loss: LossFunction
    needs: frozenset[str]
    correction: Correction = "outside"
    coupled: bool = False

    def check(self, options: Iterable[str]) -> None:
        """Refuse constants that the objective does not have.

        Raises:
            ValueError: unknown; the message names the nearest.
        """
        _check_options(self.name, self.loss, options)


_REGISTRY: dict[str, Objective] = {}


def requires(
    *needs: str, correction: Correction = "outside", coupled: bool = False
) -> Callable[[LossFunction], LossFunction]:
    """Decorator: declare what a loss function needs of a batch, and the other properties of an `Objective`.

    The function then raises ValueError for a batch without the fields, or for unknown constants.

    Raises:
        ValueError: `Batch` has no such optional field.
    """
    for need in needs:
        if need not in _FIELDS:
            raise ValueError(f"a batch has no optional field {need}; did you mean {_nearest(need, _FIELDS)}?")

    def keep(loss: LossFunction) -> LossFunction:
        label = getattr(loss, "__name__", type(loss).__name__)

        @wraps(loss)
        def checked(batch: Batch, **options: Any) -> Losses:
            missing = [need for need in sorted(needs) if getattr(batch, need) is None]
            if missing:
                raise ValueError(f"objective {label} needs {' and '.join(missing)}; the batch has none")
            _check_options(label, loss, options)
            return loss(batch, **options)

        vars(checked).update(needs=frozenset(needs), correction=correction, coupled=coupled)
        return checked

    return keep


def register(
    name: str, needs: tuple[str, ...] = (), correction: Correction = "outside", coupled: bool = False
) -> Callable[[LossFunction], LossFunction]:
    """Decorator: make a loss function known under `name`; it becomes `requires(*needs)` of itself.

    Raises:
        ValueError: the name is taken, or `Batch` has no such optional field.
    """

    declared = requires(*needs, correction=correction, coupled=coupled)

    def keep(loss: LossFunction) -> LossFunction:
        if name in _REGISTRY:
            raise ValueError(f"objective {name} is registered already")
        _REGISTRY[name] = _described(name, declared(loss))
        return _REGISTRY[name].loss

    return keep


def get(name: str) -> Objective:
    """The objective called `name`, or the function at the import path `package.module:function`.

    A function given by its path keeps what `requires` says of it, or its own attributes of those names.

    Raises:
        ValueError: unknown, with the nearest known one; not importable, or not callable.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"there is no objective {name}; did you mean {_nearest(name, names())}?")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"objective {name} is of type {type(function).__name__}, not a function")
    declared: dict[str, Any] = {key: getattr(function, key) for key in _PROPERTIES if hasattr(function, key)}
    return _described(name, requires(*declared.pop("needs", ()), **declared)(function))


def names() -> tuple[str, ...]:
    """Names of all registered objectives, sorted."""
    return tuple(sorted(_REGISTRY))


def _described(name: str, checked: LossFunction) -> Objective:
    """The objective of a function that `requires` has decorated."""
    properties: dict[str, Any] = {key: getattr(checked, key) for key in _PROPERTIES}
    return Objective(name=name, loss=checked, **properties)


def _check_options(name: str, loss: LossFunction, options: Iterable[str]) -> None:
    _, *parameters = inspect.signature(loss).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            hint = f"did you mean {_nearest(option, known)}?" if known else "it has none"
            raise ValueError(f"objective {name} has no option {option}; {hint}")


def _nearest(name: str, known: Iterable[str]) -> str:
    return get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
