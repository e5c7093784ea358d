"""HTML pages in one file that need no network, from the templates of this package; charts in them as SVG."""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Return a page; plain text in the values stays text, ``Markup`` in them is HTML.

    Args:
        template: its file in ``mamba_attn/templates``; pages extend ``base.html``.
        values: what its names stand for. "title" is needed by all; "command" says how to make the page again.
    """
    return _environment().get_template(template).render(values)


class Look(NamedTuple):
    """How a line is drawn.

    Args:
        colour: as CSS writes it.
        dash: lengths drawn and left out, in pixels; empty: drawn through.
        width: in pixels.
    """

    colour: str
    dash: str = ""
    width: float = 1.8

    @property
    def html(self) -> Markup:
        """Attributes of an element of SVG."""
        dash = Markup(' stroke-dasharray="{}"').format(self.dash) if self.dash else ""
        return Markup('stroke="{}" stroke-width="{:g}"{}').format(self.colour, self.width, dash)


class Plot:
    """A chart as SVG, drawn from back to front; places are (x, y) in pixels from the corner above left."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[Markup] = []

    def text(self, x: float, y: float, text: str, anchor: str = "middle", *, bold: bool = False) -> None:
        """Write, so that the text starts, has its middle or ends there."""
        weight = Markup(' font-weight="600"') if bold else ""
        place = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>')
        self.parts.append(place.format(x, y, anchor, weight, text))

    def line(self, points: Iterable[tuple[float, float]], look: Look, title: str) -> None:
        """Draw a curve from place to place; its title is under the pointer."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        form = Markup('<polyline points="{}" fill="none" {}><title>{}</title></polyline>')
        self.parts.append(form.format(places, look.html, title))

    def level(self, left: float, right: float, y: float, look: Look, title: str = "") -> None:
        """Draw a level line; its title, if any, is under the pointer."""
        label = Markup("<title>{}</title>").format(title) if title else ""
        form = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}" {}>{}</line>')
        self.parts.append(form.format(left, right, look.html, label, y=y))

    def dot(self, x: float, y: float, colour: str, radius: float = 3) -> None:
        """Draw a disc."""
        self.parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:g}" fill="{}"/>').format(x, y, radius, colour))

    def svg(self) -> Markup:
        """Return all of it; as wide as given, or as the page lets ``svg.plot`` be."""
        frame = Markup('<svg class=plot viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img">{2}</svg>')
        return frame.format(self.width, self.height, Markup("").join(self.parts))


@cache
def _environment() -> Environment:
    loader = PackageLoader("mamba_attn", "templates")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
