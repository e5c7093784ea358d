"""Renders self-contained HTML pages from the package's templates, and draws charts in them as SVG."""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Render a page. Plain text in the values is escaped; ``Markup`` is inserted as HTML.

    Args:
        template: file in ``mamba_attn/templates``; pages extend ``base.html``.
        values: the template's variables. All need "title"; "command" is the command that makes the page again.
    """
    return _environment().get_template(template).render(values)


class Look(NamedTuple):
    """How a line is drawn.

    Args:
        colour: in CSS notation.
        dash: lengths of dashes and gaps, in pixels; empty for a solid line.
        width: in pixels.
    """

    colour: str
    dash: str = ""
    width: float = 1.8

    @property
    def html(self) -> Markup:
        """Return the line's attributes for an SVG element."""
        dash = Markup(' stroke-dasharray="{}"').format(self.dash) if self.dash else ""
        return Markup('stroke="{}" stroke-width="{:g}"{}').format(self.colour, self.width, dash)


class Plot:
    """A chart as SVG, drawn from back to front; positions are (x, y) in pixels from the upper left corner.

    ``title`` names it for screen readers: the bold text, if there is any.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height, self.title = width, height, "chart"
        self.parts: list[Markup] = []

    def text(self, x: float, y: float, text: str, anchor: str = "middle", *, bold: bool = False) -> None:
        """Write text that starts, is centred or ends at (x, y)."""
        weight = Markup(' font-weight="600"') if bold else ""
        self.title = text if bold else self.title
        place = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>')
        self.parts.append(place.format(x, y, anchor, weight, text))

    def line(self, points: Iterable[tuple[float, float]], look: Look, title: str) -> None:
        """Draw a curve through the points; the pointer shows its title."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        form = Markup('<polyline points="{}" fill="none" {}><title>{}</title></polyline>')
        self.parts.append(form.format(places, look.html, title))

    def level(self, left: float, right: float, y: float, look: Look, title: str = "") -> None:
        """Draw a horizontal line; the pointer shows its title, if any."""
        label = Markup("<title>{}</title>").format(title) if title else ""
        form = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}" {}>{}</line>')
        self.parts.append(form.format(left, right, look.html, label, y=y))

    def upright(self, x: float, top: float, bottom: float, look: Look) -> None:
        """Draw a vertical line."""
        form = Markup('<line x1="{x:.1f}" x2="{x:.1f}" y1="{:.1f}" y2="{:.1f}" {}/>')
        self.parts.append(form.format(top, bottom, look.html, x=x))

    def dot(self, x: float, y: float, colour: str, radius: float = 3) -> None:
        """Draw a disc around (x, y), radius in pixels."""
        self.parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:g}" fill="{}"/>').format(x, y, radius, colour))

    def svg(self) -> Markup:
        """Return the chart as an element, as wide as given or as the page allows ``svg.plot`` to be."""
        frame = Markup(
            '<svg class=plot viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{3}">{2}</svg>'
        )
        return frame.format(self.width, self.height, Markup("").join(self.parts), self.title)


@cache
def _environment() -> Environment:
    loader = PackageLoader("mamba_attn", "templates")
    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
