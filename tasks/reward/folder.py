"""A reward source on disk: `reward.json` says all that was decided, the weights are safetensors, nothing runs code.

reward.json           schema, kind, settings, provenance; of a trained one also its backbone and its scale
prompts.json          sorted SHA-256 of all training prompts (evaluation prompts must not be among them)
support.safetensors   a small picture of the training features, and quantiles of distances and scores
head.safetensors      weights; a classifier's are in model.safetensors beside its configuration and tokenizer
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.atomic import whole_directory
from tasks.core.digest import canonical_json, digest_files, digest_tree, sha256_bytes
from tasks.core.errors import Corrupt, NotFound
from tasks.reward.preferences import prompt_digests, set_digest
from tasks.reward.source import Preference

SCHEMA = "forebay.reward_model/2"
ABOUT, PROMPTS, SUPPORT = "reward.json", "prompts.json", "support.safetensors"


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write `reward.json` to a folder that is being made aside, and becomes the source's when it is whole."""
    (folder / ABOUT).write_bytes(_encode(about))


def lay_about(models: Path, about: Mapping[str, Any]) -> Path:
    """Return the folder under `models` of a source that is `reward.json` alone, made if it is not there."""
    folder = models / f"reward-{digest_files({ABOUT: sha256_bytes(_encode(about))})[:16]}"
    if not folder.exists():
        with whole_directory(folder) as aside:
            write_about(aside, about)
    return folder


def _encode(about: Mapping[str, Any]) -> bytes:
    return canonical_json({"schema": SCHEMA, **about})


def folder_digest(folder: Path) -> str:
    """Return the one digest of a folder's files: the identity of the source it holds."""
    return digest_files(digest_tree(folder))


def read_about(folder: Path) -> dict[str, Any]:
    """Return what `reward.json` says.

    Raises:
        NotFound: there is none. Corrupt: it is not what this version of Forebay writes.
    """
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_bytes())
    except FileNotFoundError:
        raise NotFound(f"There is no reward model in {folder}.") from None
    except ValueError as error:
        raise Corrupt(f"{folder / ABOUT} is not JSON: {error}.") from None
    if about.get("schema") != SCHEMA:
        raise Corrupt(
            f"{folder / ABOUT} is a {about.get('schema')}; this version of Forebay reads {SCHEMA}: train it again."
        )
    return about


def provenance(train: Sequence[Preference], folder: Path) -> dict[str, Any]:
    """Write `prompts.json` and return what `reward.json` keeps about the training preferences."""
    prompts = prompt_digests(train)
    data = canonical_json(prompts)
    (folder / PROMPTS).write_bytes(data)
    return {
        "preferences": set_digest(train),
        "pairs": len(train),
        "groups": len({preference.group for preference in train}),
        "slices": sorted({preference.slice for preference in train}),
        "sources": sorted({preference.source for preference in train}),
        "licences": sorted({preference.licence for preference in train}),
        "prompts": {"count": len(prompts), "sha256": sha256_bytes(data)},
    }


def training_prompts(folder: Path) -> frozenset[str]:
    """Return the SHA-256 of the prompts a source was trained on; empty where nothing was trained.

    Raises:
        Corrupt: the file is not the one that `reward.json` names.
    """
    said = read_about(folder).get("prompts")
    if said is None:
        return frozenset()
    data = (folder / PROMPTS).read_bytes()
    if sha256_bytes(data) != said["sha256"]:
        raise Corrupt(f"{folder / PROMPTS} was changed: it is not what {ABOUT} says.")
    return frozenset(json.loads(data))
