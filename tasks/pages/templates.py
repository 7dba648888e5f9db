"""Templates of pages: everything that is put into one is escaped, nothing that is missing is passed over."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from tasks.pages import figures
from tasks.pages.parts import number, plain

_HERE = "tasks.pages"


def resource(package: str, name: str) -> str:
    """Return a text file that lies in a package."""
    return (files(package) / name).read_text("utf-8")


@lru_cache
def template(package: str, name: str) -> Any:
    """Return a Jinja template that lies in `package`.

    It may import the macros here (`macros.html.jinja`), and has `style` (the style sheet of all pages), `mark` (the sign of
    a verdict), and the filters `plain` and `number`.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader(_HERE, "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "number": number}
    environment.globals |= {
        "style": Markup(figures.STYLE + resource(_HERE, "style.css")),
        "mark": figures.verdict_mark,
    }
    return environment.get_template(name)
