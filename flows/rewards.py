"""Reward models: their preferences kept, trained, registered under the office `reward`, and opened again to score."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from flows.registry import enter
from tasks.core.atomic import whole_directory
from tasks.core.digest import digest_files, digest_json, digest_tree, sha256_file
from tasks.core.errors import Corrupt, NotFound, Refused, UsageError
from tasks.core.ledger import Entry
from tasks.core.locks import file_lock
from tasks.core.settings import ClassifierModel, HeadModel, JudgeModel, VerifierModel
from tasks.core.stages import once

if TYPE_CHECKING:
    from tasks.arena.environment import Task
    from tasks.replay.schema import Episode
    from tasks.reward.head import Backbone
    from tasks.reward.source import Preference, RewardSource

IMPORTED, MADE, REGISTERED = "preferences.imported", "preferences.made", "reward.registered"
_DIGITS = 8  # of a digest that names a set of preferences


# -------------------------------------------------------------------------------------- sets of preferences


def import_preferences(
    context: Context, file: Path, *, name: str, source: str, licence: str, slice: str
) -> dict[str, Any]:
    """Keep the preferences of a JSONL file (also .gz); bad lines, and what is revoked, are named and left out.

    Returns:
        The ledger's payload, and `errors`: one sentence for each line that was left out.

    Raises:
        NotFound: there is no such file. UsageError: it holds nothing that can be used. Refused: all of it is revoked.
    """
    from tasks.lineage.revocation import pair_revoked, revoked
    from tasks.reward.importers import Origin
    from tasks.reward.importers import import_preferences as read

    report = read(file, Origin(source, licence, slice))
    if not report.preferences:
        first = f"; the first problem: {report.errors[0]}" if report.errors else ""
        raise UsageError(f"{file} holds no preference{first}.")
    dropped = {
        "duplicates": report.duplicates,
        "equal": report.equal,
        "without_contrast": report.without_contrast,
        "unreadable": len(report.errors),
    }
    now, out = revoked(context.ledger, context.workspace), Counter[str]()
    kept = []
    for pair in report.preferences:
        why = pair_revoked(asdict(pair), now) if now else None
        if why is None:
            kept.append(pair)
        else:
            out[why] += 1
    left = [f"{count} preferences: {why} is revoked." for why, count in sorted(out.items())]
    if not kept:
        raise Refused(f"Nothing of {file} may be learnt from. {' '.join(left[:3])}")
    if out:
        dropped["revoked"] = sum(out.values())
    origin = {"file": file.name, "sha256": sha256_file(file)}
    payload = _keep_set(context, IMPORTED, name, kept, {"origin": origin, "dropped": dropped})
    return {**payload, "errors": [*report.errors, *left]}


def replay_set(context: Context, dataset: Mapping[str, Any], agent: str = "champion") -> dict[str, Any]:
    """Make preferences of a sealed dataset by what verifiers said; the same dataset gives the same set.

    Args:
        dataset: payload of `dataset.sealed`.
        agent: whose tokenizer wrote the rows.

    Raises:
        Refused: another tokenizer wrote them.
    """
    from tasks.reward.pairs import replay_preferences
    from tasks.reward.preferences import distinct

    decode, models = Decoder(context, agent), registered_digests(context)
    settings = context.settings.reward
    found = distinct(
        replay_preferences(
            (
                replace(decode.checked(row), reward=verified(row, models))
                for row in episodes(context, dataset)
            ),
            decode,
            per_group=settings.pairs_per_group,
            seed=context.settings.seed,
        )
    )
    origin = {"dataset": dataset["root"], "name": f"{dataset['name']}/v{dataset['version']}"}
    return _keep_set(context, MADE, str(dataset["name"]), found.preferences, {"origin": origin})


def preference_set(context: Context, ref: str) -> dict[str, Any]:
    """Return the payload of the set that `ref` names: the newest of a name, the start of a digest, or a dataset.

    Raises:
        NotFound: there is no such set or dataset; those that exist are named.
    """
    from flows.cycle import sealed_payload

    known = [*context.ledger.entries(IMPORTED), *context.ledger.entries(MADE)]
    named = [e for e in known if e.kind == IMPORTED and e.payload["name"] == ref]
    by_digest = [e for e in known if len(ref) >= _DIGITS and e.subject.startswith(ref)]
    for entry in reversed([*by_digest, *named]):
        return dict(entry.payload)
    try:
        return replay_set(context, sealed_payload(context, ref))
    except NotFound:
        names = sorted({e.payload["name"] for e in known if e.kind == IMPORTED})
        datasets = sorted({e.payload["name"] for e in context.ledger.entries("dataset.sealed")})
        raise NotFound(
            f"There are no preferences and no dataset called `{ref}`; imported: {', '.join(names) or 'none'}; "
            f"datasets: {', '.join(datasets) or 'none'}."
        ) from None


def read_set(context: Context, payload: Mapping[str, Any]) -> list[Preference]:
    """Return the preferences of a set that are not revoked, bytes checked."""
    from tasks.lineage.revocation import pair_revoked, revoked
    from tasks.reward.preferences import read_preferences

    found = read_preferences(context.workspace.root / payload["path"], payload["digest"])
    now = revoked(context.ledger, context.workspace)
    return [pair for pair in found if not now or pair_revoked(asdict(pair), now) is None]


def _keep_set(
    context: Context, kind: str, name: str, found: Sequence[Preference], more: Mapping[str, Any]
) -> dict[str, Any]:
    from tasks.reward.importers import slices
    from tasks.reward.preferences import write_preferences

    path, digest = write_preferences(context.workspace.preferences, found)
    payload = {
        "digest": digest,
        "path": context.workspace.relative(path),
        "name": name,
        "pairs": len(found),
        "groups": len({preference.group for preference in found}),
        "slices": slices(found),
        "sources": sorted({preference.source for preference in found}),
        "licences": sorted({preference.licence for preference in found}),
        **more,
    }
    known = context.ledger.last(kind, digest)
    if known is None or dict(known.payload) != payload:
        context.ledger.append(kind, digest, payload)
    return payload


# ---------------------------------------------------------------------------------- training and registering


def train_reward(
    context: Context, preferences: Mapping[str, Any] | None = None, agent: str = "champion"
) -> dict[str, Any]:
    """Train (or only describe) the reward source of the settings and register it; the same request finds it again.

    Args:
        preferences: payload of a set; a verifier or a judge needs none.
        agent: the language model whose states a head reads where the settings name no base.

    Returns:
        The payload of `reward.registered`.

    Raises:
        Refused: too few groups on one side of the split. UsageError: the settings name no such model.
    """
    from tasks.lineage.flagged import keep_learnt, learnable
    from tasks.lineage.revocation import revoked
    from tasks.reward.preferences import split_preferences

    settings = context.settings.reward
    model = settings.model
    if isinstance(model, VerifierModel | JudgeModel):
        return register_untrained(context, model)
    if preferences is None:
        raise UsageError(f"A reward model of kind {model.kind} needs preferences to learn from.")
    backbone = _backbone(context, model, agent)
    inputs = {
        "preferences": preferences["digest"],
        "backbone": backbone,
        "holdout": settings.holdout,
        "model": model.model_dump(mode="json"),
        "seed": context.settings.seed,
    }
    now = revoked(context.ledger, context.workspace)
    root = preferences["origin"].get("dataset")
    pairs = learnable(
        context.ledger, context.workspace, read_set(context, preferences), root, backbone["digest"], now
    )
    left = preferences["pairs"] - len(pairs)
    if left:
        inputs["revoked"] = {"pairs": left, "at": context.revoked}

    def work(key: str) -> dict[str, Any]:
        from models.causal_lm import ModelError
        from tasks.reward.classifier import train_classifier
        from tasks.reward.head import train_head

        split = split_preferences(pairs, holdout=settings.holdout)
        train = split.train
        if not train or not split.heldout:
            raise Refused(
                f"The preferences {preferences['name']} have {preferences['groups']} prompts with a better and a "
                "worse answer: too few to train and validate on; collect or import more, on tasks neither too "
                "easy nor too hard."
            )
        target = context.workspace.models / f"reward-{key[:16]}"
        origin = {
            "set": preferences["digest"],
            "holdout": settings.holdout,
            "base": model.base or backbone["agent"],
        }
        with progress.current().bar("reward") as report:
            try:
                if isinstance(model, HeadModel):
                    frozen = _open_backbone(context, backbone)
                    source: Any = train_head(
                        train, frozen, model, target=target, origin=origin, report=report
                    )
                else:
                    source = train_classifier(
                        train,
                        model,
                        seed=context.settings.seed,
                        target=target,
                        origin={**origin, "backbone": {"digest": backbone["digest"], "form": "base"}},
                        device=context.device(),
                        report=report,
                    )
            except ModelError as error:
                raise UsageError(f"reward.model.base: {error}") from None
        parents = {
            "preferences": preferences["digest"],
            "dataset": preferences["origin"].get("dataset"),
            "backbone": backbone,
        }
        licences = preferences["licences"]
        return register_reward(
            context,
            target,
            source.kind,
            parents=parents,
            holdout=settings.holdout,
            licences=licences,
            learnt=keep_learnt(context.workspace, train),
        )

    def stands(outputs: Mapping[str, Any]) -> bool:
        folder = context.workspace.root / outputs["path"]
        return folder.is_dir() and digest_files(digest_tree(folder)) == str(outputs["digest"])

    with _alone(context, digest_json(inputs)):
        outputs, _ = once(context.ledger, "train reward", inputs, work, stands)
    return outputs


def _alone(context: Context, what: str) -> AbstractContextManager[None]:
    """Whoever asks for the same meanwhile waits, and finds it then: one process at a time may write a folder."""
    return file_lock(context.workspace.locks / f"reward-{what[:16]}.lock", timeout=math.inf)


def register_reward(
    context: Context,
    folder: Path,
    kind: str,
    *,
    parents: Mapping[str, Any],
    holdout: float | None = None,
    licences: Sequence[str] = (),
    serving: Mapping[str, Any] | None = None,
    learnt: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Register a reward source's folder with MLflow and in the ledger; the same files give the same version.

    Args:
        parents: {preferences, dataset, backbone}, each None where there is none.
        holdout: share of the preferences' groups that training has not seen.
        serving: how a judge was reached; no part of its identity.
        learnt: the evidence {path, sha256, pairs} of which pairs it was trained on.

    Returns:
        The payload of `reward.registered`.

    Raises:
        Refused: a file can run code when it is loaded.
    """
    from tasks.promotion.inert import require_inert
    from tasks.promotion.promote import show_candidate

    files = digest_tree(folder)
    require_inert(folder, files)
    digest = digest_files(files)
    for entry in context.ledger.entries(REGISTERED):
        if entry.payload["digest"] == digest:
            return dict(entry.payload)
    registry = context.registry.for_office("reward")
    registered = registry.register(folder, digest, tags={"forebay.kind": kind})
    payload = {
        "digest": digest,
        "files": files,
        "kind": kind,
        "path": context.workspace.relative(folder),
        "parents": {"preferences": None, "dataset": None, "backbone": None, **parents},
        "holdout": holdout,
        "licences": sorted(licences),
        "serving": dict(serving or {}),
        **({"learnt": dict(learnt)} if learnt else {}),
    }
    entry = enter(context, "reward", registered, payload)
    show_candidate(context.ledger, registry)
    return dict(entry.payload)


def register_untrained(context: Context, model: VerifierModel | JudgeModel) -> dict[str, Any]:
    """Register a verifier or a judge as it is described; return the payload of `reward.registered`."""
    from tasks.reward.folder import lay_about
    from tasks.reward.open import describe_untrained

    described = describe_untrained(model)
    with _alone(context, digest_json(described)):
        folder = lay_about(context.workspace.models, described)
    serving = model.model_dump(mode="json", include={"url", "api_key_env"})
    return register_reward(context, folder, model.kind, parents={}, serving=serving)


def _backbone(context: Context, model: HeadModel | ClassifierModel, agent: str) -> dict[str, Any]:
    """Return what a reward model is built on: {agent, base, digest, path}; path is None for a classifier's base."""
    from models.causal_lm import ModelError, source_digest

    if model.base is None:
        entry = context.agent(agent)
        return {"agent": entry.subject, "base": None, "digest": entry.payload["digest"], "path": None}
    try:
        source = source_digest(model.base)
        if isinstance(model, ClassifierModel):
            return {"agent": None, "base": model.base, "digest": source, "path": None}
        folder = context.workspace.models / f"encoder-{source[:16]}"
        with _alone(context, source):
            if not folder.exists():
                _lay_encoder(model.base, folder)
    except ModelError as error:
        raise UsageError(f"reward.model.base: {error}") from None
    digest = digest_files(digest_tree(folder))
    return {"agent": None, "base": model.base, "digest": digest, "path": context.workspace.relative(folder)}


def _lay_encoder(base: str, folder: Path) -> None:
    """Write a base in the clean form in which it is registered with its head; whole or not at all."""
    from models.reward_classifier import load_base

    with whole_directory(folder) as aside:
        load_base(base, seed=0).save(aside)


# ------------------------------------------------------------------------------------------- looking at them


def reward(context: Context, ref: str) -> Entry:
    """Return the registration of reward/N, reward@champion (candidate, previous), a version number or an alias.

    Raises:
        NotFound: no such version; those that exist are named.
    """
    from tasks.promotion.promote import standing

    name = ref.removeprefix("reward").lstrip("/@") or "champion"
    registered = {str(e.payload["version"]): e for e in context.ledger.entries(REGISTERED)}
    held = standing(context.ledger, "reward").aliases()
    if name in held:
        name = str(held[name])
    if name not in registered:
        known = ", ".join(f"reward/{v}" for v in sorted(registered, key=int)) or "none yet"
        raise NotFound(f"There is no reward model `{ref}`; registered here: {known}.")
    return registered[name]


def open_source(
    context: Context, registered: Mapping[str, Any], tasks: Mapping[str, Task] | None = None
) -> RewardSource:
    """Return a registered reward source, ready to score, after hashing its files and its backbone's.

    Args:
        registered: payload of `reward.registered`.
        tasks: {prompt: task}, for an environment's verifier.

    Raises:
        Corrupt: a file is missing or differs. Refused: a verifier's source code changed, or a file could run code.
    """
    from tasks.reward.open import load_source

    name = f"reward/{registered['version']}"
    folder = _intact(context.workspace.root / registered["path"], registered["files"], name)
    backbone = registered["parents"]["backbone"]
    head = registered["kind"] == "head"
    now = context.settings.reward.model
    judge = now if isinstance(now, JudgeModel) else JudgeModel.model_validate(registered["serving"])
    return load_source(
        folder,
        backbone=_open_backbone(context, backbone) if head else None,
        judge=judge,
        cache=context.workspace.state / "judged",
        tasks=tasks,
        device=context.device() if head or registered["kind"] == "classifier" else "cpu",
    )


def heldout(context: Context, registered: Mapping[str, Any]) -> tuple[Preference, ...]:
    """Return the preferences that a trained reward model has not seen; () for a verifier or a judge.

    Where its set was erased they are those of a set made anew from what is left of the dataset, since a group is on the same
    side of the split in every set; of an imported set nothing is left.
    """
    from flows.cycle import sealed_payload
    from tasks.lineage.erasure import Shards

    digest = registered["parents"]["preferences"]
    if digest is None:
        return ()
    entry = context.ledger.last(IMPORTED, digest) or context.ledger.last(MADE, digest)
    assert entry is not None  # registering comes after it
    preferences: Mapping[str, Any] = entry.payload
    gone = not (context.workspace.root / preferences["path"]).exists()
    if gone and Shards(context.ledger, context.workspace).erased(digest):
        if entry.kind == IMPORTED:
            return ()
        preferences = replay_set(context, sealed_payload(context, preferences["name"]))
    return split_of(context, preferences, registered["holdout"])[1]


def split_of(
    context: Context, preferences: Mapping[str, Any], holdout: float
) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """Return (training, held-out) preferences of a set."""
    from tasks.reward.preferences import split_preferences

    split = split_preferences(read_set(context, preferences), holdout=holdout)
    return split.train, split.heldout


def rewards_table(context: Context) -> list[dict[str, Any]]:
    """Return every registered reward model with its offices and its newest verdict."""
    from tasks.promotion.promote import standing

    held = standing(context.ledger, "reward").aliases()
    rows = []
    for entry in context.ledger.entries(REGISTERED):
        p = entry.payload
        verdict = newest_verdict(context, p["digest"])
        rows.append(
            {
                "reward": entry.subject,
                "kind": p["kind"],
                "roles": [alias for alias, version in held.items() if version == p["version"]],
                "digest": p["digest"],
                "verdict": None if verdict is None else verdict["verdict"],
                "licences": p["licences"],
                "registered": entry.time,
            }
        )
    return rows


def describe(context: Context, ref: str) -> dict[str, Any]:
    """Return what is known of one reward model, in plain values."""
    from tasks.reward.folder import read_about

    entry = reward(context, ref)
    p = entry.payload
    (row,) = (row for row in rewards_table(context) if row["reward"] == entry.subject)
    said = read_about(context.workspace.root / p["path"])
    verdict = newest_verdict(context, p["digest"]) or {}
    learnt = {name: said.get(name) for name in ("pairs", "groups", "slices", "sources", "seed", "scale")}
    return {
        **row,
        "path": p["path"],
        "settings": said["settings"],
        **{name: value for name, value in learnt.items() if value is not None},
        "parents": p["parents"],
        "holdout": p["holdout"],
        "reasons": verdict.get("reasons", []),
    }


def newest_verdict(context: Context, digest: str) -> dict[str, Any] | None:
    """Return the payload of the newest validation of a reward model, None where there is none."""
    entry = context.ledger.last("reward.validated", digest)
    return None if entry is None else dict(entry.payload)


# ------------------------------------------------------------------------------------------------- episodes


class Decoder:
    """The text of token ids by one agent's tokenizer; refuses rows of another.

    Args:
        agent: champion, agent/N, …
    """

    def __init__(self, context: Context, agent: str) -> None:
        from models.causal_lm import load_tokenizer

        entry = context.agent(agent)
        self._name, self._digest = entry.subject, entry.payload["tokenizer_digest"]
        self._tokenizer = load_tokenizer(context.weights(entry.payload))

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return str(self._tokenizer.decode(list(ids)))

    def checked(self, episode: Episode) -> Episode:
        """Return the episode.

        Raises:
            Refused: another tokenizer wrote it.
        """
        if episode.tokenizer_digest != self._digest:
            raise Refused(
                f"Episode {episode.episode_id} was written with another tokenizer "
                f"({episode.tokenizer_digest[:12]}…) than that of {self._name}; its prompt cannot be read."
            )
        return episode


def episodes(context: Context, dataset: Mapping[str, Any]) -> Iterator[Episode]:
    """Read the rows of a sealed dataset that are not revoked, bytes checked against their digests."""
    from tasks.lineage.revocation import revoked, without
    from tasks.replay.schema import Episode
    from tasks.replay.seal import find, read_rows

    table = read_rows(context.workspace, find(context.ledger, dataset["root"]).manifest)
    table = without(table, revoked(context.ledger, context.workspace))
    for batch in table.to_batches():
        for row in batch.to_pylist():
            yield Episode(**row)


def registered_digests(context: Context) -> frozenset[str]:
    """Return the digests of all registered reward sources."""
    return frozenset(entry.payload["digest"] for entry in context.ledger.entries(REGISTERED))


def verified(row: Episode, models: Set[str]) -> float:
    """Return the reward that a verifier gave; a dataset that was scored anew keeps it among the components."""
    return float(json.loads(row.reward_components)["before"]) if row.reward_digest in models else row.reward


def _open_backbone(context: Context, backbone: Mapping[str, Any]) -> Backbone:
    from tasks.reward.head import Backbone

    device = context.device()
    if backbone["agent"] is not None:
        folder = context.weights(context.agent(backbone["agent"]).payload)
        return Backbone(folder, backbone["digest"], "language model", device)
    folder = context.workspace.root / backbone["path"]
    if not folder.is_dir():
        raise Corrupt(f"The backbone {backbone['base']} in {folder} is gone; train the reward model again.")
    if digest_files(digest_tree(folder)) != backbone["digest"]:
        raise Corrupt(f"The backbone {backbone['base']} in {folder} was changed; restore it from a backup.")
    return Backbone(folder, backbone["digest"], "encoder", device)


def _intact(folder: Path, files: Mapping[str, str], name: str) -> Path:
    from tasks.promotion.inert import require_inert

    odd = sorted(dict(digest_tree(folder).items() ^ files.items()))
    if odd:
        raise Corrupt(
            f"{folder / odd[0]} is not what {name} was registered with; `forebay verify {name}` lists every difference."
        )
    require_inert(folder, files)
    return folder
