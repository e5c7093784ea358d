"""What the figure of receptive fields shows: from fields to the arguments of ``figures.reach``."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_attn.erf.receptive_field import ReceptiveField


def panels(fields: Mapping[str, ReceptiveField]) -> dict[str, Any]:
    """Return the arguments of ``figures.reach``: every model's field, its rollout, what the token reads by layer.

    Maps are drawn as ``ReceptiveField.shown`` does it, the attention's too, so that they can be compared.

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
    series = dict(sorted(series.items(), key=lambda pair: "all patches" in pair[0]))  # models beside each other
    levels = dict(sorted(levels.items(), key=lambda pair: pair[0].endswith("rollout")))
    first = next(iter(fields.values()))
    layers = [] if first.reach is None else first.reach.layers
    names = ", ".join(fields)
    count = f"{first.images} image{'' if first.images == 1 else 's'}"
    title = f"{names}: receptive field of {first.reader}, {count}"
    return {
        "maps": maps, "titles": titles, "marks": marks, "layers": layers, "series": series, "levels": levels,
        "title": title, "size": max(140, min(260, round(1100 / sum(each.shape[1] / each.shape[0] for each in maps)))),
    }  # fmt: skip


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
