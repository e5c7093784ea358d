"""The comparison as one HTML page that needs no network: pictures, curves, ranks, tables, published figures, notes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from mamba_attn.core.document import Look, render
from mamba_attn.datasets.samples import Sample
from mamba_attn.evaluation import plots
from mamba_attn.evaluation.contestants import FAILURES, Model
from mamba_attn.evaluation.localisation import HALF
from mamba_attn.evaluation.metrics import METRICS
from mamba_attn.evaluation.plan import Plan
from mamba_attn.evaluation.published import ABSENT, VIM, Published, beside
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.summary import Table
from mamba_attn.evaluation.tables import LEGEND, Rows, mark, text_tables
from mamba_attn.figures import png
from mamba_attn.figures.colours import PERCENTILE, limits
from mamba_attn.figures.picture import data_uri

_EDGE = (0, 255, 255)
_RANKED = ("positive_auc_top", "negative_auc_top", "gap_target", "gap_top", "insertion", "deletion", "miou", "map",
           "energy_ratio", "not_trap")  # fmt: skip


def page(plan: Plan, store: Store, tables: Sequence[Table], about: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        plan: what was compared.
        store: what was measured, the maps that are shown among it.
        tables: the figures.
        about: of the run: "command", "notes" and what else is worth a line.
    """
    looks = plots.styles(plan.methods)  # the same for all models
    return render(
        "compare.html",
        title="mamba-attn compare",
        command=about.get("command", ""),
        summary=_summary(tables),
        shared=f"{100 - PERCENTILE:g}",
        methods=list(plan.methods),
        pictures=[(data.name, _pictures(plan, store, selector)) for selector, data in plan.data.items()],
        curves=_curves(tables, looks),
        rankings=_rankings(tables, looks),
        about_tables=LEGEND,
        tables=text_tables(tables),
        published=_published(tables),
        absent=ABSENT,
        notes=about.get("notes", []),
    )


def _summary(tables: Sequence[Table]) -> str:
    parts = [
        f"{table.model.name} on {table.data.name}, {table.images} images"
        + ("" if table.accuracy is None else f", {table.accuracy:.1%} right")
        for table in tables
    ]
    return "; ".join(parts) + "."


def _pictures(plan: Plan, store: Store, selector: str) -> list[dict[str, Any]]:
    """Images down, a row per model; methods across, so that a ViT stands below the Mambas."""
    data, models = plan.data[selector], [model for its, model in plan.pairs if its == selector]
    rows = []
    for index in plan.indices(selector, "picture"):
        for place, model in enumerate(models):
            lines = {m: store.get(plan.key(data, index, model, m, "picture")) for m in plan.methods}
            rows.append({"first": place == 0, **_row(plan, selector, index, model, lines)})
    return rows


def _row(
    plan: Plan, selector: str, index: int, model: Model, lines: Mapping[str, dict[str, Any] | None]
) -> dict[str, Any]:
    try:
        sample = plan.data[selector].load(index, model.subject.transform)
    except (*FAILURES, OSError) as error:
        return {"error": str(error)}
    known = next((line for line in lines.values() if line and "map" in line), {})
    return {
        "error": "",
        "model": model.name,
        "answer": model.subject.classes[known["predicted"]] if "predicted" in known else "",
        "photo": data_uri(_outlined(sample)),
        "cells": [_cell(method, line) for method, line in lines.items()],
    }


def _outlined(sample: Sample) -> np.ndarray:
    """The image, the edge of its object drawn on it."""
    if sample.inside is None:
        return sample.pixels
    inside = np.pad(sample.inside.numpy() >= HALF, 1)
    around = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    edge = inside[1:-1, 1:-1] & ~around
    return np.where(edge[..., None], np.array(_EDGE, dtype=np.uint8), sample.pixels)


def _cell(method: str, line: dict[str, Any] | None) -> dict[str, str]:
    if line is None or "map" not in line:
        return {"heat": "", "title": str((line or {}).get("error", "does not fit this model"))}
    values = np.array(line["map"])
    heat = data_uri(png.matrix_rgb(values, **limits(values)))
    return {"heat": heat, "method": method, "title": f"{method}: {values.min():.2g} to {values.max():.2g}"}


def _curves(tables: Sequence[Table], looks: Mapping[str, Look]) -> list[tuple[str, Any, list[Markup]]]:
    """Per table its title, (method, look) of the legend, and the plots."""
    found = []
    for table in (table for table in tables if table.curves):
        drawn = [
            plots.curves(f"{name}, accuracy against the {against}", lines, looks)
            for of, against in (("top", "prediction"), ("target", "label"))
            for name in ("positive", "negative")
            if (lines := {m: its[f"{name}_{of}"] for m, its in table.curves.items() if f"{name}_{of}" in its})
        ]
        found.append((_title(table), [(method, looks[method]) for method in table.curves], drawn))
    return found


def _rankings(tables: Sequence[Table], looks: Mapping[str, Look]) -> list[tuple[str, list[Markup]]]:
    found = []
    for table in tables:
        drawn = [
            plots.intervals(
                f"{METRICS[name].title} ({'higher' if METRICS[name].better > 0 else 'lower'} is better)",
                {method: figure.interval for method, figure in table.figures[name].items()}, looks,
                {method: mark(figure) for method, figure in table.figures[name].items()},
            )
            for name in _RANKED if name in table.figures
        ]  # fmt: skip
        found.append((_title(table), drawn))
    return [each for each in found if each[1]]


def _published(tables: Sequence[Table]) -> list[Rows]:
    """Title, header and rows of published figures; of the tables that they can be compared with."""
    found: list[Rows] = []
    for table in tables:
        rows = beside(table)
        if not rows:
            continue
        names = list(rows[0].figures)
        titles = (f"{METRICS[name].title}, {whose}" for name in names for whose in ("paper", "ours"))
        cells = [cells for row in rows for cells in _beside(table, row, names)]
        found.append((f"{_title(table)}, beside Ali et al., 2403.01590", ["model", "method", "ours", *titles], cells))
    return found


def _beside(table: Table, row: Published, names: Sequence[str]) -> list[list[str]]:
    """A published row, once for every variant of ours."""
    ours = [method for method in table.methods if method.partition(":")[0] == row.ours and row.model == VIM]
    found = []
    for method in ours or [""]:
        shown = [table.figures.get(name, {}).get(method) for name in names]
        texts = ["" if its is None else f"{its.interval.value:.2f}" for its in shown]
        pairs = zip((f"{row.figures[name]:g}" for name in names), texts, strict=True)
        found.append([row.model, row.paper, method, *(text for pair in pairs for text in pair)])
    return found


def _title(table: Table) -> str:
    return f"{table.model.name} on {table.data.name}"
