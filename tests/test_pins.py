"""The environment is the tested one. Some wrong versions fail in silence: docs/decisions/0003-pins.md."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def constraints() -> dict[str, str]:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    found = (re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)(\s*;.*)?", line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def test_import_mlflow_is_the_library_and_not_our_folder() -> None:
    import mlflow

    assert mlflow.__file__ is not None
    assert "site-packages" in Path(mlflow.__file__).parts
    assert not (PROJECT / "mlflow" / "__init__.py").exists()


def test_installed_versions_are_the_pinned_ones() -> None:
    pins = constraints()
    assert len(pins) > 50
    plain = {name: pin.partition("+")[0] for name, pin in pins.items()}
    present = {name: found.partition("+")[0] for name in pins if (found := installed(name))}
    # A platform may leave packages out (CUDA wheels, say); none may be another version.
    assert {name: v for name, v in present.items() if v != plain[name]} == {}


@pytest.mark.parametrize(
    ("package", "below"),
    [
        ("fastapi", (0, 151)),  # above, the Prefect server does not start
        ("sqlalchemy", (2, 1)),  # above, cron schedules silently never run
        ("prefect", (3, 10)),
    ],
)
def test_caps_hold(package: str, below: tuple[int, int]) -> None:
    assert tuple(int(part) for part in version(package).split(".")[:2]) < below
    assert package in {name.lower() for name in constraints()}
