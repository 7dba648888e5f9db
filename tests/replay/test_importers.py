from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import NotFound
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.replay import seal, shards
from tasks.replay.importers import ImportReport, Origin, import_chat, import_records, import_traces
from tasks.replay.schema import Episode
from tasks.replay.validation import Expected, validate_rows
from tests.replay.support import SETTINGS, append
from tests.tiny import TEMPLATE as CHAT_TEMPLATE
from tests.tiny import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
ORIGIN = Origin(
    tokenizer=TOKENIZER,
    tokenizer_digest="a" * 64,
    template_digest="b" * 64,
    behaviour_version="import/other",
    source="log",
    licence="MIT",
    created_at="2026-01-01T00:00:00+00:00",
)


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    return {"messages": messages, "reward": 1.0, **more}


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def only(report: ImportReport) -> Episode:
    ((episode,),) = report.groups
    assert report.errors == ()
    return episode


def text_of(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids)


def test_one_turn(tmp_path: Path) -> None:
    episode = only(import_chat(write(tmp_path / "x.jsonl", chat("2+2?", "4")), ORIGIN))
    assert text_of(episode.prompt_ids) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(episode.response_ids) == "4<|im_end|>"
    assert episode.loss_mask == [True, True]
    assert episode.turn_ids == [0, 0]
    assert episode.behaviour_logprobs == [0.0, 0.0]
    assert (episode.logprob_source, episode.reward, episode.licence) == ("missing", 1.0, "MIT")


def test_only_what_the_assistant_wrote_is_sampled(tmp_path: Path) -> None:
    episode = only(import_chat(write(tmp_path / "x.jsonl", chat("a", "bc", "d", "e")), ORIGIN))
    ids = [*episode.prompt_ids, *episode.response_ids]
    messages = chat("a", "bc", "d", "e")["messages"]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert text_of(ids) == whole.removesuffix("\n")
    sampled = text_of([t for t, m in zip(episode.response_ids, episode.loss_mask, strict=True) if m])
    assert sampled == "bc<|im_end|>e<|im_end|>"
    observation = "\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n"
    assert (
        text_of([t for t, m in zip(episode.response_ids, episode.loss_mask, strict=True) if not m])
        == observation
    )
    n = len(TOKENIZER(observation, add_special_tokens=False)["input_ids"])
    assert episode.turn_ids == [0] * (3 + n) + [1, 1]


def test_logprobs_are_taken_recomputed_or_marked(tmp_path: Path) -> None:
    openai = {"content": [{"token": "4", "logprob": -0.25}, {"token": "<|im_end|>", "logprob": -0.5}]}
    path = write(
        tmp_path / "x.jsonl",
        chat("2+2?", "4", logprobs=[-0.25, -0.5]),
        chat("2+2?", "4!", logprobs=None),
        chat("2+3?", "4", logprobs=openai),
    )
    first, second = import_chat(path, ORIGIN).groups
    assert [(e.behaviour_logprobs, e.logprob_source) for e in (*first, *second)] == [
        ([-0.25, -0.5], "engine"),
        ([0.0] * 3, "missing"),
        ([-0.25, -0.5], "engine"),
    ]

    def recompute(episodes: Sequence[Episode]) -> list[Episode]:
        return [replace(e, behaviour_logprobs=[-1.0] * len(e.response_ids)) for e in episodes]

    report = import_chat(path, replace(ORIGIN, recompute=recompute))
    assert report.groups[0][1].behaviour_logprobs == [-1.0] * 3
    assert [e.logprob_source for members in report.groups for e in members] == [
        "engine",
        "recomputed",
        "engine",
    ]
    short = write(tmp_path / "y.jsonl", chat("2+2?", "4", logprobs=[-0.25]))
    assert only(import_chat(short, replace(ORIGIN, recompute=recompute))).logprob_source == "recomputed"
    assert str(import_chat(short, ORIGIN).errors[0]) == (
        "line 1: it has 1 log-probabilities for the 2 tokens that this tokenizer finds"
    )


def test_groups_are_named_or_follow_from_the_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        chat("a", "1"),
        chat("b", "1"),
        chat("a", "2", reward=0),
        chat("c", "1", group="k"),
        chat("c", "2", group="k", reward=True),
        chat("c", "3"),
        chat("d", "4", task="k"),
    )
    report = import_chat(path, ORIGIN)
    assert [[e.response_text[0] for e in members] for members in report.groups] == [
        ["1", "2"],
        ["1"],
        ["1", "2"],
        ["3"],
    ]
    assert [[e.sample_index for e in members] for members in report.groups] == [[0, 1], [0], [0, 1], [0]]
    assert len({e.group_id for members in report.groups for e in members}) == 4
    assert [str(e) for e in report.errors] == [
        "line 7: its prompt differs from that of the other records of its group"
    ]


def test_bad_lines_are_named_and_good_ones_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        chat("a", "1"),
        b'{"messages": [',
        b"\xff\xfe",
        [1, 2],
        {"reward": 1},
        chat("a", reward=1),
        chat("a", "2", reward=None),
        chat("a", "2", reward=float("nan")),
        {"messages": [{"role": "assistant", "content": "2"}], "reward": 1},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}], "reward": 1},
        b"",
        chat("a", "2", logprobs=[0.5, -1]),
        chat("a", "2", temperature=0),
        chat("a", "1"),
        chat("a", "3"),
    )
    report = import_chat(path, ORIGIN)
    assert [e.response_text for members in report.groups for e in members] == [
        "1<|im_end|>",
        "3<|im_end|>",
    ]
    assert [str(error) for error in report.errors] == [
        "line 2: it is not JSON (Expecting value at column 15)",
        "line 3: it is not UTF-8 text",
        "line 4: it is not a JSON object",
        "line 5: it has no `messages`",
        "line 6: its last message is not the assistant's",
        "line 7: it has no `reward` that is a number",
        "line 8: its reward is not a finite number",
        "line 9: it has no prompt before the assistant's message",
        "line 10: a message of the user has no text (tool calls and parts are not imported)",
        "line 12: one of its log-probabilities is above 0 or not finite",
        "line 13: its temperature is not a number above 0",
        "line 14: it repeats an earlier record, word for word",
    ]
    with pytest.raises(NotFound, match=r"no file .*none\.jsonl to import"):
        import_chat(tmp_path / "none.jsonl", ORIGIN)


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    path = write(tmp_path / "x.jsonl", chat("a", "1", "b", "2"))
    (error,) = import_chat(path, replace(ORIGIN, tokenizer=tokenizer)).errors
    assert "rewrites earlier turns" in error.message


def trace(*spans: tuple[str, Any, Any], **feedback: Any) -> dict[str, Any]:
    """The shape that `Trace.to_dict` of MLflow 3.17 exports."""
    return {
        "info": {
            "trace_id": f"tr-{len(spans)}",
            "request_time": "2026-11-23T01:39:44.615Z",
            "assessments": [
                {
                    "assessment_name": name,
                    "feedback": {"value": value},
                    "valid": True,
                    "last_update_time": "2026",
                }
                for name, value in feedback.items()
            ],
        },
        "data": {
            "spans": [
                {
                    "attributes": {
                        "mlflow.spanType": json.dumps(kind),
                        "mlflow.spanInputs": json.dumps(inputs),
                        "mlflow.spanOutputs": json.dumps(outputs),
                    }
                }
                for kind, inputs, outputs in spans
            ]
        },
    }


def test_mlflow_traces() -> None:
    asked = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]}
    answer = {"choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}]}
    traces = [
        trace(("AGENT", {"question": "2+2?"}, "4"), ("CHAT_MODEL", asked, answer), correct=True, tone="nice"),
        trace(("LLM", asked, "5"), correct=0.25),
        trace(("AGENT", {"question": "2+2?"}, "4"), correct=True),
        trace(("CHAT_MODEL", asked, answer), tone="nice"),
    ]
    report = import_traces(traces, ORIGIN, "correct")
    (members,) = report.groups
    assert [(e.response_text, e.reward) for e in members] == [("4<|im_end|>", 1.0), ("5<|im_end|>", 0.25)]
    assert members[0].created_at == "2026-11-23T01:39:44.615Z"
    assert [str(error) for error in report.errors] == [
        "line 3: trace tr-1 has no chat span with messages and an answer",
        "line 4: trace tr-1 has no feedback called correct",
    ]


def test_importing_twice_adds_nothing(workspace: Workspace, ledger: Ledger, tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl", chat("a", "1"), chat("a", "2", reward=0), chat("b", "1"), chat("b", "2")
    )
    append(workspace, import_chat(path, ORIGIN).groups)
    first = seal.seal(workspace, ledger, SETTINGS)
    append(workspace, import_chat(path, replace(ORIGIN, created_at="2027-01-01T00:00:00+00:00")).groups)
    again = seal.seal(workspace, ledger, SETTINGS)
    assert again.manifest == first.manifest
    assert len(again.dropped) == 4
    checks = validate_rows(
        shards.read_rows(workspace, first.manifest),
        Expected("a" * 64, "b" * 64, 1, 0, 2, vocabulary=len(TOKENIZER)),
    )
    assert [check.name for check in checks if not check.ok] == []


def real_solutions() -> Iterator[tuple[int, dict[str, Any]]]:
    folder = os.environ.get("FOREBAY_REAL_DATA")
    if not folder:
        pytest.skip("FOREBAY_REAL_DATA names no folder with gsm8k_model_solutions.jsonl")
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    number = 0
    for line in (Path(folder) / "gsm8k_model_solutions.jsonl").read_text().splitlines()[:200]:
        record = json.loads(line)
        for name in models:
            number += 1
            solved = record[name]
            yield number, chat(record["question"], solved["solution"], reward=solved["is_correct"], id=name)


def test_real_solutions_of_other_models(workspace: Workspace, ledger: Ledger) -> None:
    records = list(real_solutions())
    report = import_records(records, replace(ORIGIN, source="openai/grade-school-math"))
    assert (len(report.groups), report.episodes, report.errors) == (200, 800, ())
    assert {len(members) for members in report.groups} == {4}
    mean = sum(e.reward for members in report.groups for e in members) / report.episodes
    assert mean == pytest.approx(sum(r["reward"] for _, r in records) / len(records))
    append(workspace, report.groups[:100])
    sealed = seal.seal(workspace, ledger, SETTINGS)
    expected = Expected("a" * 64, "b" * 64, 1, 0, 100, vocabulary=len(TOKENIZER), group_size=4)
    table = shards.read_rows(workspace, sealed.manifest)
    assert [check.name for check in validate_rows(table, expected) if not check.ok] == []
