"""Tables and progress bars on the terminal."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_PADDING = 3  # columns of the terminal between two of a table
_WORD = 60  # letters that are kept together; a longer path may be broken


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: on a terminal with rich, in parts that fit its width; elsewhere as aligned plain text.

    Args:
        title: above it.
        header: names of the columns; the first one is repeated in every part, and the second if the first has no name.
        rows: their cells.
    """
    if not sys.stdout.isatty():
        print(plain(title, header, rows), end="")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for shown in _parts(header, rows, shutil.get_terminal_size().columns):
        table = Table(title=title)
        for index in shown:
            words = [word for row in (header, *rows) for word in row[index].split()]
            longest = min(max(map(len, words), default=1), _WORD)  # of words, which are not broken
            table.add_column(header[index], overflow="fold", min_width=longest)
        for row in rows:
            table.add_row(*(Text(row[index]) for index in shown))
        Console().print(table)


def plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as aligned text after an empty line; arguments as in ``show``."""
    widths = _widths(header, rows)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "".join(f"{line}\n" for line in ("", title, *lines))


def say(sentence: str) -> None:
    """Print a sentence: on a terminal in lines that fit its width, elsewhere in one."""
    width = shutil.get_terminal_size().columns
    print(textwrap.fill(sentence, width, break_on_hyphens=False) if sys.stdout.isatty() else sentence)


def progress_bar() -> "Progress":
    """Return a progress bar on standard error with the remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]


def _parts(header: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> Iterator[list[int]]:
    """Yield the indices of columns that fit next to each other; every part includes those that name the rows."""
    widths = [width + _PADDING for width in _widths(header, rows)]
    names = [0, 1] if not header[0] and len(header) > 2 else [0]
    part = list(names)
    for index in range(len(names), len(header)):
        if len(part) > len(names) and sum(widths[each] for each in [*part, index]) + 1 > room:
            yield part
            part = list(names)
        part.append(index)
    yield part
