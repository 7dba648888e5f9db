"""The licence of a base model, as its maker wrote it beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.causal_lm import resolve


@dataclass(frozen=True)
class Licence:
    """A licence and where it is written: an SPDX id in small letters where the maker keeps to the hub's names."""

    name: str
    written_in: str


def licence_of(name: str) -> Licence | None:
    """Return the licence of the base model `name`, None where nothing beside the weights says one.

    It is `general.license` of a GGUF file, else `license` in the front matter of the model's README.md.

    Raises:
        ModelError: there is no such model.
    """
    source = resolve(name)
    if source.kind == "gguf":
        return _of_gguf(Path(source.location))
    card = (
        Path(source.location) / "README.md" if source.kind == "directory" else _card_of_hub(source.location)
    )
    return None if card is None or not card.is_file() else _of_card(card)


def _of_gguf(path: Path) -> Licence | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    said = None if field is None else field.contents()
    return Licence(said, f"general.license of {path.name}") if isinstance(said, str) and said else None


def _of_card(path: Path) -> Licence | None:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        said = ModelCard.load(path).data.get("license")
    except (ValueError, YAMLError):  # front matter that is none
        return None
    return Licence(said, "the front matter of README.md") if isinstance(said, str) and said else None


def _card_of_hub(location: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    model, _, revision = location.partition("@")
    try:
        return Path(hf_hub_download(model, "README.md", revision=revision or None))
    except (OSError, HfHubHTTPError):  # no network, or no card
        return None
