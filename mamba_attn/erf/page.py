"""``erf.html``: receptive fields of some models as one page that needs no network."""

from collections.abc import Mapping
from typing import Any

from mamba_attn.erf.figure import panels
from mamba_attn.erf.receptive_field import SHARES, ReceptiveField
from mamba_attn.figures.document import document, safe
from mamba_attn.figures.reach import distances, reach

HEADER = ["model", "images", *(f"{share:.0%}" for share in SHARES), "field", "rollout", "attention by layer"]
_STYLE = """
.maps{display:flex;flex-wrap:wrap;gap:4px 28px}.maps>div{max-width:100%;overflow-x:auto}
.figures{font-size:13px;font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}
.figures th{text-align:left;font-weight:600;border-bottom:1px solid #bbb;padding:3px 16px 3px 0;vertical-align:bottom}
.figures td{padding:3px 16px 3px 0;white-space:nowrap}
"""
_SIZE = 240  # height of a map in pixels
_CONFIG = {"displaylogo": False, "responsive": True}
_MAPS = (
    "Gradient: how much the features there depend on each pixel of the image. Rollout: what attention alone passes on, "
    "through all layers. Brighter is more; both are drawn to the power of 0.2, so that what is far shows; the cross "
    "marks the place."
)
_TABLE = (
    "Under a percentage stands the side of the square around the place that holds so much of the gradient, and the "
    "part of the image inside. Field and rollout: mean distances from the place in pixels, of the gradient and of the "
    "rollout; attention by layer: the least and the largest of what it reads."
)


def page(fields: Mapping[str, ReceptiveField], command: str) -> str:
    """Return the page.

    Args:
        fields: by name of the model.
        command: how to make it again.
    """
    first = next(iter(fields.values()))
    drawn = panels(fields)
    maps = "".join(
        f"<div>{_html(_maps(name, each), name == next(iter(fields)))}</div>" for name, each in fields.items()
    )
    chart = ""
    if drawn["layers"]:
        figure = distances(drawn["layers"], drawn["series"], drawn["levels"])
        chart = f"<h2>How far, by layer</h2>{_html(figure, False)}"
    head = "".join(f"<th>{safe(each)}</th>" for each in HEADER)
    rows = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in table(fields))
    count = f"{first.images} image{'' if first.images == 1 else 's'}"
    body = (
        f"<h1>{safe(', '.join(fields))}: receptive field of {safe(first.reader)}</h1>"
        f"<p class=note>Behind {safe(first.layer)}, mean of {count}. {_MAPS}</p><div class=maps>{maps}</div>{chart}"
        f"<h2>In numbers</h2><p class=note>{_TABLE}</p><div class=scroll><table class=figures><tr>{head}</tr>{rows}"
        f"</table></div><h2>Again</h2><p><code>{safe(command)}</code></p>"
    )
    return document("mamba-attn erf", body, _STYLE)


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


def _html(figure: Any, script: bool) -> str:
    return str(figure.to_html(full_html=False, include_plotlyjs=script, config=_CONFIG))
