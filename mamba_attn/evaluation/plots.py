"""Curves and intervals as SVG text: small, sharp, and in the page itself."""

from collections.abc import Mapping, Sequence

from mamba_attn.evaluation.bootstrap import Interval
from mamba_attn.figures.document import safe

# Okabe and Ito's colours, safe for colour-blind readers, then the same dashed
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_WIDTH, _HEIGHT = 318, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 22, 30
_TENTHS = range(1, 10)
_LONGEST = 38  # letters that fit beside an interval


def styles(methods: Sequence[str]) -> dict[str, str]:
    """Return a colour and a dash per method, as attributes of SVG's lines."""
    dashes = ("", "5 3", "1.5 2.5", "8 3 2 3")
    return {
        method: f'stroke="{_COLOURS[place % len(_COLOURS)]}"'
        + (f' stroke-dasharray="{dash}"' if (dash := dashes[place // len(_COLOURS) % len(dashes)]) else "")
        for place, method in enumerate(methods)
    }


def legend(looks: Mapping[str, str]) -> str:
    """Return the methods' names beside their lines, as HTML."""
    entries = "".join(
        f"<span class=key><svg width=26 height=8><line x1=0 y1=4 x2=26 y2=4 {look} stroke-width=2 /></svg>"
        f"{safe(method)}</span>"
        for method, look in looks.items()
    )
    return f"<p class=legend>{entries}</p>"


def curves(title: str, lines: Mapping[str, Sequence[float]], looks: Mapping[str, str]) -> str:
    """Return accuracies at 10 to 90 % removed as one plot.

    Args:
        title: above it.
        lines: nine accuracies in 0..1 per method.
        looks: from ``styles``.
    """
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def point(tenths: int, value: float) -> str:
        return f"{_LEFT + wide * (tenths - 1) / 8:.1f},{_TOP + high * (1 - value):.1f}"

    parts = [_text(_LEFT + wide / 2, 13, title, "middle", bold=True)]
    for step in range(0, 101, 25):
        y = _TOP + high * (1 - step / 100)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + wide}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(_LEFT - 5, y + 4, f"{step} %", "end"))
    parts += [_text(_LEFT + wide * (t - 1) / 8, _HEIGHT - 14, f"{10 * t}", "middle") for t in _TENTHS]
    parts.append(_text(_LEFT + wide / 2, _HEIGHT - 2, "% of the cells removed", "middle"))
    for method, values in lines.items():
        points = " ".join(point(tenths, value) for tenths, value in zip(_TENTHS, values, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke-width="1.8" {looks[method]}>'
            f"<title>{safe(method)}</title></polyline>"
        )
    return f'<svg class=plot width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join(parts)}</svg>'


def intervals(
    title: str, figures: Mapping[str, Interval], looks: Mapping[str, str], marks: Mapping[str, str], width: int = 706
) -> str:
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

    parts = [_text(names, 13, title, "start", bold=True)]
    for place, (method, each) in enumerate(figures.items()):
        y = 24 + row * place + row / 2
        value, below, above = (f"{round(number, 9) + 0.0:.3g}" for number in (each.value, each.low, each.high))
        label = f"{value} ({below} to {above}){marks.get(method, '')}"
        parts += [
            _text(names - 8, y + 4, method if len(method) <= _LONGEST else f"{method[: _LONGEST - 1]}…", "end"),
            f'<line x1="{x(each.low):.1f}" y1="{y}" x2="{x(each.high):.1f}" y2="{y}" stroke-width="2" '
            f"{looks[method].split(' stroke-dasharray')[0]}><title>{safe(method)}: {label}</title></line>",
            f'<circle cx="{x(each.value):.1f}" cy="{y}" r="3.5" fill="{looks[method].split(chr(34))[1]}"/>',
            _text(width - 160, y + 4, label, "start"),
        ]
    height = 28 + row * len(figures)
    return f'<svg class=plot width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{safe(text)}</text>'
