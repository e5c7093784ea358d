"""The roofline as an RGB array; ``mamba_attn.figures.png`` has it too."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mamba_attn.figures.colours import INK
from mamba_attn.figures.roof import Group, Roof, roof

FINE = 2  # drawn this much larger, then averaged
_GRID = "#e4e4e4"
_LEGEND = 250  # pixels


def roofline_rgb(
    intensity: Any,
    rate: Any,
    *,
    groups: Sequence[str],
    bandwidth: float,
    rates: Mapping[str, float],
    floors: Any | None = None,
    estimated: Sequence[bool] | None = None,
    title: str | None = None,
    size: int = 620,
) -> np.ndarray:
    """Return a roofline as (rows, columns, 3) uint8.

    Args:
        intensity: as in ``figures.roofline``.
        rate: as in ``figures.roofline``.
        groups: as in ``figures.roofline``.
        bandwidth: as in ``figures.roofline``.
        rates: as in ``figures.roofline``.
        floors: as in ``figures.roofline``.
        estimated: as in ``figures.roofline``.
        title: above the picture.
        size: height in pixels.

    Raises:
        ValueError: as ``figures.roofline``.
    """
    best = np.asarray(() if floors is None else floors, dtype=np.float64)
    its = roof("roofline_rgb", intensity, rate, groups, estimated, bandwidth, rates, best)
    if floors is not None and best.shape != its.rate.shape:
        raise ValueError(f"roofline_rgb: expected a floor per point, got {best.shape} for {its.rate.shape} points.")
    paper = _Paper(its, round(1.55 * size), size)
    paper.axes(title)
    for number, ceiling in enumerate(its.ceilings):
        paper.line(ceiling.start, ceiling.stop, dashed=number > 0)
        if number:
            x, y = paper.at(*ceiling.stop)
            paper.text(x - 4, y - 5, ceiling.name, "rs", 11)
    for x, y in zip(its.intensity, best, strict=False):
        paper.bar(x, y)
    for group in its.groups:
        for index in group.members:
            paper.point(paper.at(its.intensity[index], its.rate[index]), group)
    paper.legend(its.ceilings[0].name, "cheapest known way" if best.size else None)
    return np.asarray(paper.image.resize((paper.width, paper.height), Image.Resampling.BOX))


class _Paper:
    """Draws on an enlarged image; sizes are given in pixels before the enlargement."""

    def __init__(self, its: Roof, width: int, height: int) -> None:
        self.its, self.width, self.height = its, width, height
        self.image = Image.new("RGB", (width * FINE, height * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.left, self.right, self.top, self.bottom = 80, width - _LEGEND, 46, height - 56

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the axes lies."""
        u, v = (
            np.log(value / ends[0]) / np.log(ends[1] / ends[0]) for value, ends in ((x, self.its.x), (y, self.its.y))
        )
        return self.left + float(u) * (self.right - self.left), self.bottom - float(v) * (self.bottom - self.top)

    def text(self, x: float, y: float, text: str, anchor: str = "lm", size: int = 12) -> None:
        """Write."""
        self.draw.text((x * FINE, y * FINE), text, INK, ImageFont.load_default(size * FINE), anchor=anchor)

    def stroke(self, start: tuple[float, float], stop: tuple[float, float], colour: str, width: float) -> None:
        """Draw a line between two places."""
        ends = tuple(value * FINE for value in (*start, *stop))
        self.draw.line(ends, colour, round(width * FINE))

    def axes(self, title: str | None) -> None:
        """Powers of ten, names, title."""
        for axis, (low, high) in enumerate((self.its.x, self.its.y)):
            for power in range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(high))) + 1):
                if axis:
                    _, y = self.at(self.its.x[0], 10.0**power)
                    self.stroke((self.left, y), (self.right, y), _GRID, 1)
                    self.text(self.left - 6, y, f"1e{power}", "rm")
                else:
                    x, _ = self.at(10.0**power, self.its.y[0])
                    self.stroke((x, self.top), (x, self.bottom), _GRID, 1)
                    self.text(x, self.bottom + 6, f"{10.0**power:g}", "ma")
        self.stroke((self.left, self.bottom), (self.right, self.bottom), INK, 1)
        self.stroke((self.left, self.top), (self.left, self.bottom), INK, 1)
        self.text((self.left + self.right) / 2, self.height - 14, "operations per byte moved", "mm", 13)
        self.text(10, 26, "operations per second", "lm", 13)
        if title:
            self.text(self.width / 2, 12, title, "mm", 15)

    def line(self, start: tuple[float, float], stop: tuple[float, float], dashed: bool) -> None:
        """Draw a ceiling."""
        (x0, y0), (x1, y1) = self.at(*start), self.at(*stop)
        count = max(1, round(np.hypot(x1 - x0, y1 - y0) / 12)) if dashed else 1
        for part in range(count):
            here, there = part / count, (part + (0.6 if dashed else 1)) / count
            first, last = ((x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in (here, there))
            self.stroke(first, last, INK, 1.5)

    def bar(self, x: float, y: float) -> None:
        """A short bar at a floor."""
        u, v = self.at(x, y)
        self.stroke((u - 8, v), (u + 8, v), INK, 2)

    def point(self, place: tuple[float, float], group: Group) -> None:
        """A disc, or a ring where it is estimated."""
        u, v = place
        box = tuple(value * FINE for value in (u - 5, v - 5, u + 5, v + 5))
        fill = None if group.estimated else group.colour
        self.draw.ellipse(
            box, fill, group.colour if group.estimated else "white", 2 * FINE if group.estimated else FINE
        )

    def legend(self, slope: str, floor: str | None) -> None:
        """What stands for what, on the right."""
        x, y = self.right + 16, self.top + 8
        self.stroke((x - 7, y + 5), (x + 7, y - 5), INK, 1.5)
        self.text(x + 16, y, slope)
        if floor:
            y += 22
            self.stroke((x - 8, y), (x + 8, y), INK, 2)
            self.text(x + 16, y, floor)
        for group in self.its.groups:
            y += 22
            self.point((x, y), group)
            self.text(x + 16, y, f"{group.name} (extrapolated)" if group.estimated else group.name)
