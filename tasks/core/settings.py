"""Settings: one file, typed and frozen. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.core.digest import digest_json
from tasks.core.errors import UsageError

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """Return the SHA-256 of the values: equal settings, equal digest."""
        return digest_json(self.model_dump(mode="json"))


class Compute(Section):
    """Where arithmetic happens."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = Field(None, ge=1, description="PyTorch threads; None lets PyTorch choose")
    processes: int = Field(1, ge=1, description="training processes that share one update (FSDP2); one a GPU")


class Collect(Section):
    """How experience is made."""

    environments: dict[str, int] = {"calculator": 48, "largest": 32, "reasoning_gym/chain_sum": 24}
    group_size: int = Field(8, ge=2, description="answers to each task; groups of one carry no signal")
    temperature: float = Field(1.0, gt=0)
    batch_rows: int = Field(128, ge=1, description="answers decoded side by side")


class Replay(Section):
    """How experience is kept."""

    dataset: str = Field("main", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    shard_rows: int = Field(8192, ge=1)
    remote: str | None = Field(
        None, description="DVC remote; None is a folder in the workspace, s3://… a bucket"
    )


class Validation(Section):
    """What a dataset must satisfy before anything is trained on it."""

    max_policy_lag: int = Field(4, ge=0, description="registry versions between the behaviour and the policy")
    min_groups: int = Field(8, ge=1)


class Reward(Section):
    """The reward model: pairs made from replay, a linear head on a frozen language model."""

    holdout: float = Field(0.3, gt=0, lt=1)
    pairs_per_group: int = Field(4, ge=1)
    l2: float = Field(1e-4, gt=0)


class Evaluation(Section):
    """The held-out tasks on which candidate and champion are compared."""

    tasks: dict[str, int] = {"calculator": 120, "largest": 100, "reasoning_gym/chain_sum": 50}
    rotation: int = Field(
        0, ge=0, description="each number draws other held-out tasks; raise it when their uses are spent"
    )
    batch_rows: int = Field(128, ge=1)


class Stores(Section):
    """Databases; None keeps them as SQLite files in the workspace."""

    ledger: str | None = None
    mlflow: str | None = None


class Servers(Section):
    """Ports of `forebay up`, on loopback."""

    prefect_port: int = Field(4200, ge=1, le=65535)
    mlflow_port: int = Field(5000, ge=1, le=65535)


def load_section(cls: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file into `cls`, with `a.b=value` overrides on top.

    Raises:
        UsageError: the file is missing or no YAML mapping, a key is unknown (the nearest known one is named),
            or a value does not fit its type.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise UsageError(f"There is no {path.name} in {path.parent}; `forebay init` writes one.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path.name} must be a mapping of sections, not a {type(values).__name__}.")
    for override in overrides:
        _override(values, override)
    return build_section(cls, values, path.name)


def build_section(cls: type[S], values: Mapping[str, Any], where: str) -> S:
    """Validate plain values into `cls`; `where` names their origin in the error."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {'; '.join(_explain(cls, item) for item in error.errors())}.") from None


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UsageError(
            f"`{override}` is not a setting; write section.key=value, for example training.steps=8."
        )
    *parents, last = name.strip().split(".")
    for part in parents:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UsageError(f"`{name}`: {part} is a value, not a section.")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"`{override}`: the value is not YAML.") from None


def _explain(cls: type[BaseModel], item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item.get('input')!r})"
    known = _keys_at(cls, item["loc"][:-1])
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
    hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
    return f"unknown key `{place}`; {hint}"


def _keys_at(cls: type[BaseModel], parents: Sequence[int | str]) -> list[str]:
    for part in parents:
        if isinstance(part, int):  # of a list, whose name has led to the class of its items
            continue
        annotation = cls.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        cls = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(cls.model_fields)


class SettingsBase(Section):
    """Common ways to read a whole settings file."""

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read `path` with overrides; see `load_section`."""
        return load_section(cls, path, overrides)
