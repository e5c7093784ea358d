"""Receptive fields and distances by layer as an RGB array; ``mamba_attn.figures.png`` has it too."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mamba_attn.figures.colours import INK, SEQUENTIAL, scale, to_rgb
from mamba_attn.figures.reach import chart_series, check_reach

FINE = 2  # drawn this much larger, then averaged
_EDGE, _CAPTION, _CHART, _LEFT = 12, 22, 190, 52  # pixels
_MARK, _GRID = "#00ffff", "#e4e4e4"


def reach_rgb(
    maps: Sequence[Any],
    titles: Sequence[str],
    *,
    marks: Sequence[tuple[float, float] | None] | None = None,
    layers: Sequence[str] = (),
    series: Mapping[str, Sequence[float]] | None = None,
    levels: Mapping[str, float] | None = None,
    title: str | None = None,
    size: int = 260,
) -> np.ndarray:
    """Return maps side by side, and below them distances by layer, as (rows, columns, 3) uint8.

    Args:
        maps: as in ``figures.reach``.
        titles: one above each; too long ones are cut.
        marks: as in ``figures.reach``.
        layers: as in ``figures.reach``.
        series: as in ``figures.reach``.
        levels: as in ``figures.reach``.
        title: above the picture.
        size: height of a map in pixels.

    Raises:
        ValueError: as ``figures.reach``.
    """
    arrays = check_reach("reach_rgb", maps, titles, marks, layers, series)
    shown = chart_series(series, levels) if layers else []
    widths = [max(1, round(size * array.shape[1] / array.shape[0])) for array in arrays]
    width = max(sum(widths) + _EDGE * (len(widths) + 1), 520 if layers else 0)
    top = _EDGE + (26 if title else 0) + _CAPTION
    height = top + size + _EDGE + (_CHART + 20 * (len(shown) + 1) + 2 * _EDGE if layers else 0)
    paper = _Paper(width, height)
    if title:
        paper.text(width / 2, 18, title, "mm", 15)
    left = float(_EDGE)
    for array, across, caption, mark in zip(arrays, widths, titles, marks or [None] * len(arrays), strict=True):
        paper.text(left, top - _CAPTION / 2, caption, "lm", 12, most=across)
        paper.map(left, top, across, size, array, mark)
        left += across + _EDGE
    if layers:
        paper.chart(top + size + 2 * _EDGE, len(layers), shown)
    return np.asarray(paper.image.resize((width, height), Image.Resampling.BOX))


class _Paper:
    """Draws on an enlarged image; sizes are given in pixels before the enlargement."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.image = Image.new("RGB", (width * FINE, height * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 12, most: float | None = None) -> None:
        """Write, at most so many pixels."""
        font = ImageFont.load_default(size * FINE)
        kept = text
        while most is not None and len(kept) > 1 and self.draw.textlength(text, font) > most * FINE:
            kept = kept[:-1]
            text = kept.rstrip() + "…"
        self.draw.text((x * FINE, y * FINE), text, INK, font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        """Draw lines from place to place."""
        self.draw.line([(x * FINE, y * FINE) for x, y in points], colour, round(width * FINE))

    def dashed(self, ends: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        """Draw a level line of dashes."""
        (left, y), (right, _) = ends
        for x in np.arange(left, right, 10):
            self.line([(float(x), y), (min(float(x) + 6, right), y)], colour, width)

    def map(
        self, left: float, top: float, width: int, height: int, array: np.ndarray, mark: tuple[float, float] | None
    ) -> None:
        """Draw a map, cells as squares, and its mark."""
        rgb = Image.fromarray(to_rgb(array, scale(array, colours=SEQUENTIAL, signed=False)))
        larger = array.shape[0] < height * FINE
        resized = rgb.resize(
            (width * FINE, height * FINE), Image.Resampling.NEAREST if larger else Image.Resampling.BOX
        )
        self.image.paste(resized, (round(left * FINE), round(top * FINE)))
        if mark is not None:
            y, x = ((at + 0.5) * pixels / n for at, pixels, n in zip(mark, (height, width), array.shape, strict=True))
            for dx, dy in ((5, 0), (0, 5)):
                ends = [(left + x - dx, top + y - dy), (left + x + dx, top + y + dy)]
                self.line(ends, INK, 3)
                self.line(ends, _MARK, 1.5)

    def chart(self, top: float, layers: int, shown: list[tuple[str, str, np.ndarray | float]]) -> None:
        """Draw axes, series, levels, and what stands for what."""
        highest = max((float(np.nanmax(values)) for _, _, values in shown), default=1.0) or 1.0
        step = 10 ** np.floor(np.log10(highest))
        step = step / 4 if highest / step < 2 else step / 2 if highest / step < 5 else step
        right, bottom = self.width - 2.0 * _EDGE, top + _CHART - 30

        def at(layer: float, value: float) -> tuple[float, float]:
            along = (layer - 0.5) / layers
            return _LEFT + along * (right - _LEFT), bottom - value / (1.06 * highest) * (bottom - top)

        for tick in np.arange(0, 1.06 * highest, step):
            y = at(1, float(tick))[1]
            self.line([(_LEFT, y), (right, y)], _GRID if tick else INK, 1)
            self.text(_LEFT - 6, y, f"{tick:g}", "rm", 11)
        for layer in range(1, layers + 1, -(-layers // 16)):
            self.text(at(layer, 0)[0], bottom + 12, str(layer), "mm", 11)
        self.text((_LEFT + right) / 2, bottom + 28, "layer; mean distance in pixels", "mm", 12)
        for number, (name, colour, values) in enumerate(shown):
            whole = isinstance(values, float)
            y = top + _CHART + 16 + 20 * number
            (self.dashed if whole else self.line)([(_LEFT, y), (_LEFT + 26, y)], colour, 2)
            self.text(_LEFT + 34, y, name, "lm")
            each = np.full(layers, values) if whole else np.asarray(values)
            points = [at(index + 1, float(value)) for index, value in enumerate(each) if np.isfinite(value)]
            if whole:
                self.dashed([(_LEFT, points[0][1]), (right, points[0][1])], colour, 2)
            else:
                self.dots([*points, (_LEFT + 13, y)], colour)
                self.line(points, colour, 2)

    def dots(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Draw discs."""
        for x, y in points:
            self.draw.ellipse([(x - 3) * FINE, (y - 3) * FINE, (x + 3) * FINE, (y + 3) * FINE], colour)
