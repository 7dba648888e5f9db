"""The files of a logged model as MLflow lays them out, so that its own flavors load an agent from the registry.

`mlflow.transformers.save_model` is not used: it copies the weights, and with transformers 5 it fails on a folder
(docs/decisions/0008).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import yaml

from tasks.promotion.promote import Office


def lay_out(target: Path, files: Path, *, office: Office, model_id: str, run_id: str | None) -> None:
    """Make `target` an MLflow model; its model/ is the folder `files` itself, an agent's for plain transformers.

    `model_id` and `run_id` are MLflow's, of the logged model and of the run that it came from.
    """
    for source in sorted(p for p in files.rglob("*") if p.is_file()):
        _link(source, target / "model" / source.relative_to(files))
    description = {
        "flavors": {
            "forebay": {"office": office, "files": "model"}
        },  # MLflow wants one; only Forebay reads it
        "mlflow_version": installed("mlflow"),
        "model_id": model_id,
        "run_id": run_id,
    }
    if office == "agent":
        description |= _for_transformers(target, files)
    (target / "MLmodel").write_text(yaml.safe_dump(description))


def _for_transformers(target: Path, files: Path) -> dict[str, Any]:
    """Write what MLflow's transformers and pyfunc flavors look for; return what MLmodel says of them."""
    for source in sorted(p for p in files.rglob("*") if p.is_file() and p.suffix != ".safetensors"):
        _link(source, target / "components" / "tokenizer" / source.relative_to(files))
    text = json.dumps([{"type": "string", "required": True}])
    python = ".".join(map(str, sys.version_info[:3]))
    packages = [f"{name}=={installed(name)}" for name in ("mlflow", "transformers", "torch", "accelerate")]
    (target / "requirements.txt").write_text("\n".join(packages) + "\n")
    environment = {"python": python, "dependencies": ["-r requirements.txt"]}
    (target / "python_env.yaml").write_text(yaml.safe_dump(environment))
    return {
        "flavors": {
            "transformers": {
                "code": None,
                "components": ["tokenizer"],
                "instance_type": "TextGenerationPipeline",
                "model_binary": "model",
                "pipeline_model_type": "AutoModelForCausalLM",
                "source_model_name": "agent",
                "task": "text-generation",
                "tokenizer_type": "AutoTokenizer",
                "transformers_version": installed("transformers"),
            },
            "python_function": {
                "loader_module": "mlflow.transformers",
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": python,
            },
        },
        "signature": {"inputs": text, "outputs": text, "params": None},
    }


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
