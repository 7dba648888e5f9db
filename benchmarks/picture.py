"""Draw what a command printed: `FORCE_COLOR=1 COLUMNS=118 forebay demo | python -m benchmarks.picture docs/demo.svg TITLE`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    target, title = Path(sys.argv[1]), sys.argv[2]
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(sys.stdin.read()))
    target.write_text(console.export_svg(title=title))


if __name__ == "__main__":
    main()
