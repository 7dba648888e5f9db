"""Open any reward source by its folder: trained ones from their weights, the others from what `reward.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.arena.environment import Task
from tasks.core.endpoint import require_plain_url
from tasks.core.errors import Corrupt, Refused, UsageError
from tasks.core.settings import JudgeModel, VerifierModel
from tasks.reward.classifier import ClassifierSource
from tasks.reward.folder import folder_digest, read_about
from tasks.reward.head import Backbone, HeadSource
from tasks.reward.judge import JudgeSource, describe_judge, judge_digest
from tasks.reward.source import RewardSource
from tasks.reward.verifier import VerifierSource, environment_verifier, function_verifier


def load_source(
    path: Path,
    *,
    backbone: Backbone | None = None,
    judge: JudgeModel | None = None,
    cache: Path | None = None,
    tasks: Mapping[str, Task] | None = None,
    device: str = "cpu",
) -> RewardSource:
    """Return the reward source in the folder `path`; its digest is that of the folder's files.

    Args:
        backbone: of a head.
        judge: how a judge is reached now (address, key, patience).
        cache: folder of a judge's marks.
        tasks: {prompt: task} that an environment's verifier may be asked about.
        device: of a classifier.

    Raises:
        NotFound, Corrupt: there is no such folder, or it is damaged.
        Refused: a verifier's source code, or the way a judge is asked, is not what was registered.
        UsageError: a head without its backbone, a judge without a cache.
    """
    about, digest = read_about(path), folder_digest(path)
    kind, settings = about["kind"], about["settings"]
    if kind == "head":
        if backbone is None:
            raise UsageError(
                f"The reward head in {path} needs its backbone {about['backbone']['digest'][:12]}…."
            )
        return HeadSource.load(path, backbone)
    if kind == "classifier":
        return ClassifierSource.load(path, device)
    if kind == "verifier":
        found = open_verifier(settings["name"], tasks)
        _unchanged(found.digest, about["identity"], f"The verifier {found.name}", "its source changed")
        return replace(found, digest=digest)
    if kind == "judge":
        if cache is None:
            raise UsageError(f"The judge in {path} needs a folder for its marks.")
        reached = (judge or JudgeModel()).model_dump(exclude=set(settings))
        asked = JudgeModel.model_validate({**settings, **reached})
        now = "this version of Forebay asks or reads in another way"
        _unchanged(judge_digest(asked), about["identity"], f"The judge {asked.model}", now)
        return JudgeSource(asked, cache, digest)
    raise Corrupt(f"{path} holds a reward source of the unknown kind {kind!r}.")


def open_verifier(name: str, tasks: Mapping[str, Task] | None = None) -> VerifierSource:
    """Return the verifier called `name`: module:function, or an environment.

    Raises:
        UsageError: there is no such verifier.
    """
    if not name:
        raise UsageError(
            "The verifier has no name; set reward.model.name to module:function or an environment."
        )
    return function_verifier(name) if ":" in name else environment_verifier(name, tasks)


def describe_untrained(settings: VerifierModel | JudgeModel) -> dict[str, Any]:
    """Return what `reward.json`, the one file of a source that needs no training, says of it.

    Raises:
        UsageError: there is no such verifier, or the judge has no model or no plain address.
    """
    if isinstance(settings, VerifierModel):
        identity = open_verifier(settings.name).digest
        return {"kind": "verifier", "settings": settings.model_dump(), "identity": identity}
    if not settings.model:
        raise UsageError("The judge has no model; set reward.model.model to the name its endpoint serves.")
    require_plain_url(settings.url, "reward.model")
    return {"kind": "judge", **describe_judge(settings), "identity": judge_digest(settings)}


def _unchanged(found: str, registered: str, what: str, why: str) -> None:
    if found != registered:
        raise Refused(
            f"{what} is not the one that was registered ({registered[:12]}…): {why}; register it again."
        )
