"""The rows on the terminal, in a JSON file and as a roofline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kernel.ceilings import Ceilings
from benchmarks.kernel.rows import Row
from mamba_attn.commands.terminal import show

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

_HEADER = ("model", "pixels", "batch", "type", "what", "how", "seconds", "quartiles", "of the floor", "")


def show_rows(rows: Sequence[Row], figures: Sequence[dict[str, Any]], ceilings: Ceilings) -> None:
    """Print everything: the ceilings, what was measured, what was not and why, the targets.

    Args:
        rows: of all configurations.
        figures: what ``targets.figures`` returned.
        ceilings: of the machine.
    """
    rates = {"copy": f"{ceilings.copy:.3g} B/s", "exponentials": f"{ceilings.exponentials:.3g} /s"}
    rates |= {f"{name} product": f"{rate:.3g} op/s" for name, rate in products(ceilings).items()}
    show("ceilings of this machine", list(rates), [list(rates.values())])
    show("hidden attention and what it costs", _HEADER, [_cells(row) for row in rows if row.seconds])
    missing: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            missing.setdefault((row.what, row.how, row.reason), []).append(str(row.its))
    if missing:
        cells = [(what, how, _few(where), reason) for (what, how, reason), where in missing.items()]
        show("not measured", ("what", "how", "where", "because"), cells)
    header = ("what", "measured", "at least", "aim", "met", "how")
    show("figures to reach", header, [_figure(each) for each in figures])


def contents(
    rows: Sequence[Row],
    figures: Sequence[dict[str, Any]],
    ceilings: Ceilings,
    header: dict[str, Any],
    quick: bool,
    details: dict[str, Any],
) -> dict[str, Any]:
    """Return what stands in the JSON file.

    Args:
        rows: of all configurations.
        figures: what ``targets.figures`` returned.
        ceilings: of the machine.
        header: what ``machine.machine`` returned.
        quick: whether the numbers mean nothing.
        details: whatever else is to be known.
    """
    return {
        "quick": quick,
        "machine": header,
        "figures": list(figures),
        "details": {"ceilings": ceilings.as_dict(), **details, "rows": [row.as_dict() for row in rows]},
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        path: the file.
        found: what ``contents`` returned.
    """
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def products(ceilings: Ceilings) -> dict[str, float]:
    """Return the rates of matrix products, by name."""
    return {"float32": ceilings.float32, **ceilings.matrix}


def roofline(rows: Sequence[Row], ceilings: Ceilings, title: str) -> "tuple[go.Figure, np.ndarray] | None":
    """Return the roofline of every backend's attention, one point per shape of layers, and the same as RGB.

    None where no attention was measured.

    Args:
        rows: of all configurations.
        ceilings: of the machine.
        title: above the picture.
    """
    from benchmarks.kernel import roofline as chart

    points = [(row, shape) for row in rows for shape in row.shapes if shape.seconds > 0]
    if not points:
        return None
    intensity = [shape.floor.work.intensity for _, shape in points]
    rate = [shape.floor.work.flops / shape.seconds for _, shape in points]
    shared: dict[str, Any] = {
        "groups": [row.how for row, _ in points],
        "estimated": [bool(row.extrapolated) for row, _ in points],
        "floors": [shape.floor.work.flops / shape.floor.seconds for _, shape in points],
        "bandwidth": ceilings.copy,
        "rates": {
            **{f"{name} product": value for name, value in products(ceilings).items()},
            "direct form's exponentials": 2 * ceilings.exponentials,
        },
        "title": title,
    }
    labels = [f"{row.its}: {shape.scans}" for row, shape in points]
    return chart.roofline(intensity, rate, labels, **shared), chart.roofline_rgb(intensity, rate, **shared)


def _cells(row: Row) -> tuple[str, ...]:
    if row.seconds is None:
        raise ValueError(f"{row.its}: {row.what}, {row.how} was not measured.")
    spread = f"{row.seconds.low:.3g} .. {row.seconds.high:.3g}" if row.seconds.count > 1 else ""
    fraction = "" if row.fraction is None else f"{100 * row.fraction:.2g} %"
    its, mark = row.its, "~ " if row.extrapolated else ""
    return (
        its.model,
        str(its.pixels),
        str(its.batch),
        its.dtype,
        row.what,
        row.how,
        f"{mark}{row.seconds.median:.3g}",
        spread,
        fraction,
        "extrapolated from a few rows" if row.extrapolated else "",
    )


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _figure(row: dict[str, Any]) -> tuple[str, ...]:
    unit = f" {row['unit']}" if row["unit"] else ""
    limits = (f"{row['at_least']:g}{unit}", f"{row['aim']:g}{unit}")
    if row["value"] is None:
        return (row["what"], row["reason"], *limits, "", "")
    return (row["what"], f"{row['value']:.3g}{unit}", *limits, "yes" if row["met"] else "NO", row["how"])
