"""Curves and intervals as SVG text: small, sharp, and in the page itself."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from mamba_attn.core.document import Look, Plot
from mamba_attn.evaluation.bootstrap import Interval
from mamba_attn.figures.colours import CATEGORIES, GRID

_DASHES = ("", "5 3", "1.5 2.5", "8 3 2 3")  # where there are more methods than colours
_WIDTH, _HEIGHT = 318, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 22, 30
_TENTHS = range(1, 10)
_LONGEST = 38  # letters that fit beside an interval


def styles(methods: Sequence[str]) -> dict[str, Look]:
    """Return how each method's lines look."""
    count = len(CATEGORIES)
    return {
        method: Look(CATEGORIES[place % count], _DASHES[place // count % len(_DASHES)])
        for place, method in enumerate(methods)
    }


def curves(title: str, lines: Mapping[str, Sequence[float]], looks: Mapping[str, Look]) -> Markup:
    """Return accuracies at 10 to 90 % removed as one plot.

    Args:
        title: above it.
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


def intervals(
    title: str, figures: Mapping[str, Interval], looks: Mapping[str, Look], marks: Mapping[str, str], width: int = 706
) -> Markup:
    """Return figures with their intervals, one line each, in the given order.

    Args:
        title: above it.
        figures: by method.
        looks: from ``styles``.
        marks: by method, what stands behind its numbers.
        width: in pixels.
    """
    names, row = 240, 19
    low, high = min(each.low for each in figures.values()), max(each.high for each in figures.values())
    low, high = (low, high) if high > low else (low - 1, high + 1)
    span = width - names - 172

    def x(value: float) -> float:
        return names + span * (value - low) / (high - low)

    plot = Plot(width, 28 + row * len(figures))
    plot.text(names, 13, title, "start", bold=True)
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
