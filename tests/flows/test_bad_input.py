"""What users get wrong: one clear sentence each, a stable exit code, nothing half-written."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from flows.context import Context
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace

CHAT = [
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "reward": 1},
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}], "reward": 0},
]


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Context:
    return lay_workspace(tmp_path_factory.mktemp("bad") / "ws", tiny_base)


def says(done, code: int, *words: str) -> None:
    """The command failed with `code` and one sentence on stderr that holds `words`; no traceback."""
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_unknown_settings_key(laid: Context):
    head = laid.ledger.head()
    done = forebay(laid.workspace.root, "retrain", "--set", "trainning.steps=3")
    says(done, 2, "unknown key `trainning`", "did you mean `training`?")
    assert laid.ledger.head() == head


def test_value_of_the_wrong_type(laid: Context):
    says(forebay(laid.workspace.root, "retrain", "--set", "training.steps=many"), 2, "training.steps")


def test_missing_model(tmp_path: Path):
    done = forebay(tmp_path, "init", str(tmp_path / "ws"), "--base-model", str(tmp_path / "nowhere.gguf"))
    says(done, 2, "base_model", "nowhere.gguf")
    assert not list((tmp_path / "ws" / ".forebay").glob("models/*"))


def test_no_workspace(tmp_path: Path):
    says(forebay(tmp_path, "status"), 3, "No Forebay workspace", "forebay init")


def test_a_corrupt_line_is_named_and_the_good_lines_are_kept(laid: Context, tmp_path: Path):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(CHAT[0]) + "\n{not json\n" + json.dumps(CHAT[1]) + "\n")
    done = forebay(laid.workspace.root, "import", str(file), "--source", "test", "--licence", "MIT", "--json")
    assert done.returncode == 5
    report = json.loads(done.stdout)
    assert report["episodes"] == 2
    assert [error.split(":")[0] for error in report["errors"]] == ["line 2"]
    for path in laid.workspace.segments.rglob("*.jsonl"):
        path.unlink()


def test_imported_rows_without_logprobs_are_refused_by_objectives_that_need_them(
    tmp_path: Path, tiny_base: Path
):
    context = lay_workspace(tmp_path / "ws", tiny_base)
    file = tmp_path / "chats.jsonl"
    records = [
        {**record, "task": f"t{task}", "id": f"{task}-{i}"}
        for task in range(6)
        for i, record in enumerate(CHAT)
    ]
    for task, record in enumerate(records):
        record["messages"] = [{"role": "user", "content": f"{task // 2}+2?"}, record["messages"][1]]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = forebay(
        context.workspace.root, "import", str(file), "--source", "test", "--licence", "MIT", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"episodes": 12, "errors": [], "groups": 6}
    sealed = forebay(context.workspace.root, "seal", "--json")
    assert sealed.returncode == 0, sealed.stderr
    done = forebay(context.workspace.root, "retrain")
    says(done, 5, "log-probabilit")
    assert context.ledger.last("run.finished") is None


def test_empty_dataset(laid: Context):
    says(forebay(laid.workspace.root, "seal"), 2, "nothing to seal", "forebay collect")
    assert laid.ledger.last("dataset.sealed") is None


def test_unknown_dataset_agent_and_environment(laid: Context):
    root = laid.workspace.root
    says(forebay(root, "retrain", "--dataset", "main/v9"), 3, "main/v9")
    says(forebay(root, "promote", "agent/7"), 3, "agent/7", "agent/1")
    done = forebay(root, "collect", "--set", "collect.environments={calculater: 2}")
    says(done, 2, "calculater", "calculator")


def test_too_many_tasks_for_a_small_family(laid: Context):
    done = forebay(laid.workspace.root, "collect", "--set", f"collect.environments={{{ENVIRONMENT}: 100000}}")
    says(done, 2, "ask for at most")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_where_one_was_asked_for(laid: Context):
    done = forebay(laid.workspace.root, "collect", "--set", "compute.device=cuda")
    says(done, 7, "no GPU")
    assert not list(laid.workspace.segments.rglob("*.jsonl"))


def test_busy_port(laid: Context):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = forebay(laid.workspace.root, "up", "--set", f"servers.prefect_port={port}")
    says(done, 7, str(port), "servers.prefect_port")


def test_bad_cron(laid: Context):
    says(forebay(laid.workspace.root, "schedule", "retrain", "--cron", "61 * * * *"), 2, "61")


def test_help_has_an_example_for_every_common_command(laid: Context):
    for command in ("init", "collect", "import", "retrain", "schedule"):
        assert "Example" in forebay(laid.workspace.root, command, "--help").stdout
