"""Verdicts of stored findings, from the numbers of every seed; and how often an untrained model is called outside.

Nothing is measured here: results/findings.json holds every seed's number, so that a better rule needs no model.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.findings_tables import digits
from mamba_attn.analytics.index import place_of
from mamba_attn.findings.controls import ALL, MODEL, OUTSIDE, Row, compared, pairs
from mamba_attn.findings.intervals import LEVEL, Estimate
from mamba_attn.findings.registry import FINDINGS
from mamba_attn.findings.tables import row_as_json

PARTS = ("models", "orders", "class tokens", "digits", "trained seeds", "depths")


def derive(details: dict[str, Any]) -> None:
    """Replace the verdicts of all stores by those of the rule as it is now.

    Args:
        details: of the results.
    """
    for store in stores_of(details):
        store["rows"] = [digits(row_as_json(row)) for row in compared(rows_of(store))]
        store["pairs"] = pairs([stage for stage, _ in place_of(store["depths"], [])])


def stores_of(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stores of all parts that were measured.

    Args:
        details: of the results.
    """
    return [store for part in PARTS for store in details.get(part, {"stores": []})["stores"]]


def rows_of(store: dict[str, Any]) -> list[Row]:
    """Return the stored rows, once each: the mean of a number that only the whole model has is that number.

    Args:
        store: of the results.
    """
    return [
        Row(
            row["finding"],
            row["place"],
            Estimate(**row["trained"]),
            row.get("random"),
            tuple(row.get("seeds", ())),
            reordered=row.get("reordered"),
            order=Estimate(**row["order"]) if "order" in row else None,
            shuffled=row.get("shuffled"),
            others=tuple(row.get("others", ())),
        )
        for row in store["rows"]
        if not (row["place"] == ALL and FINDINGS[row["finding"]].level == "model")
    ]


def untrained_in_place(details: dict[str, Any]) -> Iterator[list[Row]]:
    """Yield the whole-model rows of every store once per seed, that seed in the trained model's place.

    Args:
        details: of the results.
    """
    for store in stores_of(details):
        rows = [row for row in rows_of(store) if row.place in (ALL, MODEL)]
        for at in range(min((len(row.seeds) for row in rows), default=0)):
            yield compared([_with_seed(row, at) for row in rows])


def called_outside(details: dict[str, Any]) -> tuple[list[bool], list[bool]]:
    """Return of every number of an untrained model whether it is called outside: by p alone, after Holm's correction.

    Args:
        details: of the results.
    """
    found = [row.untrained for rows in untrained_in_place(details) for row in rows if row.untrained is not None]
    return [its.chance <= LEVEL for its in found], [its.corrected <= OUTSIDE for its in found]


def _with_seed(row: Row, at: int) -> Row:
    others = row.seeds[:at] + row.seeds[at + 1 :]
    return replace(row, trained=Estimate(row.seeds[at], None, None, row.trained.units), seeds=others)
