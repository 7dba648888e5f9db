"""Preferences that others recorded: JSONL of chosen and rejected answers, or of solutions marked right and wrong.

A comparison is `{chosen, rejected, prompt?}`, each a string or a list of chat messages. Without a prompt the two
are whole transcripts, and their common beginning, up to the answer on which they part, is the prompt; this is the
form of hh-rlhf ("\\n\\nHuman: …\\n\\nAssistant: …"), into which messages are laid as well.

An outcome record is `{question, <author>: {solution, is_correct}, …}` (as GSM8K's model solutions are published) or
`{question, solutions: [{solution, is_correct, author?}]}`; every right answer is preferred to every wrong one.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tasks.core.digest import sha256_bytes
from tasks.core.errors import NotFound
from tasks.reward.preferences import distinct
from tasks.reward.source import Preference

_ROLES = {"user": "Human", "human": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
_ASKED, _ANSWERED = "\n\nHuman:", "\n\nAssistant:"
_COMMON = "comparison"  # the slice of records that name none


@dataclass(frozen=True)
class Origin:
    """What records that do not say so come from."""

    source: str
    licence: str
    slice: str = _COMMON


@dataclass(frozen=True)
class ImportReport:
    """What an import gave: distinct preferences, what was dropped, and the lines that were left out, each named."""

    preferences: tuple[Preference, ...]
    records: int
    duplicates: int
    equal: int
    without_contrast: int
    errors: tuple[str, ...]


class _Bad(Exception):
    """A record cannot be used; the message says why."""


def import_preferences(path: Path, origin: Origin) -> ImportReport:
    """Read a JSONL file (also .gz) of comparisons or outcomes; bad lines are named `file:line: what` and left out.

    `without_contrast` counts outcome records whose solutions are all right or all wrong.

    Raises:
        NotFound: there is no such file.
    """
    if not path.is_file():
        raise NotFound(f"There is no file {path} to import.")
    found: list[Preference] = []
    errors: list[str] = []
    records = flat = 0
    for number, raw in _lines(path):
        if isinstance(raw, bytes) and not raw.strip():
            continue
        records += 1
        try:
            if isinstance(raw, _Bad):
                raise raw
            made = _record(_parsed(raw), origin)
        except _Bad as bad:
            errors.append(f"{path.name}:{number}: {bad}")
            continue
        flat += not made
        found += made
    kept = distinct(found)
    return ImportReport(kept.preferences, records, kept.duplicates, kept.equal, flat, tuple(errors))


def group_of(prompt: str) -> str:
    """Return what the preferences of one prompt share: of a conversation its opening, else the prompt, as SHA-256.

    Turns of one conversation are prompts of their own and still belong on one side of a split.
    """
    at = prompt.find(_ANSWERED) if _ASKED in prompt[: prompt.find(_ANSWERED)] else -1
    return sha256_bytes((prompt[:at] if at >= 0 else prompt).encode())


def _lines(path: Path) -> Iterator[tuple[int, bytes | _Bad]]:
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                yield number, raw
        except (EOFError, OSError, zlib.error) as error:
            yield number + 1, _Bad(f"the archive cannot be read from here on ({error})")


def _parsed(raw: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Bad("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _Bad(f"it is not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise _Bad("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise _Bad("it is not a JSON object")
    return record


def _record(record: Mapping[str, Any], origin: Origin) -> list[Preference]:
    if "chosen" in record or "rejected" in record:
        return [_comparison(record, origin)]
    if "question" in record:
        return _outcomes(record, origin)
    raise _Bad("it has neither `chosen` and `rejected` nor a `question` with solutions")


def _comparison(record: Mapping[str, Any], origin: Origin) -> Preference:
    prompt, chosen, rejected = _parted(*(_text(record, name) for name in ("prompt", "chosen", "rejected")))
    return _preference(record, origin, prompt, chosen, rejected, str(record.get("slice") or origin.slice))


def _preference(
    record: Mapping[str, Any], origin: Origin, prompt: str, chosen: str, rejected: str, part: str
) -> Preference:
    licence = record.get("licence") or record.get("license") or origin.licence
    source = record.get("source") or origin.source
    texts = (prompt, chosen, rejected, part, str(source), str(licence))
    if any(_surrogate(text) for text in texts):
        raise _Bad("it holds half a surrogate pair, which is no text")
    return Preference(prompt, chosen, rejected, group_of(prompt), part, str(source), str(licence))


def _parted(prompt: str | None, chosen: str | None, rejected: str | None) -> tuple[str, str, str]:
    """Return prompt and answers, whole transcripts divided where they part."""
    if chosen is None or rejected is None:
        raise _Bad(f"it has no `{'chosen' if chosen is None else 'rejected'}` answer")
    if prompt is not None:
        if not prompt:
            raise _Bad("its prompt is empty")
        return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    parting = next((at for at, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    at = chosen.rfind(_ANSWERED, 0, parting)
    if at <= 0:
        raise _Bad("it has no `prompt`, and its answers have no common beginning before an assistant's turn")
    end = at + len(_ANSWERED)
    return chosen[:end], chosen[end:], rejected[end:]


def _text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _Bad(f"its `{name}` is neither text nor a list of messages")
    text = "".join(_message(message, name) for message in value)
    return f"{text}{_ANSWERED}" if name == "prompt" else text


def _message(message: Any, name: str) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise _Bad(f"a message of its `{name}` has no text")
    role = _ROLES.get(str(message.get("role")).lower())
    if role is None:
        raise _Bad(f"a message of its `{name}` has no known role (got {message.get('role')!r})")
    return f"\n\n{role}: {message['content']}"


def _outcomes(record: Mapping[str, Any], origin: Origin) -> list[Preference]:
    question = record["question"]
    if not isinstance(question, str) or not question.strip():
        raise _Bad("its question is empty or no text")
    right: list[tuple[str, str]] = []
    wrong: list[tuple[str, str]] = []
    for author, solution in _solutions(record):
        text, correct = solution.get("solution"), solution.get("is_correct")
        if not isinstance(text, str) or not isinstance(correct, bool):
            raise _Bad(f"the solution of {author} lacks its text, or its `is_correct` that is true or false")
        (right if correct else wrong).append((author, text))
    if not right and not wrong:
        raise _Bad("it has a question and no solutions")
    return [
        _preference(record, origin, question, good, bad, author)
        for (_, good), (author, bad) in product(right, wrong)
    ]


def _solutions(record: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    listed = record.get("solutions")
    if listed is None:
        return [(name, value) for name, value in record.items() if isinstance(value, dict)]
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise _Bad("its `solutions` are not a list of objects")
    return [(str(item.get("author") or item.get("model") or _COMMON), item) for item in listed]


def _surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def slices(preferences: Sequence[Preference]) -> dict[str, int]:
    """Return how many preferences each slice has."""
    found: dict[str, int] = {}
    for preference in preferences:
        found[preference.slice] = found.get(preference.slice, 0) + 1
    return dict(sorted(found.items()))
