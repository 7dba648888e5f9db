"""The page of a decision: complete, escaped, deterministic, refused where evidence was changed."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import Corrupt, NotFound, Refused
from tasks.evaluation.serving import Serving, serving_evidence
from tasks.pages import figures
from tasks.pages.figures import Axis, Interval, Item
from tasks.pages.parts import bounded, number, plain
from tasks.promotion.page.document import Recorded, headline, next_steps, read_record, render
from tasks.promotion.page.forest import forest, forest_picture
from tasks.promotion.policy import Policy
from tasks.reward import metrics
from tasks.reward.checks import judge_report
from tests.promotion.decisions import (
    ENVIRONMENTS,
    LACKING,
    NASTY,
    any_evidence,
    decided,
    item,
    keep,
    outcomes,
    record,
    reward_report,
    serving_report,
)

RECORDED = Recorded(17, "2026-11-23T03:33:34.123456+00:00", "service", "85" * 32)
_VOID = {"meta", "link", "br", "wbr", "hr", "img", "input", "col"}


class Checked(HTMLParser):
    """Parses a page and objects to what a browser would silently repair."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def parsed(page: str) -> Checked:
    found = Checked()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


def page_of(path: Path, recorded: Recorded | None = RECORDED) -> str:
    return render(read_record(path), path.parent.parent, recorded)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A record with evidence of every kind, verdict and unit."""
    return record(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def page(whole: Path) -> str:
    return page_of(whole)


def test_it_is_well_formed_stands_alone_and_is_small(page: str):
    found = parsed(page)
    assert len(found.ids) == len(set(found.ids))
    referred = {v for _, name, v in found.attributes if name == "aria-labelledby"}
    assert referred <= set(found.ids)
    assert found.tags["html"] == found.tags["body"] == found.tags["h1"] == 1
    assert not {"script", "iframe", "link", "img", "object", "base", "form"} & set(found.tags)
    assert not [a for a in found.attributes if a[1] in ("src", "href", "srcset") or a[1].startswith("on")]
    assert not re.search(r"@import|url\(|https?://", page.replace("http-equiv", ""))
    assert (
        "meta",
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    ) in found.attributes
    assert len(page.encode()) < 300_000


def test_every_figure_is_xml_and_has_words(page: str):
    pictures = re.findall(r"<svg [^>]*role=\"img\".*?</svg>(?=</?\w|[A-Z\s])", page, re.S)
    assert len(pictures) > 20
    found = parsed(page)
    roles = [value for tag, name, value in found.attributes if (tag, name) == ("svg", "role")]
    labels = [value for tag, name, value in found.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(roles) == len(labels)
    assert all(labels)


def test_it_says_the_verdict_who_when_and_everything_that_was_weighed(page: str, whole: Path):
    text = parsed(page).text
    assert "agent/3 is not promoted over agent/2" in text
    assert "guard/reasoning_gym/chain_sum failed" in text
    assert "2026-11-23 03:33:34 UTC" in text
    assert "ledger entry 17" in text
    assert whole.stem in text
    for evidence in any_evidence():
        assert evidence["name"] in text
        assert evidence["verdict"] in text
        if evidence["digest"]:
            assert evidence["digest"] in text
    for env in ENVIRONMENTS:
        assert env in text
    assert "+0.226 [+0.145, +0.307]" in text
    assert "−0.220 [−0.310, −0.130]" in text
    assert "1.840 [≤ 2.310]" in text
    assert "0.0075 spent before, 0.0025 by this decision, 0.04 of 0.05 left" in text
    assert "this is use 4 of 20" in text
    assert "forebay decision replay agent/3" in text
    assert "min_tasks: 30" in text


def test_means_of_the_environments_are_those_of_the_outcomes_and_differences_those_of_the_gate(whole: Path):
    content = json.loads(whole.read_bytes())
    lines = (whole.parent.parent / content["inputs"]["outcomes"]["path"]).read_text().splitlines()[1:]
    rows, text = [json.loads(line) for line in lines], parsed(page_of(whole)).text
    weighed = {"calculator": "[+0.154, +0.279]", "largest": "[−0.160, +0.080]"}
    for env, bounds in weighed.items():
        of = [row for row in rows if row["env"] == env]
        sides = [sum(row[f"{who}_reward"] for row in of) / len(of) for who in ("candidate", "champion")]
        won = sum(row["candidate_reward"] > row["champion_reward"] for row in of)
        lost = sum(row["candidate_reward"] < row["champion_reward"] for row in of)
        shown = rf"{sides[0]:.3f}\s*{sides[1]:.3f}\s*0\.100\s*0\.200\s*\+{sides[0] - sides[1]:.3f} {re.escape(bounds)}\s*{won}\s*{lost}\s*{len(of)}"
        assert re.search(shown, text), env
    assert f"{LACKING}: no baselines: it hung: <script>alert" in text


def test_what_agents_wrote_is_text_and_is_cut(page: str):
    assert "<script>" not in page
    assert "\u202e" not in page
    assert "\x00" not in page
    assert plain(NASTY) in parsed(page).text
    assert "9" * 701 not in page


def test_a_long_answer_says_how_much_is_missing(tmp_path: Path):
    path = record(tmp_path, evidence=[])
    lines = [json.loads(line) for line in (tmp_path / outcomes(tmp_path)["path"]).read_text().splitlines()]
    lines[1] |= {"candidate_reward": 1.0, "champion_reward": 0.0, "candidate_response": "x" * 100_000}
    only = [lines[0], lines[1]]
    data = b"".join(canonical_json(line) + b"\n" for line in only)
    write_atomic(tmp_path / "outcomes" / "one.jsonl", data)
    content = json.loads(path.read_bytes())
    content["inputs"]["outcomes"] = {"path": "outcomes/one.jsonl", "sha256": sha256_bytes(data)}
    page = render(canonical_json(content), tmp_path)
    assert "x" * 700 in page
    assert "x" * 701 not in page
    assert "99,300 more characters" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\u202eexe", "⟨202E⟩exe"),
        ("\x1b[31m", "⟨001B⟩[31m"),
        ("\ud800", "⟨D800⟩"),
        ("é🙂", "é🙂"),
    ],
)
def test_characters_that_hide_are_named(text: str, shown: str):
    assert plain(text) == shown
    plain(text).encode()


def test_equal_records_give_equal_bytes_whatever_the_folder(tmp_path: Path):
    pages = []
    for name in ("a", "b"):
        path = record(tmp_path / name)
        pages.append(page_of(path))
        assert str(tmp_path) not in pages[-1]
    assert pages[0] == pages[1]
    assert page_of(path, None) != pages[0]


@pytest.mark.parametrize("kind", ["outcomes", "reward", "serving", "replay_value", "proxy", "run"])
@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_changed_or_missing_evidence_is_named_and_no_page_is_drawn(tmp_path: Path, kind: str, harm: str):
    path = record(tmp_path)
    target = tmp_path / json.loads(path.read_bytes())["inputs"][kind]["path"]
    if harm == "gone":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes() + b"\n")
    with pytest.raises(Corrupt if harm == "changed" else NotFound, match=target.name):
        page_of(path)


def test_a_changed_record_is_refused(tmp_path: Path):
    path = record(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"FAIL"', b'"PASS"', 1))
    with pytest.raises(Corrupt, match=r"was changed"):
        read_record(path)


def test_evidence_of_an_unknown_format_is_named_and_not_guessed_at(tmp_path: Path):
    strange = keep(tmp_path, "serving", {"schema": "forebay.serving/99", "note": NASTY})
    text = parsed(page_of(record(tmp_path, probes={"serving": strange}))).text
    assert "a forebay.serving/99, which this version of Forebay does not draw" in text


def test_a_record_with_the_least_possible_content_has_a_page(tmp_path: Path):
    content = {
        "schema": "forebay.decision/1",
        "candidate": {"version": 2, "digest": "a" * 64},
        "champion": {"version": 1, "digest": "b" * 64},
        "verdict": "INCONCLUSIVE",
        "reasons": ["There is no evidence."],
        "evidence": [],
        "policy": {},
        "policy_digest": "c" * 64,
        "inputs": {},
    }
    text = parsed(render(canonical_json(content), tmp_path)).text
    assert "agent/2 is not promoted over agent/1" in text
    assert "No evidence has a number." in text
    assert "in no ledger" in text


def test_a_policy_of_another_version_is_refused_and_no_traceback(tmp_path: Path):
    content = {**json.loads(record(tmp_path).read_bytes()), "policy": {"superiority": {"alpha": 0.05}}}
    with pytest.raises(Refused, match="draw its page with the version that wrote it"):
        render(canonical_json(content), tmp_path)


# --------------------------------------------------------------------------------------- a decision of the gate


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """What the gate itself says about all the evidence files."""
    return decided(tmp_path_factory.mktemp("judged"), graded=True)


def test_the_page_of_the_gates_own_decision_has_every_section_and_sentence(judged: Path):
    content, found = json.loads(judged.read_bytes()), parsed(page_of(judged))
    assert content["verdict"] == "FAIL"
    assert "reward model failed" in found.text
    for evidence in content["evidence"]:
        assert evidence["says"].replace("`", "") in found.text
    for title in ("Reward model", "What the reward model thinks", "On logged traffic", "Serving", "Training"):
        assert title in found.text
    assert len(found.ids) == len(set(found.ids))
    assert "does not draw" not in found.text
    assert len(page_of(judged).encode()) < 300_000


def test_the_reward_model_is_shown_by_the_checks_that_the_gate_makes(judged: Path):
    verdict, checks = judge_report(reward_report(), Policy().reward_model)
    text = parsed(page_of(judged)).text
    assert f"{verdict}, by {sum(c.counts for c in checks)} checks that count of {len(checks)}" in text
    for check in checks:
        assert check.name in text
        assert (check.says.replace("`", "") in text) == (not check.counts or check.verdict != "PASS"), (
            check.name
        )
    curve = metrics.best_of_n(reward_report())
    assert ", ".join(f"n = {point.n}: {point.gold:.3f}" for point in curve) in page_of(judged)


def test_a_reward_model_without_samples_has_no_curve_and_a_judge_no_calibration(tmp_path: Path):
    bare = keep(tmp_path, "reward", reward_report() | {"samples": [], "edits": [], "probes": []})
    judge = keep(tmp_path, "reward", reward_report(source={"kind": "judge", "digest": "7" * 64}))
    page = page_of(record(tmp_path, reward=bare))
    assert "how often right" in page
    assert "↑ verified reward" not in page
    page = page_of(record(tmp_path, reward=judge))
    assert "how often right" not in page
    assert "The judge 777777777777" in page


def test_a_log_that_says_nothing_and_an_agent_that_does_not_serve_are_sentences(tmp_path: Path):
    log = {"schema": "forebay.replay_value/1", "log": None, "problem": "Trained on every prompt."}
    served = serving_evidence(Serving("it has no weights", "agent"), Serving(), ["q"], device="cpu")
    served["champion"] = serving_report()["champion"]
    text = parsed(
        page_of(
            record(
                tmp_path,
                replay_value=keep(tmp_path, "replay_value", log),
                serving=keep(tmp_path, "serving", served),
            )
        )
    ).text
    assert "Trained on every prompt." in text
    assert "The candidate does not serve: it has no weights." in text


def test_off_policy_numbers_are_those_of_the_gate(judged: Path):
    weighed = {e["name"]: e for e in json.loads(judged.read_bytes())["evidence"]}["replay value"]
    shown = bounded(Interval(weighed["estimate"], weighed["low"], weighed["high"]), signed=True)
    assert (
        len(re.findall(re.escape(shown), parsed(page_of(judged)).text)) >= 2
    )  # in the forest and by its estimator


# ---------------------------------------------------------------------------------------- sentences and steps


def ruled(verdict: str, *items, approval: str = "none") -> dict:
    return {
        "candidate": {"version": 3},
        "champion": {"version": 2},
        "verdict": verdict,
        "evidence": list(items),
        "policy": Policy(approval=approval).model_dump(mode="json"),
    }


@pytest.mark.parametrize(
    ("decision", "sentence"),
    [
        (
            ruled("PASS", item("quality"), item("data"), item("replay value", "FAIL", counts=False)),
            "agent/3 may replace agent/2: all 2 required pieces of evidence pass.",
        ),
        (
            ruled("PASS", item("quality"), approval="required"),
            "agent/3 may replace agent/2 once a person approves: the only required piece of evidence passes.",
        ),
        (
            ruled("FAIL", item("quality"), item("data", "FAIL"), item("guard/x", "INCONCLUSIVE")),
            "agent/3 is not promoted over agent/2: of 3 required pieces of evidence, data failed.",
        ),
        (
            ruled(
                "INCONCLUSIVE",
                item("a", "INCONCLUSIVE"),
                item("b", "INCONCLUSIVE"),
                item("c", "INCONCLUSIVE"),
            ),
            "agent/3 is not promoted over agent/2: of 3 required pieces of evidence, a, b and c left the question open.",
        ),
    ],
)
def test_the_verdict_in_one_sentence(decision: dict, sentence: str):
    assert headline(decision) == sentence


def test_the_next_steps_follow_the_verdict_and_the_policy():
    commands = [
        command for command, _ in next_steps(ruled("PASS", item("quality"), approval="required"), "d" * 64)
    ]
    signed = f"forebay approve {'d' * 64} --print"
    assert commands[:3] == ["forebay approve agent/3", signed, "forebay promote agent/3"]
    assert any(command.startswith("forebay reject agent/3") for command in commands)
    assert "forebay promote agent/3" in [c for c, _ in next_steps(ruled("PASS", item("quality")), "d" * 64)]
    for verdict in ("FAIL", "INCONCLUSIVE"):
        assert not [
            c for c, _ in next_steps(ruled(verdict, item("quality", verdict)), "d" * 64) if "promote" in c
        ]


def test_a_decision_about_a_reward_model_is_told_and_answered_as_one():
    made = ruled("PASS", item("quality"), approval="required") | {"schema": "forebay.reward_decision/1"}
    assert headline(made).startswith("reward/3 may replace reward/2")
    commands = [command for command, _ in next_steps(made, "d" * 64)]
    assert commands[0] == "forebay approve reward/3"
    assert "forebay reward promote reward/3" in commands
    first = made | {"champion": {"version": 0, "digest": ""}}
    assert "nobody" in headline(first)
    assert not [command for command, _ in next_steps(first, "d" * 64) if "rollback" in command]
    failed = made | {"verdict": "FAIL"}
    assert all(command.startswith("forebay reward ") for command, _ in next_steps(failed, "d" * 64))


# ------------------------------------------------------------------------------------------------- the forest


def test_the_forest_has_one_axis_a_unit_and_the_reward_comes_first():
    groups = forest(any_evidence()).groups
    assert [g.title for g in groups] == [
        "Mean reward, candidate less champion", "Share", "Seconds", "Nats", "Seconds", "Without an interval or a margin"
    ]  # fmt: skip
    assert [row.name for row in groups[0].rows][:2] == ["quality", "guard/calculator"]
    assert [(row.name, row.cells[0], row.figure) for row in groups[-1].rows] == [
        ("omens", "3.000 ravens", None)
    ]
    assert sum(len(g.rows) for g in groups) == sum(e["estimate"] is not None for e in any_evidence())


def test_the_forest_is_also_one_svg_file():
    picture = ElementTree.fromstring(forest_picture(any_evidence()))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    words = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "guard/largest" in words
    assert "+0.226 [+0.145, +0.307]" in words


def test_marks_stand_where_their_numbers_say():
    axis = Axis(-0.1, 0.3)
    row = Item("quality", "PASS", Interval(0.2, 0.1, 0.3), 0.0, 0.1, "words")
    picture = ElementTree.fromstring(figures.strip(axis, row))
    lines = [(e.get("x1"), e.get("x2"), e.get("class")) for e in picture.iter("line")]
    assert ("50.00%", "100.00%", "bar pass") in lines
    assert ("25.00%", "25.00%", "margin") in lines
    assert [e.get("x") for e in picture.iter("svg") if e.get("x")] == ["50.00%", "75.00%"]


def test_a_bound_that_is_missing_reaches_the_edge_and_has_no_end():
    picture = ElementTree.fromstring(
        figures.strip(Axis(0, 4), Item("serving", "PASS", Interval(1.0, None, 2.0), None, None, "words"))
    )
    bars = [(e.get("x1"), e.get("x2")) for e in picture.iter("line") if e.get("class") == "bar pass"]
    assert bars == [("0.00%", "50.00%"), ("50.00%", "50.00%")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.13, 0.34, [-0.1, 0, 0.1, 0.2, 0.3]),
        (0, 4342, [0, 1000, 2000, 3000, 4000]),
        (1e-4, 9e-4, [2e-4, 4e-4, 6e-4, 8e-4]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low: float, high: float, ticks: list[float]):
    assert Axis(low, high).ticks() == pytest.approx(ticks)


@pytest.mark.parametrize("values", [[], [None], [float("nan")], [0.0], [3.0, 3.0], [-2.0]])
def test_an_axis_over_hardly_anything_has_a_length(values: list):
    axis = Axis.over(values)
    assert axis.low < axis.high
    assert axis.ticks()


def test_verdicts_differ_by_shape_and_not_only_by_colour():
    shapes = {
        re.search(r' d="([^"]+)"', figures.verdict_mark(v))[1] for v in ("PASS", "FAIL", "INCONCLUSIVE")
    }
    assert len(shapes) == 3


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.1234, False, "0.123"),
        (0.1234, True, "+0.123"),
        (-0.2, True, "−0.200"),
        (-0.0004, True, "0.000"),
        (181.42, False, "181.4"),
        (40960.0, False, "40,960"),
        (None, True, ""),
    ],
)
def test_numbers_keep_as_many_digits_as_they_are_worth(value: float | None, signed: bool, text: str):
    assert number(value, signed=signed) == text
