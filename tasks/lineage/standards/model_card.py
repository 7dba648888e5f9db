"""An agent's Hugging Face model card, filled from the ledger and the files it names.

Method: https://huggingface.co/docs/hub/model-cards; the front matter is made by huggingface_hub. A fact that was never
recorded is said to be not recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tasks.core.digest import canonical_json
from tasks.lineage.standards.cards import (
    agent_of,
    base_licence,
    headline,
    items,
    metric_of,
    not_held,
    policy_of,
    scores,
    spdx,
)
from tasks.lineage.standards.material import NOT_RECORDED, Composition, Material, utc
from tasks.lineage.types import Ref

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def card(material: Material) -> str:
    """Return the model card of the agent at the root of the lineage as Markdown with YAML front matter.

    Raises:
        UsageError: the root is no agent.
    """
    agent = agent_of(material)
    decision = material.newest_decision(agent)
    parts = [
        f"---\n{_front_matter(material, agent, decision)}\n---\n",
        f"# {agent[1]}\n",
        f"{_identity(material, agent)}\n",
        _section("Revoked data", _revoked(material)),
        _section("Intended use and limits", _use(material, agent, decision)),
        _section("Training", _training(material, agent)),
        _section("Training data", _data(material, agent)),
        _section("Reward model", _reward(material, agent, decision)),
        _section("Evaluation", _evaluation(material, decision)),
        _section("How to check this card", _check(agent)),
    ]
    return "\n".join(parts)


def _front_matter(material: Material, agent: Ref, decision: Ref | None) -> str:
    from huggingface_hub import ModelCardData

    trained = material.root.facts["origin"] != "base"
    licence = None if trained else base_licence(material, agent)[0]  # nobody licensed a trained agent
    sources = [material.node(base).name for base in material.bases(agent)]
    hub = [name for name in sources if _HUB_ID.fullmatch(name)]
    results = [
        _result("mean_reward", "mean reward", "" if name == "all" else name, row["candidate"])
        for name, row in scores(material, decision).items()
    ]
    for item in items(material, decision):
        if item["estimate"] is not None:
            name, part = metric_of(item)
            words = f"{name} ({item['unit']}){_interval(item, ', interval ')}"
            results.append(_result(name.replace(" ", "_").replace("/", "_"), words, part, item["estimate"]))
    data = ModelCardData(
        base_model=hub[0] if hub else None,
        library_name="transformers",
        license=licence.lower() if licence and spdx([licence]) else None,
        model_name=agent[1],
        eval_results=results or None,
        pipeline_tag="text-generation",
        tags=["forebay"],
    )
    text: str = data.to_yaml(line_break="\n")
    return text.strip()


def _result(metric: str, words: str, part: str, value: float) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type="forebay-held-out-tasks",
        dataset_name=f"held-out tasks of {part}" if part else "held-out tasks",
        dataset_config=part or None,
        metric_type=metric,
        metric_name=words,
        metric_value=value,
    )


def _identity(material: Material, agent: Ref) -> str:
    node = material.root
    facts = node.facts
    rows = {
        "Digest": f"`{node.digest}`",
        "Office": ", ".join(facts["roles"]) or "none",
        "Registered": utc(facts["registered"]),
        "Origin": facts["origin"],
        "Base model": ", ".join(material.node(base).name for base in material.bases(agent)) or NOT_RECORDED,
        "Earlier agents": _earlier(material, agent),
        "Licence of the base model": base_licence(material, agent)[1],
        **({} if facts["origin"] == "base" else {"Licence of the agent itself": NOT_RECORDED}),
        "MLflow": ", ".join(f"{key} {value}" for key, value in facts["mlflow"].items()),
        "Tokenizer": f"`{facts['tokenizer_digest']}`",
    }
    return _table(("", ""), rows.items())


def _earlier(material: Material, agent: Ref) -> str:
    """Name the agents from which it was trained on, newest first."""
    names = []
    while runs := material.known(agent, "trained by"):
        (agent,) = material.behind(runs[0], "started from")
        if agent[0] != "agent":
            break
        names.append(agent[1])
    return ", ".join(names) or "none"


def _use(material: Material, agent: Ref, decision: Ref | None) -> Iterator[str]:
    yield headline(material, agent, decision)
    yield f"Intended users and uses beyond that: {NOT_RECORDED}."
    limits = not_held(material, decision)
    if limits:
        yield _list(limits)


def _revoked(material: Material) -> Iterator[str]:
    flags = material.open_flags()
    if flags:
        yield "**Open flags.** It learnt from data that was revoked:"
        yield _list(f"{said}." for said in flags)
    else:
        yield "When this card was made, nothing that it learnt from was revoked."


def _training(material: Material, agent: Ref) -> Iterator[str]:
    runs = material.behind(agent, "trained by")
    if not runs:
        yield f"{agent[1]} was not trained here."
    yield from (f"The run `{run[1]}` is not in the ledger." for run in runs if not material.node(run).known)
    for run in material.known(agent, "trained by"):
        node = material.node(run)
        facts = node.facts
        started = [
            f"{material.node(init).name} (`{material.node(init).digest}`)"
            for init in material.behind(run, "started from")
        ]
        rows = {
            "Run": f"`{run[1]}`",
            "Started from": ", ".join(started),
            "Objective": facts["settings"].get("objective", NOT_RECORDED),
            "Steps": f"{facts['steps']} ({facts['stop_reason']})",
            "Groups it learnt from": facts.get("groups", NOT_RECORDED),
            "Seed": facts["seed"],
            "Device and number format": f"{facts['device']}, {facts['dtype']}",
            "Time": f"{utc(facts['started'])} to {utc(facts['finished'])}",
        }
        for code in material.behind(run, "run by code"):
            about = material.node(code)
            changed = " with changes that were not committed" if about.facts["changed"] else ""
            rows["Code"] = f"{about.name}{changed}, digest `{about.digest}`"
        for lock in material.behind(run, "with packages"):
            rows["Packages"] = f"{material.node(lock).name}, SHA-256 `{lock[1]}`"
        yield _table(("", ""), rows.items())
        yield "Settings:"
        yield _table(("setting", "value"), _flat(facts["settings"]))
        yield "Metrics at the end:"
        yield _table(("metric", "value"), sorted(facts["metrics"].items()))


def _data(material: Material, agent: Ref) -> Iterator[str]:
    datasets = [d for run in material.behind(agent, "trained by") for d in material.behind(run, "trained on")]
    if not datasets:
        yield "None: it was not trained here. What the base model learnt from is not recorded."
    for ref in datasets:
        if ref not in material.manifests:
            yield f"{ref[1]}: not in the ledger."
            continue
        manifest, made_of = material.manifests[ref], material.composition(ref)
        yield (
            f"{manifest.subject}: {manifest.rows:,} episodes in {manifest.groups:,} groups, "
            f"{_many(len(manifest.shards), 'shard')}, root `{manifest.root}`."
        )
        yield from _portions(material, made_of)
        left_out = material.without(ref)
        if left_out:
            yield f"Of its parent version it leaves out: {', '.join(left_out)}."
        policies = ", ".join(f"{b.version} (`{b.digest[:12]}`)" for b in manifest.behaviour)
        yield f"Sampled from: {policies or NOT_RECORDED}."
        for check in material.behind(ref, "checked by"):
            facts = material.node(check).facts
            yield f"Data validation: {facts['verdict']}, {_many(facts['checks'], 'check')}, {utc(facts['time'])}."
        for source in dict.fromkeys(material.behind(ref, "rewarded by")):
            yield f"Rewarded by {source[1]} (`{material.node(source).digest}`)."
    for run in material.known(agent, "trained by"):
        sampled = material.composition(run)
        if sampled != Composition(()):
            yield "Sampled by the run itself, from the policy in training:"
            yield from _portions(material, sampled)


def _portions(material: Material, made_of: Composition) -> Iterator[str]:
    rows = [
        (p.source, p.licence, f"{p.env} {p.env_version}", p.split, p.rows, p.groups) for p in made_of.portions
    ]
    yield _table(("source", "licence", "environment", "split", "episodes", "groups"), rows)
    if made_of.erased:
        yield "Erased on purpose, and not counted above:"
        yield _list(f"{path} ({material.erased[path]})" for path in made_of.erased)
    if made_of.absent:
        yield f"{_many(len(made_of.absent), 'shard')} that the workspace lacks: not counted above."


def _reward(material: Material, agent: Ref, decision: Ref | None) -> Iterator[str]:
    found = (
        []
        if decision is None
        else [ref for ref in material.behind(decision, "rests on") if ref[0] == "reward"]
    )
    if not found:
        yield f"Validation of a reward model behind the decision: {NOT_RECORDED}."
    for ref in found:
        node = material.node(ref)
        facts, right = node.facts, node.facts["accuracy"]
        rows: dict[str, Any] = {
            "Digest": f"`{node.digest}`",
            "Verdict": facts["verdict"],
            "Validated": utc(facts["time"]),
        }
        if right["estimate"] is not None:
            rows["Right on held-out pairs"] = (
                f"{right['estimate']} [{right['low']}, {right['high']}] of {right['n']}"
            )
        for source in material.behind(ref, "judges"):
            rows["Registered as"] = source[1]
            rows["Licences of its preferences"] = (
                ", ".join(material.node(source).facts["licences"]) or NOT_RECORDED
            )
        rows["Expected calibration error"] = NOT_RECORDED if facts["ece"] is None else facts["ece"]
        yield _table(("", ""), rows.items())
        yield _list(facts["reasons"])


def _evaluation(material: Material, decision: Ref | None) -> Iterator[str]:
    if decision is None:
        yield f"Evaluation: {NOT_RECORDED}; no decision was made."
        return
    facts = material.node(decision).facts
    champion = material.records[decision]["champion"]
    yield (
        f"Decision {facts['verdict']} of {utc(facts['time'])} (`{decision[1]}`), against version "
        f"{champion['version']} (`{champion['digest']}`), under the policy `{policy_of(material, decision)}`."
    )
    rows = [
        (name, row["candidate"], row["champion"], row["n"])
        for name, row in scores(material, decision).items()
    ]
    for ref in material.behind(decision, "rests on"):
        if ref[0] == "evaluation":
            yield f"Held-out tasks: set `{material.node(ref).facts['tasks_digest']}`."
    yield _table(("held-out tasks", "mean reward", "of the champion", "n"), rows)
    yield _table(
        ("evidence", "verdict", "estimate", "interval", "n", "held against", "unit"),
        [_row(item) for item in items(material, decision)],
    )
    for kind, word in (("approvals", "Approved"), ("rejections", "Rejected")):
        for answer in facts[kind]:
            yield f"{word} by {answer['by']} on {utc(answer['time'])}: {answer['reason']}"


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    name = item["name"] if item["counts"] else f"{item['name']} (not required)"
    if item["estimate"] is None:
        return name, item["verdict"], "", "", "", "", ""
    n, margin = ("" if item[name] is None else item[name] for name in ("n", "margin"))
    return name, item["verdict"], item["estimate"], _interval(item), n, margin, item["unit"]


def _interval(item: Mapping[str, Any], before: str = "") -> str:
    return "" if item["low"] is None or item["high"] is None else f"{before}[{item['low']}, {item['high']}]"


def _check(agent: Ref) -> Iterator[str]:
    yield (
        f"`forebay verify {agent[1]}` hashes every file behind this agent again; `forebay lineage {agent[1]}` shows where it "
        "came from. The attestations of the same export are signed."
    )


def _many(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def _section(title: str, parts: Iterable[str]) -> str:
    return "\n".join([f"## {title}\n", *(f"{part}\n" for part in parts)])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    return "\n".join([line(head), line(["---"] * len(head)), *(line(row) for row in rows)])


def _cell(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else canonical_json(value).decode()
