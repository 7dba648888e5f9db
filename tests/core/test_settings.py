from pathlib import Path

import pytest

from flows.settings import Settings
from tasks.core.errors import UsageError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_the_shipped_file_loads_and_equals_the_defaults():
    shipped = Settings.load(Path(__file__).resolve().parents[2] / "params.yaml")
    assert shipped == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainning: {}", "unknown key `trainning`; did you mean `training`"),
        ("collect: {group_sise: 4}", "unknown key `collect.group_sise`; did you mean `group_size`"),
        ("seed: -1", "seed: input should be greater than or equal to 0"),
        ("compute: {device: tpu}", "compute.device: input should be 'auto', 'cpu' or 'cuda'"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")) as error:
        Settings.load(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_every_value_can_be_overridden(tmp_path: Path):
    path = write(tmp_path, "collect: {group_size: 4}")
    settings = Settings.load(path, ["collect.group_size=16", "collect.environments.largest=5", "seed=7"])
    assert settings.collect.group_size == 16
    assert settings.collect.environments == {"largest": 5}
    assert settings.seed == 7
    with pytest.raises(UsageError, match="did you mean `seed`"):
        Settings.load(path, ["sead=1"])
    with pytest.raises(UsageError, match=r"write section\.key=value"):
        Settings.load(path, ["seed"])


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 3
