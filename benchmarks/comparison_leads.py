"""How far our combination is ahead of the best other method, from the figures that results/compare.json holds.

A run takes the paired interval, image by image. The results hold no images, so that here the interval is of two methods
as if each had been measured on images of its own (Zou and Donner 2008, with correlation 0): where both do well on the
same images it is too wide.
"""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.cases import TARGETS
from benchmarks.comparison import OURS, PARTS
from benchmarks.measure import Spread
from benchmarks.report import figure
from mamba_attn.evaluation.metrics import METRICS

FIGURES = "figures [value, low, high, images, place]"
_QUARTILE = 0.6745 / 1.96  # of a normal interval's half width
Stored = Sequence[Any]  # value, low, high, images, place


def derive(results: dict[str, Any]) -> None:
    """Replace the leads among the figures by those over the best of all other methods.

    Args:
        results: contents of compare.json.

    Raises:
        ValueError: the best method got fewer images than ours, and no paired lead over it is stored.
    """
    found = []
    for part in (part for part in PARTS if part.aims):
        for table in tables_of(results["details"][part.name]):
            found += [_lead(table, aim, results) for aim in part.aims if OURS in table[FIGURES].get(aim, {})]
    results["figures"] = [*found, *(row for row in results["figures"] if "lead of" not in row["what"])]
    results["details"].pop("baselines", None)


def tables_of(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of a part of the comparison, of the images that chose nothing.

    Args:
        details: of the part.
    """
    found: list[dict[str, Any]] = details["halves"]["report"] if "halves" in details else details["tables"]
    return found


def difference(own: Stored, other: Stored, better: int) -> tuple[float, float, float]:
    """Return by how much a figure is better than another, and the interval of that.

    Args:
        own: a figure with its interval.
        other: the same of another method.
        better: 1 where more is better, -1 where less is.
    """
    (a, a_low, a_high, *_), (b, b_low, b_high, *_) = (own, other) if better > 0 else (other, own)
    value = a - b
    return value, value - math.hypot(a - a_low, b_high - b), value + math.hypot(a_high - a, b - b_low)


def _lead(table: dict[str, Any], aim: str, results: dict[str, Any]) -> dict[str, Any]:
    """The row of a lead: the paired one where a run measured it, else one from two intervals."""
    found, target = table[FIGURES][aim], f"{table['model']} {aim}"
    best = next(name for name in found if name != OURS)
    label = TARGETS[target].what.partition(",")[0].partition(" (")[0]
    for row in results["figures"]:
        if row["what"].startswith(label) and "lead of" in row["what"] and row["how"] == best:
            return {**row, "what": TARGETS[target].what, "unit": TARGETS[target].unit}
    if found[best][3] < found[OURS][3]:
        raise ValueError(
            f"{target}: {best} got fewer images, and no paired lead over it is stored; run the comparison."
        )
    numbers = (round(number, 3) for number in difference(found[OURS], found[best], METRICS[aim].better))
    value, low, high = numbers
    quartiles = (round(value + _QUARTILE * (end - value), 3) for end in (low, high))
    return figure(target, best, Spread(value, *quartiles, found[OURS][3]), (low, high)).row()
