"""``erf.html``: receptive fields of some models as one page that needs no network."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mamba_attn.core.document import render
from mamba_attn.erf.figure import panels
from mamba_attn.erf.receptive_field import SHARES, ReceptiveField
from mamba_attn.figures.charts import distances, reach

HEADER = ["model", "images", *(f"{share:.0%}" for share in SHARES), "field", "rollout", "attention by layer"]
_SIZE = 240  # height of a map in pixels
_CONFIG = {"displaylogo": False, "responsive": True}


def page(fields: Mapping[str, ReceptiveField], command: str) -> str:
    """Return the page.

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
