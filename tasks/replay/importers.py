"""Experience that others recorded: chat JSONL with rewards, and MLflow traces with feedback.

The response of an episode is everything from the first assistant message on, laid out by the policy's own
chat template; what the assistant wrote (its end-of-turn token included) is marked as sampled, all else as
observation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import NotFound
from tasks.replay.schema import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Recompute = Callable[[Sequence[Episode]], Sequence[Episode]]
"""Gives episodes the log-probabilities of the checkpoint that wrote them: copies, in the same order."""


@dataclass(frozen=True)
class Origin:
    """What the records themselves do not say: how to tokenise them, who wrote them, where they come from.

    Args:
        tokenizer: the policy's tokenizer, with its chat template.
        behaviour_version: "agent/<n>" if a registered agent wrote them, else a name such as "import/gpt-4".
        behaviour_digest: digest of that checkpoint; empty if nobody knows it.
        recompute: computes missing log-probabilities with the behaviour checkpoint; None marks them as
            missing.
        temperature: of the sampling, where a record does not tell.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str
    template_digest: str
    behaviour_version: str
    behaviour_digest: str = ""
    source: str = "import"
    licence: str = ""
    recompute: Recompute | None = None
    temperature: float = 1.0
    created_at: str | None = None


@dataclass(frozen=True)
class LineError:
    """A record that was left out: its line (from 1; for traces its place in the list) and why."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True)
class ImportReport:
    """The groups that came in, in the order of their first records, and the records that did not."""

    groups: tuple[tuple[Episode, ...], ...]
    errors: tuple[LineError, ...]

    @property
    def episodes(self) -> int:
        """How many episodes came in."""
        return sum(len(group) for group in self.groups)


class _Bad(Exception):
    """A record cannot be an episode; the message says why."""


def import_chat(path: Path, origin: Origin) -> ImportReport:
    """Read a file with one JSON object a line.

    Known keys: `messages` (OpenAI chat format, at least one assistant message), `reward` (number or boolean),
    and optionally `logprobs` (numbers, or OpenAI's `{"content": [{"logprob": …}]}`; one for each sampled
    token), `group` or `task` (records that answer the same prompt), `temperature`, `top_p`, `source`,
    `licence`, `created_at`.

    Raises:
        NotFound: there is no such file.
    """
    if not path.is_file():
        raise NotFound(f"There is no file {path} to import.")
    return import_records(_json_lines(path), origin)


def import_traces(traces: Iterable[Mapping[str, Any]], origin: Origin, feedback: str) -> ImportReport:
    """Turn MLflow traces (dicts as `Trace.to_dict` or `to_json` exports them) into episodes.

    The messages are those of the last span of type CHAT_MODEL or LLM that has them; the reward is the newest
    valid feedback called `feedback` (number or boolean).
    """
    return import_records(
        ((at, _guarded(_from_trace, trace, feedback)) for at, trace in enumerate(traces, 1)), origin
    )


def import_records(records: Iterable[tuple[int, Mapping[str, Any] | _Bad]], origin: Origin) -> ImportReport:
    """Turn numbered records with the keys of `import_chat` into groups; wrong ones are named and left out.

    Records without a group of their own are grouped by identical prompt. The same record gives the same
    episode id wherever it is imported from, so that importing a file twice adds nothing.
    """
    default_time = origin.created_at or datetime.now(UTC).isoformat(timespec="seconds")
    errors: list[LineError] = []
    drafts: list[tuple[str, Episode]] = []
    lines: list[int] = []
    for line, record in records:
        made = record if isinstance(record, _Bad) else _guarded(_episode, record, origin, default_time)
        if isinstance(made, _Bad):
            errors.append(LineError(line, str(made)))
        else:
            drafts.append(made)
            lines.append(line)
    members: dict[str, list[Episode]] = {}
    seen: set[str] = set()
    episodes = _with_logprobs([episode for _, episode in drafts], origin)
    for (group, _), episode, line in zip(drafts, episodes, lines, strict=True):
        placed = members.setdefault(group, [])
        if episode.episode_id in seen:
            errors.append(LineError(line, "it repeats an earlier record, word for word"))
            continue
        if placed and placed[0].prompt_ids != episode.prompt_ids:
            errors.append(LineError(line, "its prompt differs from that of the other records of its group"))
            continue
        seen.add(episode.episode_id)
        placed.append(replace(episode, group_id=group, sample_index=len(placed)))
    groups = tuple(tuple(group) for group in members.values() if group)
    return ImportReport(groups, tuple(sorted(errors, key=lambda error: error.line)))


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | _Bad]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if raw.strip():
                yield number, _guarded(_parsed, raw)


def _guarded(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns, or the _Bad that it raised."""
    try:
        return work(*arguments)
    except _Bad as bad:
        return bad


def _parsed(raw: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        raise _Bad("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _Bad(f"it is not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise _Bad("it is not a JSON object")
    return record


def _episode(record: Mapping[str, Any], origin: Origin, default_time: str) -> tuple[str, Episode]:
    """Return the group and the episode of one record; log-probabilities are 0 where the record has none."""
    messages, reward = _messages(record), _reward(record.get("reward"))
    prompt_ids, response_ids, mask, turns = _laid_out(messages, origin.tokenizer)
    source = str(record.get("source") or origin.source)
    opening = [m for m in messages[: _first_answer(messages)] if m["role"] == "user"]
    prompt = "\n".join(m["content"] for m in opening)
    named = record.get("group", record.get("task"))
    task = digest_json([source, named]) if named is not None else digest_json([source, prompt_ids])
    given, known = _given_logprobs(record.get("logprobs"), mask, origin.recompute is not None)
    episode = Episode(
        episode_id=digest_json([source, named, prompt_ids, response_ids, reward, record.get("id")])[:32],
        group_id="",
        sample_index=0,
        task_id=str(named) if named is not None else f"prompt/{task[:16]}",
        env="import",
        env_version="1",
        split="train",
        seed=0,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        loss_mask=mask,
        turn_ids=turns,
        behaviour_logprobs=given,
        logprob_source="engine" if known else "missing",
        behaviour_version=origin.behaviour_version,
        behaviour_digest=origin.behaviour_digest,
        temperature=_number(record, "temperature", origin.temperature),
        top_p=_number(record, "top_p", 1.0),
        max_new_tokens=sum(mask),
        tokenizer_digest=origin.tokenizer_digest,
        template_digest=origin.template_digest,
        reward=reward,
        reward_components=canonical_json({"reward": reward}).decode(),
        reward_digest=digest_json({"recorded_by": source}),
        finish_reason="done",
        prompt_sha256=sha256_bytes(prompt.encode()),
        response_text=str(origin.tokenizer.decode(response_ids)),
        source=source,
        licence=str(record.get("licence") or origin.licence),
        created_at=str(record.get("created_at") or default_time),
    )
    return task[:32], episode


def _messages(record: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Bad("it has no `messages`")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Bad("one of its messages has no role")
        if not isinstance(message.get("content"), str):
            raise _Bad(
                f"a message of the {message['role']} has no text (tool calls and parts are not imported)"
            )
    found = [{"role": message["role"], "content": message["content"]} for message in messages]
    if found[-1]["role"] != "assistant":
        raise _Bad("its last message is not the assistant's")
    if _first_answer(found) == 0:
        raise _Bad("it has no prompt before the assistant's message")
    return found


def _first_answer(messages: Sequence[Mapping[str, str]]) -> int:
    return next(at for at, message in enumerate(messages) if message["role"] == "assistant")


def _reward(value: Any) -> float:
    if not isinstance(value, bool | int | float):
        raise _Bad("it has no `reward` that is a number")
    if not math.isfinite(value):
        raise _Bad("its reward is not a finite number")
    return float(value)


def _number(record: Mapping[str, Any], key: str, default: float) -> float:
    value = record.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise _Bad(f"its {key} is not a number above 0")
    return float(value)


def _laid_out(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[bool], list[int]]:
    """Return prompt ids, response ids, mask and turn ids.

    The template is applied to growing prefixes of the conversation; what an assistant message adds is its
    turn. Pieces are tokenised one by one, as they were when the policy wrote one after the other.
    """
    first = _first_answer(messages)
    done = _rendered(tokenizer, messages[:first], True)
    prompt_ids = _tokens(tokenizer, done)
    ids: list[int] = []
    mask: list[bool] = []
    turns: list[int] = []

    def add(text: str, sampled: bool, turn: int) -> None:
        piece = _tokens(tokenizer, text)
        ids.extend(piece)
        mask.extend([sampled] * len(piece))
        turns.extend([turn] * len(piece))

    turn = -1
    for at in range(first, len(messages)):
        if messages[at]["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:at], True)
        after = _rendered(tokenizer, messages[: at + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise _Bad("the chat template rewrites earlier turns, so what the policy saw cannot be rebuilt")
        add(before.removeprefix(done), False, max(turn, 0))
        turn += 1
        written, end, rest = after.removeprefix(before).partition(tokenizer.eos_token or "\0")
        add(written + end, True, turn)
        last = at == len(messages) - 1
        if not last:
            add(rest, False, turn)
        done = after
    return prompt_ids, ids, mask, turns


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], asks: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # templates raise jinja2's own errors, and any by `raise_exception`
        raise _Bad(f"the chat template refuses it ({' '.join(str(error).split())})") from None


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return ids


def _given_logprobs(value: Any, mask: Sequence[bool], replaceable: bool) -> tuple[list[float], bool]:
    """Return one log-probability a response token, and whether the record gave them."""
    nothing = [0.0] * len(mask)
    if value is None:
        return nothing, False
    if isinstance(value, dict):
        content = value.get("content")
        value = (
            [part.get("logprob") for part in content if isinstance(part, dict)]
            if isinstance(content, list)
            else None
        )
    if not isinstance(value, list) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in value
    ):
        raise _Bad("its `logprobs` are not a list of numbers")
    if not all(math.isfinite(v) and v <= 0 for v in value):
        raise _Bad("one of its log-probabilities is above 0 or not finite")
    if len(value) != sum(mask):
        if replaceable:
            return nothing, False
        raise _Bad(
            f"it has {len(value)} log-probabilities for the {sum(mask)} tokens that this tokenizer finds"
        )
    given = iter(value)
    return [float(next(given)) if sampled else 0.0 for sampled in mask], True


def _with_logprobs(episodes: Sequence[Episode], origin: Origin) -> list[Episode]:
    """Fill in the missing log-probabilities, if there is something to compute them with."""
    missing = [at for at, episode in enumerate(episodes) if episode.logprob_source == "missing"]
    filled = list(episodes)
    if origin.recompute is not None and missing:
        for at, episode in zip(missing, origin.recompute([episodes[at] for at in missing]), strict=True):
            filled[at] = replace(episode, logprob_source="recomputed")
    return filled


def _from_trace(trace: Mapping[str, Any], feedback: str) -> Mapping[str, Any]:
    """Return the chat record of an MLflow trace."""
    info = trace.get("info", {})
    spans = trace.get("data", {}).get("spans", [])
    for span in reversed(spans):
        attributes = span.get("attributes", {})
        if _attribute(attributes, "mlflow.spanType") not in ("CHAT_MODEL", "LLM"):
            continue
        inputs, outputs = (
            _attribute(attributes, "mlflow.spanInputs"),
            _attribute(attributes, "mlflow.spanOutputs"),
        )
        asked = inputs.get("messages") if isinstance(inputs, dict) else None
        answer = _answer(outputs)
        if isinstance(asked, list) and answer is not None:
            return {
                "messages": [*asked, answer],
                "reward": _feedback(info, feedback),
                "id": info.get("trace_id"),
                "created_at": info.get("request_time"),
            }
    raise _Bad(f"trace {info.get('trace_id')} has no chat span with messages and an answer")


def _feedback(info: Mapping[str, Any], name: str) -> Any:
    given = [
        a for a in info.get("assessments", []) if a.get("assessment_name") == name and a.get("valid", True)
    ]
    if not given:
        raise _Bad(f"trace {info.get('trace_id')} has no feedback called {name}")
    newest = max(given, key=lambda a: str(a.get("last_update_time", "")))
    return newest.get("feedback", {}).get("value")


def _answer(outputs: Any) -> dict[str, Any] | None:
    """Find the assistant's message in a chat span's outputs: OpenAI's choices, a message, or plain text."""
    if isinstance(outputs, str):
        return {"role": "assistant", "content": outputs}
    if not isinstance(outputs, dict):
        return None
    choices = outputs.get("choices")
    message = choices[0].get("message") if isinstance(choices, list) and choices else outputs
    return {"role": "assistant", "content": message.get("content")} if isinstance(message, dict) else None


def _attribute(attributes: Mapping[str, Any], name: str) -> Any:
    """Return a span attribute, which exports hold as JSON text."""
    value = attributes.get(name)
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
