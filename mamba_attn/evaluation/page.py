"""The comparison as one self-contained HTML page: pictures, curves, ranks, tables, published figures, notes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from mamba_attn.attribution.spec import method as parsed
from mamba_attn.core.document import Look, Plot, render
from mamba_attn.datasets.samples import Sample
from mamba_attn.evaluation.intervals import Interval
from mamba_attn.evaluation.localisation import HALF
from mamba_attn.evaluation.metrics import METRICS
from mamba_attn.evaluation.plan import Plan
from mamba_attn.evaluation.specs import FAILURES, Model
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.summary import Table
from mamba_attn.evaluation.tables import (
    ABSENT,
    LEGEND,
    TEXT_LEGEND,
    VIM,
    Published,
    Rows,
    beside,
    mark,
    published_of_texts,
    text_tables,
    what_of,
)
from mamba_attn.evaluation.texts import SWAP, TextPlan, examples
from mamba_attn.figures import png
from mamba_attn.figures.colours import CATEGORIES, GRID, PERCENTILE, limits
from mamba_attn.figures.picture import data_uri

_EDGE = (0, 255, 255)
_RANKED = (
    "positive_auc_top",
    "negative_auc_top",
    "gap_target",
    "gap_top",
    "insertion",
    "deletion",
    "shuffled_auc",
    "miou",
    "map",
    "energy_ratio",
    "not_distractor",
    "source_auc",
    "source_first",
    "tokens_gap",
)
_DASHES = ("", "5 3", "1.5 2.5", "8 3 2 3")  # if there are more methods than colours
_WIDTH, _HEIGHT = 318, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 22, 30
_TENTHS = range(1, 10)
_ZERO = "#888888"  # of the line at zero
_LONGEST = 38  # letters that fit next to an interval


def page(plan: Plan, store: Store, tables: Sequence[Table], about: Mapping[str, Any]) -> str:
    """Render the page of a comparison.

    Args:
        plan: the comparison.
        store: what was measured, including the maps to show.
        tables: the figures.
        about: metadata of the run: "command", "notes" and other lines.
    """
    looks = styles(plan.methods)  # the same for all models
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


def text_page(plan: TextPlan, tables: Sequence[Table], about: Mapping[str, Any]) -> str:
    """Render the page of a comparison on texts.

    Args:
        plan: the comparison.
        tables: the figures.
        about: metadata of the run: "command", "notes" and other lines.
    """
    return render(
        "compare_text.html",
        title="mamba-attn compare",
        command=about.get("command", ""),
        summary=_summary(tables),
        rankings=_rankings(tables, styles([*plan.methods, SWAP])),
        examples=[(f"{table.model.name} on {table.data.name}", _strips(plan, table)) for table in tables],
        about_tables=TEXT_LEGEND,
        tables=text_tables(tables),
        published=published_of_texts(tables),
        notes=about.get("notes", []),
    )


def _strips(plan: TextPlan, table: Table) -> list[tuple[str, list[Markup]]]:
    """Return what is explained in each of the first texts, and a strip of its tokens per method."""
    from mamba_attn.figures.text import tokens

    return [
        (
            each.about,
            [
                Markup(tokens(each.words, values, asked=each.place, title=parsed(name, "methods").title))
                for name, values in each.values.items()
            ],
        )
        for each in examples(plan, table)
    ]


def _summary(tables: Sequence[Table]) -> str:
    parts = [
        f"{table.model.name} on {table.data.name}, {table.images} {what_of(table)}"
        + ("" if table.accuracy is None else f", {table.accuracy:.1%} correct")
        for table in tables
    ]
    return "; ".join(parts) + "."


def _pictures(plan: Plan, store: Store, selector: str) -> list[dict[str, Any]]:
    """Return images down, a row per model, and methods across, which puts a ViT below the Mambas."""
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
        "answer": _answer(model.subject.classes, plan.data[selector].classes, sample.label, known.get("predicted")),
        "photo": data_uri(_outlined(sample)),
        "cells": [_cell(method, line) for method, line in lines.items()],
    }


def _answer(own: Sequence[str], classes: Sequence[str], label: int | None, predicted: int | None) -> str:
    """The predicted class, and whether it is right, where the model has the label's class."""
    if predicted is None:
        return ""
    name = own[predicted]
    truth = classes[label] if label is not None and label < len(classes) else None
    if truth not in own:
        return str(name)
    return f"{name} (correct)" if name == truth else f"{name} (wrong, label: {truth})"


def _outlined(sample: Sample) -> np.ndarray:
    """Return the image with the outline of its object."""
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
    """Return per table its title, (method, look) of the legend, and the plots."""
    found = []
    for table in (table for table in tables if table.curves):
        drawn = [
            curves(f"{name}, accuracy against the {against}", lines, looks)
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
            intervals(
                f"{METRICS[name].title} ({'higher' if METRICS[name].better > 0 else 'lower'} is better)",
                {method: figure.interval for method, figure in table.figures[name].items()},
                looks,
                {method: mark(figure) for method, figure in table.figures[name].items()},
            )
            for name in _RANKED
            if name in table.figures
        ]
        found.append((_title(table), drawn))
    return [each for each in found if each[1]]


def _published(tables: Sequence[Table]) -> list[Rows]:
    """Return title, header and rows of published figures, for tables that they can be compared with."""
    found: list[Rows] = []
    for table in tables:
        rows = beside(table)
        if not rows:
            continue
        names = list(rows[0].figures)
        titles = (f"{METRICS[name].title}, {whose}" for name in names for whose in ("paper", "ours"))
        cells = [cells for row in rows for cells in _beside(table, row, names)]
        found.append((f"{_title(table)}, next to Ali et al., 2403.01590", ["model", "method", "ours", *titles], cells))
    return found


def _beside(table: Table, row: Published, names: Sequence[str]) -> list[list[str]]:
    """Return a published row, once for every variant of ours."""
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


def styles(methods: Sequence[str]) -> dict[str, Look]:
    """Return how each method's lines look."""
    count = len(CATEGORIES)
    return {
        method: Look(CATEGORIES[place % count], _DASHES[place // count % len(_DASHES)])
        for place, method in enumerate(methods)
    }


def curves(title: str, lines: Mapping[str, Sequence[float]], looks: Mapping[str, Look]) -> Markup:
    """Draw accuracies at 10 to 90 % removed as one plot.

    Args:
        title: above the plot.
        lines: nine accuracies in 0..1 per method.
        looks: from ``styles``.
    """
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    plot = Plot(_WIDTH, _HEIGHT)
    plot.text(_LEFT + wide / 2, 13, title, bold=True)
    for step in range(0, 101, 25):
        y = _TOP + high * (1 - step / 100)
        plot.level(_LEFT, _LEFT + wide, y, Look(GRID, width=1))
        plot.text(_LEFT - 5, y + 4, f"{step} %", "end")
    for tenths in _TENTHS:
        plot.text(_LEFT + wide * (tenths - 1) / 8, _HEIGHT - 14, f"{10 * tenths}")
    plot.text(_LEFT + wide / 2, _HEIGHT - 2, "% of the cells removed")
    for method, values in lines.items():
        places = [(tenths, value) for tenths, value in zip(_TENTHS, values, strict=True)]
        plot.line([(_LEFT + wide * (x - 1) / 8, _TOP + high * (1 - y)) for x, y in places], looks[method], method)
    return plot.svg()


def _ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers within a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(times for times in (5, 2, 1) if times == 1 or (high - low) / (times * step) >= 3)
    return [round(number * step, 12) + 0.0 for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def intervals(
    title: str, figures: Mapping[str, Interval], looks: Mapping[str, Look], marks: Mapping[str, str], width: int = 706
) -> Markup:
    """Draw figures with their intervals, one line each, in the given order.

    Args:
        title: above the plot.
        figures: by method.
        looks: from ``styles``.
        marks: by method, text after its numbers.
        width: in pixels.
    """
    names, row = 240, 19
    low, high = min(each.low for each in figures.values()), max(each.high for each in figures.values())
    low, high = (low, high) if high > low else (low - 1, high + 1)
    span = width - names - 172

    def x(value: float) -> float:
        return names + span * (value - low) / (high - low)

    bottom = 24 + row * len(figures)
    plot = Plot(width, bottom + 20)
    plot.text(names, 13, title, "start", bold=True)
    for tick in _ticks(low, high):
        plot.upright(x(tick), 20, bottom, Look(_ZERO if tick == 0 else GRID, width=1))
        plot.text(x(tick), bottom + 13, f"{tick:g}")
    for place, (method, each) in enumerate(figures.items()):
        y, colour = 24 + row * place + row / 2, looks[method].colour
        value, below, above = (f"{round(number, 9) + 0.0:.3g}" for number in (each.value, each.low, each.high))
        label = f"{value} ({below} to {above}){marks.get(method, '')}"
        name = method if len(method) <= _LONGEST else f"{method[: _LONGEST - 1]}…"
        plot.text(names - 8, y + 4, name, "end")
        plot.level(x(each.low), x(each.high), y, Look(colour, width=2), f"{method}: {label}")
        plot.dot(x(each.value), y, colour, 3.5)
        plot.text(width - 160, y + 4, label, "start")
    return plot.svg()
