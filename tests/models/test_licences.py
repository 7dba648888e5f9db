from __future__ import annotations

import pytest
from gguf import GGUFWriter

from models.causal_lm import ModelError
from models.licences import Licence, licence_of


def gguf(path, licence):
    writer = GGUFWriter(path, "llama")
    if licence is not None:
        writer.add_license(licence)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return str(path)


def test_of_a_gguf_file(tmp_path):
    assert licence_of(gguf(tmp_path / "a.gguf", "mit")) == Licence("mit", "general.license of a.gguf")
    assert licence_of(gguf(tmp_path / "b.gguf", None)) is None


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (
            "---\nlicense: apache-2.0\n---\n# A model\n",
            Licence("apache-2.0", "the front matter of README.md"),
        ),
        ("---\nlicense: [\n---\n# A model\n", None),
        ("---\ntags: [x]\n---\n", None),
        ("# No front matter\n", None),
    ],
)
def test_of_a_folder(tmp_path, text, licence):
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == licence


def test_of_a_model_of_the_hub_that_is_not_here(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert licence_of("nobody/never-was") is None


def test_of_nothing():
    with pytest.raises(ModelError):
        licence_of("/no/such/folder")
