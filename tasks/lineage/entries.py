"""What each kind of ledger entry says of the lineage graph: nodes, edges, and digests by which things are found.

Entries come in the ledger's order, and what an entry names was recorded before it. So whatever a digest means is known
when it is met, and an entry is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from tasks.core.ledger import Entry
from tasks.lineage.types import Ref, Relation

Role = Literal[
    "agent", "dataset", "shard", "evidence", "run", "source", "preferences", "decision", "reward",
    "fresh",  # of a shard that a run collected itself
    "version", "sampler", "scored into", "rewarded into",  # of a dataset's name: who sampled it, what it was scored from and by
    "prefect", "mlflow", "git", "dvc",  # ids of other tools: locators, beside the digests
]  # fmt: skip


class Graph(Protocol):
    """Where the reading is written to; `tasks.lineage.index.Index` has it."""

    def node(
        self, ref: Ref, digest: str | None, said: Entry | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Note that there is `ref`, and that `said` speaks of it; `facts` are kept where reading the entry again for one
        node would cost too much.
        """

    def edge(self, source: Ref, relation: Relation, target: Ref) -> None:
        """Note that `source` follows from `target`."""

    def drop(self, version: Ref, shard: Ref) -> None:
        """Note that a dataset version does not hold `shard` any more, which the one that it continues held."""

    def call(self, role: Role, digest: str, ref: Ref) -> None:
        """Let `digest` mean `ref`; the first meaning stands."""

    def called(self, role: Role, digest: str) -> Ref | None:
        """Return what `digest` means in that role."""

    def all_called(self, role: Role, digest: str) -> list[Ref]:
        """Return all that `digest` means in that role: the same shards may be sealed under two names."""


def read(entry: Entry, graph: Graph) -> None:
    """Write what `entry` says into `graph`.

    Raises:
        KeyError, TypeError: it lacks a field that its kind must have.
    """
    reader = _READERS.get(entry.kind)
    if reader is not None:
        reader(entry, graph)


def new_shards(payload: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the shards that a dataset version brought in: the last ones, whose rows are its new rows."""
    if "replaces" in payload:  # rows were erased: what is left of their shards was written anew
        return [each["by"] for each in payload["replaces"] if each["by"]]
    left, start = payload["new_rows"], len(payload["shards"])
    while left > 0 and start:
        start -= 1
        left -= payload["shards"][start]["rows"]
    shards: Sequence[Mapping[str, Any]] = payload["shards"][start:]
    return shards


def _agent(entry: Entry, graph: Graph) -> None:
    p, parents = entry.payload, entry.payload["parents"]
    here: Ref = ("agent", entry.subject)
    _pick(p, "path", "files", "version", "mlflow")
    graph.node(here, p["digest"], entry)
    graph.call("agent", p["digest"], here)
    _locate(graph, here, {"mlflow": p["mlflow"].get("model_id")})
    if p["origin"] == "base":
        graph.node(("base", p["digest"]), p["digest"], entry)
        graph.edge(here, "converted from", ("base", p["digest"]))
    if parents["run"]:
        graph.edge(here, "trained by", ("run", parents["run"]))
    if parents["base"]:
        graph.edge(here, "descends from", ("base", parents["base"]))


def _run_started(entry: Entry, graph: Graph) -> None:
    p, commit = entry.payload, entry.payload["commit"]
    here: Ref = ("run", entry.subject)
    graph.node(here, entry.subject, entry)
    graph.call("run", entry.subject, here)
    code: Ref = ("code", f"{commit['commit'] or ''}{'+' if commit['dirty'] else ''}@{p['code']}")
    graph.edge(here, "run by code", code)
    _locate(graph, code, {"git": commit["commit"]})
    _locate(graph, here, {"prefect": p.get("prefect")})
    if p["lock"]:
        graph.edge(here, "with packages", ("lock", p["lock"]))
    for dataset in _datasets_of(graph, p["dataset"]):
        graph.edge(here, "trained on", dataset)
    graph.edge(here, "started from", _policy_of(graph, p["init"]["agent"], p["init"]["digest"]))


def _run_finished(entry: Entry, graph: Graph) -> None:
    here: Ref = ("run", entry.subject)
    outputs = entry.payload["outputs"]
    _pick(outputs, "path", "digest", "files")
    graph.node(here, entry.subject, entry)
    _locate(graph, here, {"mlflow": outputs.get("mlflow_run")})
    for shard in outputs.get("fresh", ()):
        graph.node(("shard", shard["path"]), shard["sha256"], entry, {})
        graph.call("shard", shard["sha256"], ("shard", shard["path"]))
        graph.call("fresh", shard["sha256"], ("shard", shard["path"]))
        graph.edge(here, "collected", ("shard", shard["path"]))


def _dataset(entry: Entry, graph: Graph) -> None:
    p, name = entry.payload, entry.payload["name"]
    here: Ref = ("dataset", entry.subject)
    kept = ("name", "rows", "groups", "new_rows", "git_commit", "dvc", "manifest", "manifest_sha256")
    graph.node(
        here,
        p["root"],
        entry,
        {n: p[n] for n in kept} | {"sealed": entry.time, "contents": p.get("contents", [])},
    )
    graph.call("dataset", p["root"], here)
    _locate(graph, here, {"git": p["git_commit"], "dvc": p["dvc"]["md5"]})
    for shard in new_shards(p):
        held: Ref = ("shard", shard["path"])
        graph.node(held, shard["sha256"], entry, {n: shard[n] for n in ("rows", "groups", "bytes")})
        graph.call("shard", shard["sha256"], held)
        graph.edge(here, "holds", held)
    for each in p.get("replaces", ()):  # rows were erased: what is left of a shard was written anew
        graph.drop(here, ("shard", each["path"]))
        if each["by"]:
            graph.edge(("shard", each["by"]["path"]), "rewritten from", ("shard", each["path"]))
    if p["parent"]:
        earlier = graph.all_called("dataset", p["parent"])
        own = [ref for ref in earlier if ref[1].rpartition("/")[0] == name]
        graph.edge(here, "continues", (own or earlier or [("dataset", p["parent"])])[0])
    for policy in p["behaviour"]:
        sampler = f"{name} {policy['digest']}"
        if (
            graph.called("sampler", sampler) is None
        ):  # the first version with its rows; later ones continue that
            graph.call("sampler", sampler, here)
            graph.edge(here, "sampled from", _policy_of(graph, policy["version"], policy["digest"]))
    _scored_links(graph, here, name)
    for part in p.get("contents", ()):  # of its new rows; a ledger of an earlier release has none
        graph.edge(here, "gathered in", ("environment", f"{part['env']}@{part['env_version']}"))
        graph.edge(here, "comes from", ("origin", part["source"]))
        graph.edge(here, "licensed under", ("licence", part["licence"]))
    graph.call("version", name, here)


def _scored(entry: Entry, graph: Graph) -> None:
    """Read that a dataset was (or is about to be) written with the rewards of one source: it holds no others."""
    p, name = entry.payload, entry.subject.removeprefix("dataset:")
    graph.call("rewarded into", name, ("source", p["reward"]))
    if "root" in p:
        for source in _datasets_of(graph, p["root"]):
            graph.call("scored into", name, source)
    for version in graph.all_called("version", name):  # sealed before this was recorded
        _scored_links(graph, version, name)


def _scored_links(graph: Graph, version: Ref, name: str) -> None:
    for source in graph.all_called("scored into", name):
        if source != version:
            graph.edge(version, "scored from", source)
    for source in graph.all_called("rewarded into", name):
        graph.edge(version, "rewarded by", source)


def _data_validated(entry: Entry, graph: Graph) -> None:
    here: Ref = ("validation", entry.digest)
    graph.node(here, entry.payload["evidence"]["sha256"], entry)
    graph.call("evidence", entry.payload["evidence"]["sha256"], here)
    for dataset in graph.all_called("dataset", entry.subject):
        graph.edge(dataset, "checked by", here)


def _reward_validated(entry: Entry, graph: Graph) -> None:
    p = entry.payload
    here: Ref = ("reward", entry.digest)
    graph.node(here, p["digest"], entry)
    graph.call("evidence", p["evidence"]["sha256"], here)
    graph.call("reward", p["digest"], here)
    for dataset in _datasets_of(graph, p["dataset"]) if p["dataset"] else ():
        graph.edge(here, "trained on", dataset)
    source = graph.called("source", p["digest"])
    if source is not None:
        graph.edge(here, "judges", source)


def _source(entry: Entry, graph: Graph) -> None:
    p, parents = entry.payload, entry.payload["parents"]
    here: Ref = ("source", entry.subject)
    _pick(p, "kind", "path", "files", "version")
    graph.node(here, p["digest"], entry)
    graph.call("source", p["digest"], here)
    if parents["preferences"]:
        graph.edge(here, "learnt from", ("preferences", parents["preferences"]))
    backbone = parents["backbone"]
    if backbone and backbone["agent"]:
        graph.edge(here, "reads states of", ("agent", backbone["agent"]))
    elif backbone:
        graph.edge(here, "reads states of", ("outside", f"{backbone['base']}@{backbone['digest']}"))


def _preferences(entry: Entry, graph: Graph) -> None:
    here: Ref = ("preferences", entry.subject)
    again = graph.called("preferences", entry.subject) is not None
    graph.node(here, entry.subject, entry)
    graph.call("preferences", entry.subject, here)
    dataset = entry.payload["origin"].get("dataset")
    if again or not dataset:
        return  # made of other data once more, the same bytes still come from where they came from first
    for made_from in _datasets_of(graph, dataset):
        graph.edge(here, "made from", made_from)


def _evaluation(entry: Entry, graph: Graph) -> None:
    here: Ref = ("evaluation", entry.subject)
    graph.node(here, entry.subject, entry)
    graph.call("evidence", entry.payload["outcomes"]["sha256"], here)
    graph.edge(here, "asks", ("tasks", entry.payload["tasks_digest"]))
    for side in ("candidate", "champion"):
        graph.edge(here, "compares", ("agent", f"agent/{entry.payload[side]}"))


def _decision(entry: Entry, graph: Graph) -> None:
    p = entry.payload
    here: Ref = ("decision", p["decision"])
    office = entry.subject.partition("/")[0]
    judged: Ref = ("agent" if office == "agent" else "source", entry.subject)
    _pick(p, "verdict", "record")
    graph.node(here, p["decision"], entry)
    graph.call("decision", p["decision"], here)
    graph.edge(judged, "judged by", here)
    graph.edge(here, "under policy", ("policy", p["policy_digest"]))
    # One file can be behind several items (quality and every guard); some have no entry of their own.
    for digest in dict.fromkeys(item["digest"] for item in p["evidence"]):
        evidence = graph.called("evidence", digest)
        if evidence is not None:
            graph.edge(here, "rests on", evidence)
    champion = p["champion"]
    if office == "agent":
        graph.edge(
            here, "compared with", _policy_of(graph, f"agent/{champion['version']}", champion["digest"])
        )
    elif champion["version"]:
        graph.edge(here, "compared with", ("source", f"reward/{champion['version']}"))


def _answered(entry: Entry, graph: Graph) -> None:
    decision = entry.payload["decision"]
    graph.node(("decision", decision), decision, entry)


def _changed(entry: Entry, graph: Graph) -> None:
    here: Ref = ("promotion", entry.digest)
    office = entry.subject.partition("/")[0]
    graph.node(here, entry.digest, entry)
    graph.edge(("agent" if office == "agent" else "source", entry.subject), "in office", here)


def _pick(payload: Mapping[str, Any], *names: str) -> None:
    """Fail now where an entry is not whole, rather than when somebody asks."""
    for name in names:
        payload[name]


def _locate(graph: Graph, ref: Ref, ids: Mapping[Role, str | None]) -> None:
    """Let the ids that other tools have for a thing be asked for."""
    for role, value in ids.items():
        if value:
            graph.call(role, value, ref)


def _datasets_of(graph: Graph, root: str) -> list[Ref]:
    """Return every version with that root: they are the same rows."""
    return graph.all_called("dataset", root) or [("dataset", root)]


def _policy_of(graph: Graph, name: str, digest: str) -> Ref:
    """Return the agent of that name if it has that digest, else one that has, else a policy from outside (its experience
    was imported).
    """
    bearers = graph.all_called("agent", digest)
    return (
        ("agent", name)
        if ("agent", name) in bearers
        else next(iter(bearers), ("outside", f"{name}@{digest}"))
    )


_READERS: Mapping[str, Callable[[Entry, Graph], None]] = {
    "agent.registered": _agent,
    "run.started": _run_started,
    "run.finished": _run_finished,
    "dataset.sealed": _dataset,
    "dataset.scoring": _scored,
    "dataset.scored": _scored,
    "dataset.validated": _data_validated,
    "reward.validated": _reward_validated,
    "reward.registered": _source,
    "preferences.made": _preferences,
    "preferences.imported": _preferences,
    "evaluation.done": _evaluation,
    "decision.made": _decision,
    "approval.granted": _answered,
    "approval.rejected": _answered,
    "promotion.committed": _changed,
    "rollback.committed": _changed,
}
KINDS = tuple(_READERS)
"""The kinds of entries that say something of the graph."""
