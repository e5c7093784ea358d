"""``erf.html``: receptive fields of some models as one self-contained page, and the data of its figure."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from mamba_attn.core.document import render
from mamba_attn.erf.fields import SHARES, ReceptiveField
from mamba_attn.figures.charts import distances, reach

HEADER = ["model", "images", *(f"{share:.0%}" for share in SHARES), "field", "rollout", "attention by layer"]
_SIZE = 240  # height of a map in pixels
_CONFIG = {"displaylogo": False, "responsive": True}


def page(fields: Mapping[str, ReceptiveField], command: str) -> str:
    """Render the page of receptive fields.

    Args:
        fields: by name of the model.
        command: how to make it again.
    """
    first = next(iter(fields.values()))
    drawn = panels(fields)
    chart = distances(drawn["layers"], drawn["series"], drawn["levels"]) if drawn["layers"] else None
    return render(
        "erf.html",
        title="mamba-attn erf",
        command=command,
        names=", ".join(fields),
        first=first,
        maps=[_html(_maps(name, each), script=each is first) for name, each in fields.items()],
        chart=None if chart is None else _html(chart, script=False),
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


def _maps(name: str, field: ReceptiveField) -> Any:
    drawn = panels({name: field})
    figure = reach(drawn["maps"], drawn["titles"], marks=drawn["marks"], title=name, size=_SIZE)
    wide = round(sum(_SIZE * each.shape[1] / each.shape[0] + 24 for each in drawn["maps"]))
    return figure.update_layout(width=wide, margin={"l": 0, "r": 8}, title={"x": 0, "xanchor": "left", "font_size": 15})


def _html(figure: Any, *, script: bool) -> Markup:
    return Markup(figure.to_html(full_html=False, include_plotlyjs=script, config=_CONFIG))


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
