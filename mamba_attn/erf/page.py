"""``erf.html``: receptive fields of some models as one self-contained page, and the data of its figure."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from mamba_attn.core.document import Look, Plot, render
from mamba_attn.erf.fields import SHARES, ReceptiveField
from mamba_attn.figures import png
from mamba_attn.figures.colours import GRID, categories
from mamba_attn.figures.picture import data_uri

HEADER = ["model", "images", *(f"{share:.0%}" for share in SHARES), "field", "rollout", "attention by layer"]
_WIDE, _HIGH, _LEFT, _BOTTOM = 900, 280, 52, 26  # of the chart
_DASHES = ("", "7 3", "1.5 3", "9 3 2 3")


def page(fields: Mapping[str, ReceptiveField], command: str) -> str:
    """Render the page of receptive fields.

    Args:
        fields: by name of the model.
        command: how to make it again.
    """
    first = next(iter(fields.values()))
    looks, chart = _chart(fields)
    return render(
        "erf.html",
        title="mamba-attn erf",
        command=command,
        names=" beside ".join(fields),
        first=first,
        maps=[(name, _maps(name, each)) for name, each in fields.items()],
        chart=chart,
        looks=looks,
        header=HEADER,
        rows=table(fields),
    )


def table(fields: Mapping[str, ReceptiveField]) -> list[list[str]]:
    """Return a row per model, for ``HEADER``; distances in pixels.

    Args:
        fields: by name of the model.
    """
    rows = []
    for name, each in fields.items():
        squares = (each.rectangle(share) for share in SHARES) if each.gradient.any() else [(0, 0.0)] * len(SHARES)
        reach = each.reach
        far = [] if reach is None else list(reach.row_distance.values())
        spread = f"{min(far):.1f} to {max(far):.1f}" if far else ""
        rolled = "" if reach is None else f"{reach.rollout_distance:.1f}"
        sides = [f"{side} px, {area:.0%}" for side, area in squares]
        rows.append([name, str(each.images), *sides, f"{each.distance:.1f}", rolled, spread])
    return rows


def _maps(name: str, field: ReceptiveField) -> list[dict[str, Any]]:
    """The maps of a model as pictures with their titles, sizes in cells, and where the token is."""
    drawn = panels({name: field})
    return [
        {"title": title, "picture": data_uri(png.matrix_rgb(values)), "size": values.shape, "mark": mark}
        for title, values, mark in zip(drawn["titles"], drawn["maps"], drawn["marks"], strict=True)
    ]


def _chart(fields: Mapping[str, ReceptiveField]) -> tuple[list[tuple[str, Look]], Markup | None]:
    """Draw distances by layer, a colour per model and a dash per kind of distance; return the legend, and the chart."""
    lines: list[tuple[str, Look, list[float]]] = []
    count = max(0 if each.reach is None else len(each.reach.layers) for each in fields.values())
    for (name, each), colour in zip(fields.items(), categories(len(fields)), strict=True):
        if each.reach is None:
            continue
        kinds = {
            "what it reads": list(each.reach.row_distance.values()),
            "what all patches read, mean": list(each.reach.mean_distance.values()),
            "gradient, whole model": [each.distance] * count,
            "rollout, whole model": [] if each.reach.rollout is None else [each.reach.rollout_distance] * count,
        }
        lines += [
            (f"{name}: {kind}" if len(fields) > 1 else kind, Look(colour, dash), values)
            for (kind, values), dash in zip(kinds.items(), _DASHES, strict=True)
            if np.isfinite(values).any()
        ]
    if not lines:
        return [], None
    top = 1.06 * float(np.nanmax([max(values) for _, _, values in lines]))
    wide, high = _WIDE - _LEFT - 12, _HIGH - 12 - _BOTTOM
    plot = Plot(_WIDE, _HIGH)
    plot.title = "mean distances by layer"
    step = 10.0 ** np.floor(np.log10(top)) * (1 if top >= 3 * 10.0 ** np.floor(np.log10(top)) else 0.5)
    for value in np.arange(0, top, step).tolist():
        y = 12 + high * (1 - value / top)
        plot.level(_LEFT, _LEFT + wide, y, Look(GRID, width=1))
        plot.text(_LEFT - 5, y + 4, f"{value:g} px", "end")
    for layer in range(0, count, -(-count // 16)):
        plot.text(_LEFT + wide * layer / max(count - 1, 1), _HIGH - 6, str(layer + 1))
    for name, look, values in lines:
        places = [(at, value) for at, value in enumerate(values) if np.isfinite(value)]
        points = [(_LEFT + wide * at / max(count - 1, 1), 12 + high * (1 - value / top)) for at, value in places]
        plot.line(points, look, name)
        if len(points) == 1:
            plot.dot(*points[0], look.colour)
    return [(name, look) for name, look, _ in lines], plot.svg()


def panels(fields: Mapping[str, ReceptiveField]) -> dict[str, Any]:
    """Return the arguments of ``figures.reach``: every model's field, its rollout, what the token reads by layer.

    All maps, including attention, are scaled as in ``ReceptiveField.shown``, to be comparable.

    Args:
        fields: by name of the model; the names are left out where there is one.
    """
    maps: list[np.ndarray] = []
    titles: list[str] = []
    marks: list[tuple[float, float] | None] = []
    series: dict[str, list[float]] = {}
    levels: dict[str, float] = {}
    several = len(fields) > 1
    for name, each in fields.items():
        of = f"{name}: " if several else ""
        maps.append(each.shown())
        titles.append(f"{of}gradient")
        marks.append(_mark(each, each.gradient.shape))
        levels[f"{of}gradient"] = each.distance
        reach = each.reach
        if reach is None:
            continue
        if reach.rollout is not None:
            maps.append(_shown(reach.rollout))
            titles.append(f"{of}rollout")
            marks.append(_mark(each, reach.rollout.shape))
            levels[f"{of}rollout"] = reach.rollout_distance
        series[f"{of}what it reads"] = list(reach.row_distance.values())
        series[f"{of}what all patches read, mean"] = list(reach.mean_distance.values())
    series = dict(sorted(series.items(), key=lambda pair: "all patches" in pair[0]))  # models next to each other
    levels = dict(sorted(levels.items(), key=lambda pair: pair[0].endswith("rollout")))
    first = next(iter(fields.values()))
    layers = [] if first.reach is None else first.reach.layers
    names = ", ".join(fields)
    count = f"{first.images} image{'' if first.images == 1 else 's'}"
    title = f"{names}: receptive field of {first.reader}, {count}"
    return {
        "maps": maps,
        "titles": titles,
        "marks": marks,
        "layers": layers,
        "series": series,
        "levels": levels,
        "title": title,
        "size": max(140, min(260, round(1100 / sum(each.shape[1] / each.shape[0] for each in maps)))),
    }


def _shown(weights: np.ndarray) -> np.ndarray:
    drawn: np.ndarray = weights**0.2
    return drawn / (drawn.max() or 1.0)


def _mark(field: ReceptiveField, cells: tuple[int, ...]) -> tuple[float, float] | None:
    """The token in cells of a map."""
    if field.reader == "the class token":
        return None
    row, column = (
        at * n / pixels - 0.5 for at, n, pixels in zip(field.centre, cells, field.gradient.shape, strict=True)
    )
    return row, column
