"""The example of docs/environments.md, as a user would copy it: named by its path, collected, and judged."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tasks.arena.environment import get, verifier_digest
from tasks.arena.guarded import Guarded
from tasks.reward.verifier import replay

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


def test_the_example_of_the_docs_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(# my_tasks\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = get("my_tasks:doubles")
        train, heldout = env.tasks("train", 20, 0), env.tasks("heldout", 20, 0)
        assert not {task.prompt for task in train} & {task.prompt for task in heldout}
        task = train[0]
        answer = str(task.payload["answer"])
        assert (env.step(task, [answer]).reward, env.step(task, ["no"]).valid) == (1.0, False)
        assert replay(env, task, f" {answer}\n") == 1.0
        assert env.constant_baseline(train)[1] == 1 / 20
        assert env.random_baseline(train, 0) < 0.01
        assert len(verifier_digest(env)) == 64
        with Guarded(env) as guarded:
            assert guarded.step(task, [answer]).reward == 1.0
    finally:
        sys.modules.pop("my_tasks", None)
