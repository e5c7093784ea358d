"""A table and a progress bar on the terminal."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: rich's on a terminal, aligned plain text elsewhere.

    Args:
        title: above it.
        header: names of the columns.
        rows: their cells.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    print(plain(title, header, rows), end="")


def plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as aligned text, an empty line before it; the arguments are those of ``show``."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "".join(f"{line}\n" for line in ("", title, *lines))


def bar(console: object | None = None) -> "Progress":
    """Return a progress bar that says how much is left.

    Args:
        console: rich's, where it is shown. Default: standard output.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)  # type: ignore[arg-type]
