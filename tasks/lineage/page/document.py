"""The page of an audit as one HTML file: built from an `Audit` alone, so that equal facts give equal bytes.

It asks nothing of the network, and its content policy forbids it to. Its one script serves the graph and is named in the policy
by its digest, so that no other runs even if something written by an agent or by somebody outside should not be escaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from markupsafe import Markup

from tasks.core.errors import ForebayError
from tasks.lineage.page import graph
from tasks.lineage.page.graph import Fact
from tasks.lineage.page.types import Amount, Audit, Part, Version
from tasks.lineage.picture import HEIGHT, WIDTH
from tasks.lineage.types import Kind, Node
from tasks.pages import figures
from tasks.pages.parts import Chart, Section, Strips, listed, plain
from tasks.pages.templates import resource, template
from tasks.promotion.page.document import headline as decided
from tasks.promotion.page.document import lead, policy_of
from tasks.promotion.page.forest import forest
from tasks.promotion.page.reports import report_section

Tone = Literal["pass", "fail", "open"]

_HERE = "tasks.lineage.page"
_CURVES = (
    ("reward_estimate", "Reward, estimated for the policy in training"),
    ("kl_k3", "KL from the policy it started from"),
    ("ess", "Effective sample size, a share of the batch"),
    ("entropy", "Entropy, nats a token"),
    ("grad_norm", "Norm of the gradient"),
    ("loss", "Loss"),
)
_MADE: tuple[Kind, ...] = ("agent", "source", "run", "dataset", "preferences")
_VERSIONS = 12  # of a dataset that are shown at once; the older ones are folded
_TOLD = 200  # differences that a page lists one by one
_PROBLEMS = (  # the order of the groups, and what each means
    ("changed", "Changed: the bytes are not those of the recorded digest"),
    ("missing", "Missing"),
    ("unreadable", "Unreadable"),
    ("added", "Added: in a registered folder, but never registered"),
    ("forged", "Forged signatures"),
    ("wrong key", "Signed by a key that may not"),
    ("unsigned", "Unsigned, though the workspace had keys"),
)


@dataclass(frozen=True)
class Verdict:
    """What the verification came to: a tone, one or two words, a sentence."""

    tone: Tone
    word: str
    says: str


@dataclass(frozen=True)
class Rows:
    """A table of amounts: (names of a row, rows, groups, groups learnt from or None)."""

    heads: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], Amount], ...]
    total: Amount | None = None


@dataclass(frozen=True)
class Problems:
    """Differences of one kind: (path, what it belongs to, expected, found); `more` are not listed."""

    title: str
    rows: tuple[tuple[str, str, str, str], ...]
    more: int


@dataclass(frozen=True)
class Gate:
    """The newest decision: its verdict and sentences, and its intervals."""

    verdict: str
    digest: str
    headline: str
    lead: tuple[str, ...]
    forest: Strips
    evidence: tuple[Mapping[str, Any], ...]


def build(audit: Audit) -> str:
    """Return the page."""
    node = audit.lineage.nodes[audit.lineage.root]
    script = resource(_HERE, "graph.js")
    cards = graph.cards(audit.lineage)
    page: str = template(_HERE, "page.html.jinja").render(
        audit=audit,
        node=node,
        name=plain(graph.name_of(node)),
        kind=graph.kind_of(node),
        csp=_content_policy(script),
        css=Markup(resource(_HERE, "page.css")),
        script=Markup(script),
        moment=moment,
        verdict=verdict(audit),
        headline=plain(headline(audit)),
        identity=_identity(audit),
        picture=graph.picture(audit.lineage),
        box=(WIDTH, HEIGHT),
        cards=cards,
        unlisted=len(audit.lineage.nodes) - len(cards),
        kinds=_kinds(audit),
        versions=_versions(audit),
        unfolded=_VERSIONS,
        composition=_composition(audit),
        learnt=_learnt(audit),
        settings=_settings(audit),
        charts=_charts(audit),
        cost=_cost(audit),
        gate=_gate(audit),
        reward=_reward(audit),
        problems=_problems(audit.report),
        descendants=_descendants(audit),
    )
    return page


def headline(audit: Audit) -> str:
    """Say in one sentence what the audited thing is to this workspace."""
    node = audit.lineage.nodes[audit.lineage.root]
    if node.kind == "dataset":
        facts = node.facts
        return f"{node.name}: {facts['rows']:,} rows in {facts['groups']:,} groups, sealed {_day(facts['sealed'])}."
    if node.kind not in ("agent", "source"):
        return f"{graph.kind_of(node)} {graph.name_of(node)}"
    if not audit.terms:
        return f"{node.name} was never in office."
    last = audit.terms[-1]
    what = "the champion" if node.kind == "agent" else "the reward model in office"
    if last.until is None:
        return f"{node.name} is {what}: put in office {_day(last.since)} by {last.by}."
    first, end = _day(last.since), _day(last.until)
    return f"{node.name} was {what} " + (f"on {first}." if first == end else f"from {first} to {end}.")


def verdict(audit: Audit) -> Verdict:
    """Return what the verification came to."""
    report = audit.report
    if report is None:
        return Verdict("open", "NOT VERIFIED", "Nothing was hashed for this page; `forebay verify` does it.")
    problems, unreachable = report["problems"], report.get("unreachable") or ()
    if problems:
        of = f", of {report['checked']:,} digests" if report["checked"] else ""
        counts = Counter(problem["problem"] for problem in problems)
        what = listed([f"{n} {word}" for word, n in counts.most_common()])
        return Verdict("fail", "DIFFERS", f"{what}{of}.")
    if unreachable:
        return Verdict(
            "open", "INCOMPLETE", f"{len(unreachable)} files could not be reached; all others agree."
        )
    signed = f" and {report['signatures']:,} signatures hold" if report.get("signatures") else ""
    read = f"{_bytes(report['bytes'])} read"
    if report.get("cached"):
        read += f", {report['cached']:,} files not read again, for their stat is unchanged"
    return Verdict("pass", "VERIFIED", f"{report['checked']:,} digests agree{signed}, {read}.")


def moment(time: str) -> str:
    """Write a time of the ledger as people read it, to the minute."""
    return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")


def _day(time: str) -> str:
    return time[:10]


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError


def _content_policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


# ------------------------------------------------------------------------------------------------------- identity


def _identity(audit: Audit) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (what, [(words, digest or id)]) of everything by which the thing can be found again."""
    found, root = audit.lineage, audit.lineage.root
    node = found.nodes[root]
    facts = node.facts
    lines: list[tuple[str, list[tuple[str, str]]]] = [("SHA-256", [("", node.digest or "none")])]
    if facts.get("roles"):
        lines.append(("roles", [(", ".join(facts["roles"]), "")]))
    for term in audit.terms:
        end = moment(term.until) if term.until else "now"
        says = f"{moment(term.since)} to {end}, put there by {term.by}: {term.reason}"
        lines.append(("in office", [(plain(says), "")]))
    if node.kind == "agent":
        lines.append(("made by", [(plain(f"{facts['origin']}, {facts['source'].get('name', '')}"), "")]))
    for kind, what in (("base", "base model"), ("code", "code"), ("lock", "packages"), ("policy", "policy")):
        near = [n for n in _near(audit) if n.kind == kind]
        if near:
            lines.append((what, [(_worded(n), n.digest or "") for n in near]))
    if facts.get("tokenizer_digest"):
        lines.append(("tokenizer", [("", facts["tokenizer_digest"])]))
    mlflow = dict(facts.get("mlflow") or {})
    if mlflow:
        office = root[1].partition("/")[0]
        ids = [("model version", f"{office} {mlflow.get('version', '')}"), ("model", mlflow.get("model_id")), ("run", mlflow.get("run_id"))]  # fmt: skip
        lines.append(("MLflow", [(word, str(value)) for word, value in ids if value]))
    data = (
        facts
        if node.kind == "dataset"
        else found.nodes[audit.data.versions[0].ref].facts
        if audit.data
        else {}
    )
    if data.get("dvc"):
        dvc = data["dvc"]
        lines.append(("DVC", [(plain(f"{dvc.get('path', '')}, MD5"), str(dvc.get("md5", "")))]))
        lines.append(("git, of the data", [("commit", str(data.get("git_commit") or "none"))]))
    lines.append(("ledger", [(f"{audit.entries:,} entries, head", audit.head)]))
    return lines


def _near(audit: Audit) -> Iterator[Node]:
    """Yield what the thing, its run and its newest decision name themselves; older generations have their own."""
    found, root = audit.lineage, audit.lineage.root
    ours = {root}
    if audit.training is not None:
        ours.add(audit.training.ref)
    ours |= {edge.target for edge in found.following[root] if edge.relation in ("judged by", "trained by")}
    seen = set()
    for ref in ours if len(ours) < 2 else [r for r in found.nodes if r in ours]:
        for edge in found.following[ref]:
            if edge.target not in seen:
                seen.add(edge.target)
                yield found.nodes[edge.target]


def _worded(node: Node) -> str:
    if node.kind == "code":
        commit = node.facts.get("commit")
        words = f"commit {commit}" if commit else "outside git"
        return plain(words + (" with changes" if node.facts.get("changed") else "")) + ", digest"
    return plain(node.name)


# ----------------------------------------------------------------------------------------------------------- data


def _kinds(audit: Audit) -> list[tuple[str, int]]:
    counts = Counter(graph.kind_of(node) for node in audit.lineage.nodes.values())
    return counts.most_common()


def _versions(audit: Audit) -> Rows | None:
    if audit.data is None:
        return None
    rows = tuple(((version.ref[1], _sealed(audit, version)), version.new) for version in audit.data.versions)
    facts = audit.lineage.nodes[audit.data.versions[0].ref].facts
    total = Amount(facts["rows"], facts["groups"], audit.data.learnt)
    return Rows(("version", "sealed"), rows, total)


def _sealed(audit: Audit, version: Version) -> str:
    return moment(audit.lineage.nodes[version.ref].facts["sealed"])


def _composition(audit: Audit) -> list[Rows]:
    """Return what the data are by environment, source and licence together, and by licence alone."""
    if audit.data is None:
        return []
    parts: dict[Part, Amount] = {}
    for version in audit.data.versions:
        for part, amount in (version.parts or {}).items():
            parts[part] = _plus(parts.get(part), amount)
    if not parts:
        return []
    licences: dict[tuple[str, ...], Amount] = {}
    for (_, _, licence), amount in parts.items():
        licences[(licence,)] = _plus(licences.get((licence,)), amount)
    whole = Rows(("environment", "source", "licence"), _ranked(parts))
    return [whole] if len(parts) == 1 else [whole, Rows(("licence",), _ranked(licences))]


def _ranked(amounts: Mapping[Any, Amount]) -> tuple[tuple[tuple[str, ...], Amount], ...]:
    ranked = sorted(amounts.items(), key=lambda item: (-item[1].rows, item[0]))
    return tuple(
        (tuple(plain(name) if name.strip() else "not recorded" for name in names), a) for names, a in ranked
    )


def _plus(first: Amount | None, second: Amount) -> Amount:
    if first is None:
        return second
    known = first.learnt is not None and second.learnt is not None
    learnt = (first.learnt or 0) + (second.learnt or 0) if known else None
    return Amount(first.rows + second.rows, first.groups + second.groups, learnt)


def _learnt(audit: Audit) -> str:
    data = audit.data
    if data is None or data.learnt is None:
        return ""
    groups = audit.lineage.nodes[data.versions[0].ref].facts["groups"]
    run = audit.training.ref if audit.training else audit.lineage.root
    fresh = sum(edge.relation == "collected" for edge in audit.lineage.following[run])
    beside = f" It also learnt from {fresh:,} shards of groups that it collected itself." if fresh else ""
    return (
        f"The run learnt from {data.learnt:,} of these {groups:,} groups; the others were never drawn, or admission refused "
        f"them (no spread in reward, too old a policy).{beside}"
    )


# ------------------------------------------------------------------------------------------------------- training


def _settings(audit: Audit) -> tuple[Fact, ...]:
    if audit.training is None:
        return ()
    return graph.facts(audit.lineage.nodes[audit.training.ref].facts.get("settings", {}))


def _cost(audit: Audit) -> str:
    if audit.training is None:
        return ""
    run = audit.lineage.nodes[audit.training.ref].facts
    begun, ended = run["started"], run["finished"]
    seconds = (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds()
    says = f"{run['steps']:,} steps ({run['stop_reason']}) on {run['device']} in {run['dtype']}, seed {run['seed']}, {_duration(seconds)}"
    spent = audit.training.resources
    if "cpu_seconds" in spent:
        says += f"; {_duration(spent['cpu_seconds'])} of processor time"
    if "memory_mib" in spent:
        says += f", {spent['memory_mib']:,.0f} MiB at most"
    return plain(says + ".")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _charts(audit: Audit) -> list[Chart]:
    curve = audit.training.curve if audit.training else ()
    charts = []
    for name, says in _CURVES:
        points = [(row["step"], row[name]) for row in curve if _finite(row.get(name))]
        if len(points) > 1:
            caption = f"{says}: {points[0][1]:.3g} to {points[-1][1]:.3g}."
            charts.append(Chart(figures.course(points, caption, below="step"), caption))
    return charts


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------------- evidence


def _gate(audit: Audit) -> Gate | None:
    decision = audit.decision and audit.decision.content
    if not decision:
        return None
    digest = audit.decision.path.rpartition("/")[2].removesuffix(".json") if audit.decision else ""
    return Gate(
        decision["verdict"],
        digest,
        decided(decision),
        tuple(map(plain, lead(decision))),
        forest(decision["evidence"]),
        tuple(decision["evidence"]),
    )


def _reward(audit: Audit) -> Section | None:
    report = audit.reward and audit.reward.content
    if not report:
        return None
    policy = audit.policy
    try:
        if audit.decision and audit.decision.content:
            policy = policy_of(audit.decision.content)
        return report_section("reward", str(report.get("schema", "")), report, policy)
    except (ForebayError, KeyError, TypeError, ValueError) as error:
        return Section(
            "Reward model", (f"Its report cannot be drawn by this version of Forebay ({plain(str(error))}).",)
        )


def _problems(report: Mapping[str, Any] | None) -> list[Problems]:
    """Group the differences by what is wrong."""
    problems = report["problems"] if report else ()
    known = dict(_PROBLEMS)
    names = [*known, *sorted({p["problem"] for p in problems} - known.keys())]
    found = [
        (known.get(name, name.capitalize()), [p for p in problems if p["problem"] == name]) for name in names
    ]
    return [
        Problems(title, tuple(_told(part[:_TOLD])), max(0, len(part) - _TOLD))
        for title, part in found
        if part
    ]


def _told(problems: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    for problem in problems:
        yield (
            plain(problem["path"]),
            plain(problem["owner"]),
            problem["expected"][:12],
            plain((problem["found"] or "")[:12]),
        )


def _descendants(audit: Audit) -> str:
    """Say what was made from it since."""
    counts = audit.descendants
    if counts is None:
        return "What was made from it since cannot be told: rows that it rests on cannot be read."
    words = [_plural(kind, counts[kind]) for kind in _MADE if counts.get(kind)]
    return f"Shaped by it since: {listed(words)}." if words else "Nothing was made from it since."


def _plural(kind: Kind, n: int) -> str:
    name = graph.TITLES.get(kind, kind)
    return f"{n:,} {name}" if n == 1 or name.endswith("s") else f"{n:,} {name}s"
