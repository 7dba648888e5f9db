"""Preferences of others: every accepted form, what is wrong with a bad line, and nothing twice."""

from __future__ import annotations

import gzip
import json

import pytest

from tasks.core.errors import NotFound
from tasks.reward.importers import Origin, group_of, import_preferences, slices

ORIGIN = Origin("a test", "MIT")
CHAT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"


def read(tmp_path, *records, name="set.jsonl"):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    data = b"\n".join(lines) + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return import_preferences(tmp_path / name, ORIGIN)


def test_a_prompt_and_two_answers(tmp_path):
    (found,) = read(tmp_path, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}).preferences
    assert (found.prompt, found.chosen, found.rejected) == ("2+2?", "4", "5")
    assert (found.source, found.licence, found.slice) == ("a test", "MIT", "comparison")
    own = {"source": "elsewhere", "license": "CC-BY-4.0", "slice": "sums"}
    (found,) = read(tmp_path, {"prompt": "2+2?", "chosen": "4", "rejected": "5", **own}).preferences
    assert (found.source, found.licence, found.slice) == ("elsewhere", "CC-BY-4.0", "sums")


def test_transcripts_part_at_the_answer_also_in_an_archive(tmp_path):
    record = {"chosen": CHAT + " Better so.", "rejected": CHAT + " But not so.\n\nHuman: oh\n\nAssistant: no"}
    (found,) = read(tmp_path, record, name="set.jsonl.gz").preferences
    assert found.prompt == CHAT
    assert found.chosen == " Better so."  # they share " B", which is no part of the prompt
    assert found.rejected == " But not so.\n\nHuman: oh\n\nAssistant: no"


def test_messages_read_like_transcripts(tmp_path):
    asked = [{"role": "user", "content": "hi"}]
    good, bad = ([*asked, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    (found,) = read(tmp_path, {"chosen": good, "rejected": bad}).preferences
    assert (found.prompt, found.chosen, found.rejected) == ("\n\nHuman: hi\n\nAssistant:", " yes", " no")
    (again,) = read(tmp_path, {"prompt": asked, "chosen": good, "rejected": bad}).preferences
    assert again == found
    (text,) = read(
        tmp_path, {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}
    ).preferences
    assert text == found


def test_outcomes_prefer_each_right_answer_to_each_wrong_one(tmp_path):
    record = {
        "question": "1+1?",
        "ground_truth": "2",
        "small": {"is_correct": False, "solution": "3"},
        "large": {"is_correct": True, "solution": "2"},
        "middle": {"is_correct": False, "solution": "11"},
        "other": {"is_correct": True, "solution": "It is 2"},
    }
    listed = {
        "question": "1+2?",
        "solutions": [
            {"author": "small", "solution": "4", "is_correct": False},
            {"model": "large", "solution": "3", "is_correct": True},
        ],
    }
    all_right = {"question": "0?", "a": {"is_correct": True, "solution": "0"}}
    report = read(tmp_path, record, listed, all_right)
    assert slices(report.preferences) == {"middle": 2, "small": 3}  # who was wrong
    assert {(p.chosen, p.rejected) for p in report.preferences if p.prompt == "1+1?"} == {
        ("2", "3"), ("2", "11"), ("It is 2", "3"), ("It is 2", "11"),
    }  # fmt: skip
    assert (report.without_contrast, report.errors) == (1, ())
    assert len({p.group for p in report.preferences}) == 2


BAD = [
    (b"{not json", "not JSON"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b"[1, 2]", "not a JSON object"),
    (b"[" * 100_000, "deeply"),
    ({"text": "hello"}, "neither `chosen`"),
    ({"prompt": "p", "chosen": "a"}, "no `rejected`"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": "p", "chosen": 3, "rejected": "b"}, "`chosen` is neither"),
    ({"chosen": "no common", "rejected": "beginning"}, "no common beginning"),
    ({"chosen": [{"role": "robot", "content": "x"}], "rejected": "b"}, "no known role"),
    ({"chosen": [{"role": "user"}], "rejected": "b"}, "has no text"),
    ({"question": "q", "a": {"is_correct": "yes", "solution": "1"}}, "true or false"),
    ({"question": "q"}, "no solutions"),
    ({"question": " ", "a": {"is_correct": True, "solution": "1"}}, "empty"),
    (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "surrogate"),
]


@pytest.mark.parametrize(("record", "says"), BAD, ids=[says for _, says in BAD])
def test_a_bad_line_is_named_and_the_good_ones_are_kept(tmp_path, record, says):
    good = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(2)]
    report = read(tmp_path, good[0], record, good[1])
    assert {p.prompt for p in report.preferences} == {"p0", "p1"}
    assert len(report.errors) == 1
    assert report.errors[0].startswith("set.jsonl:2: ")
    assert says in report.errors[0]


def test_an_archive_that_ends_early_keeps_what_could_be_read(tmp_path):
    records = [json.dumps({"prompt": f"p{i}", "chosen": "a" * 50, "rejected": f"b{i}"}) for i in range(3000)]
    data = gzip.compress("\n".join(records).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    report = import_preferences(tmp_path / "cut.jsonl.gz", ORIGIN)
    assert 100 < len(report.preferences) < 3000
    assert len(report.errors) == 1
    assert "archive" in report.errors[0]
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    assert "archive" in import_preferences(tmp_path / "no.jsonl.gz", ORIGIN).errors[0]


def test_repetitions_and_equal_answers_are_dropped_and_counted(tmp_path):
    one = {"prompt": "p", "chosen": "a", "rejected": "b"}
    report = read(tmp_path, one, {**one, "licence": "other"}, {**one, "rejected": "a"}, b"", one)
    assert (len(report.preferences), report.duplicates, report.equal, report.records) == (1, 2, 1, 4)


def test_turns_of_one_conversation_are_one_group():
    first = "\n\nHuman: hi\n\nAssistant:"
    assert group_of(first) == group_of(CHAT)
    assert group_of(first) != group_of(first.replace("hi", "ho"))
    assert group_of("What does\n\nAssistant: mean?") != group_of("What does\n\nAssistant: say?")
    assert group_of("a") != group_of("b")


def test_a_missing_file(tmp_path):
    with pytest.raises(NotFound, match="no file"):
        import_preferences(tmp_path / "none.jsonl", ORIGIN)
