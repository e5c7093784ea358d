"""Figures with their targets; the table on the terminal and the JSON file."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import TARGETS
from benchmarks.measure import Spread, machine
from mamba_attn.commands.terminal import show

__all__ = ["Figure", "figure", "finish", "show"]


@dataclass(frozen=True)
class Figure:
    """A measured figure: ``target`` is a key of TARGETS, ``how`` says with which backend or method.

    ``interval``: of 95 %, where one is known.
    """

    target: str
    how: str
    spread: Spread
    interval: tuple[float, float] | None = None

    def row(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        target = TARGETS[self.target]
        interval = {} if self.interval is None else {"interval": [*self.interval]}
        return {
            "what": target.what,
            "how": self.how,
            "value": self.spread.median,
            "unit": target.unit,
            "quartiles": [self.spread.low, self.spread.high],
            "rounds": self.spread.count,
            "at_least": target.at_least,
            "aim": target.aim,
            "met": target.met(self.spread.median),
            **interval,
        }


def figure(target: str, how: str, value: Spread | float, interval: tuple[float, float] | None = None) -> Figure:
    """Make a figure of a sample's spread or of a single number."""
    return Figure(target, how, value if isinstance(value, Spread) else Spread.of([value]), interval)


def finish(title: str, figures: Sequence[Figure], details: dict[str, Any], path: Path | None, quick: bool) -> None:
    """Show the figures and write everything to a JSON file.

    Args:
        title: of the table.
        figures: one per row.
        details: all that was measured.
        path: the file; None writes nothing.
        quick: whether this was a smoke test, whose numbers mean nothing; marked in the file.
    """
    header = ("what", "how", "measured", "quartiles", "at least", "aim", "met")
    rows = [
        (
            row["what"],
            row["how"],
            _number(row["value"], row["unit"]),
            " .. ".join(_number(value, "") for value in row["quartiles"]) if row["rounds"] > 1 else "",
            _number(row["at_least"], row["unit"]),
            _number(row["aim"], row["unit"]),
            "yes" if row["met"] else "NO",
        )
        for row in (item.row() for item in figures)
    ]
    show(title + (" (quick: these numbers mean nothing)" if quick else ""), header, rows)
    if path is None:
        return
    contents = {
        "quick": quick,
        "machine": machine(),
        "figures": [item.row() for item in figures],
        "details": details,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written(contents))
    print(f"\nwritten: {path}")


def written(contents: dict[str, Any]) -> str:
    """Return results as JSON; lists of numbers alone stand on one line.

    Args:
        contents: of the file; dataclasses are taken apart.
    """
    text = json.dumps(contents, indent=2, default=asdict)
    return re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _number(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e9:.3g} GB"
    return f"{value:.3g}{unit and ' ' + unit}"
