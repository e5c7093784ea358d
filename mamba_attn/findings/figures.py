"""Pictures of the findings: matrices at a quarter, half and three quarters of the depth, and numbers by depth."""

from collections.abc import Mapping, Sequence

import numpy as np

from mamba_attn.analytics.store import AttentionStore
from mamba_attn.figures import png
from mamba_attn.figures.colours import categories, limits
from mamba_attn.figures.document import safe
from mamba_attn.findings.controls import Report
from mamba_attn.findings.registry import FINDINGS

DEPTHS = (0.25, 0.5, 0.75)
_SIDE = 256  # of a matrix, in pixels
_WIDE, _HIGH, _LEFT, _TOP, _BOTTOM = 330, 190, 62, 24, 26  # a label has up to nine characters


def matrices_rgb(stores: Mapping[str, AttentionStore], side: int = _SIDE) -> np.ndarray:
    """Return mean attention at 25, 50 and 75 % of the depth, a row per model, and what the patch in the middle reads.

    Patches are in raster order; every panel has its own colours. Larger matrices are shrunk by averaging.

    Args:
        stores: by name.
        side: of a panel, in pixels.
    """
    panels, captions = [], []
    for name, store in stores.items():
        for depth in DEPTHS:
            layer = store.layers[round(depth * (len(store.layers) - 1))]
            patches, (height, width) = layer.layout.patches.numpy(), layer.layout.grid
            middle = (height // 2) * width + width // 2
            matrix = store.mean(layer)[np.ix_(patches, patches)]
            row = matrix[middle].reshape(height, width)
            for values, what in ((pooled(matrix, side), "matrix"), (row, "middle patch")):
                panels.append(_enlarged(png.matrix_rgb(values, **limits(values)), side))
                captions.append(f"{name}, {depth:.0%}" if what == "matrix" else what)
    return png.side_by_side(panels, captions, height=side, columns=2 * len(DEPTHS))


def pooled(matrix: np.ndarray, most: int) -> np.ndarray:
    """Return a matrix of at most so many rows and columns: means of equal squares, an incomplete one at the end cut.

    Args:
        matrix: square.
        most: rows.
    """
    step = -(-len(matrix) // most)
    side = len(matrix) // step
    cut = matrix[: side * step, : side * step]
    return np.asarray(cut.reshape(side, step, side, step).mean((1, 3)))


def by_depth(reports: Sequence[Report], name: str) -> str:
    """Return a finding against depth as SVG: a line per store, trained drawn through, random weights dashed.

    Args:
        reports: of the stores.
        name: of the finding, one of blocks.
    """
    colours = categories(len(reports))
    lines = []
    for report, colour in zip(reports, colours, strict=True):
        rows = [(place, report.row(name, place)) for place in report.depths]
        last = max(1, len(report.depths) - 1)
        for dash, values in (
            ("", [(at / last, row.trained.value) for at, (_, row) in enumerate(rows) if row is not None]),
            ("4 3", [(at / last, row.random) for at, (_, row) in enumerate(rows) if row is not None]),
        ):
            known = [(x, y) for x, y in values if y is not None]
            if known:
                lines.append((report.name, colour, dash, known))
    return _plot(FINDINGS[name].title, lines)


def legend(reports: Sequence[Report]) -> str:
    """Return the stores' names beside their colours, as HTML."""
    keys = "".join(
        f'<span class=key><svg width=26 height=8><line x1=0 y1=4 x2=26 y2=4 stroke="{colour}" stroke-width=2 /></svg>'
        f"{safe(report.name)}</span>"
        for report, colour in zip(reports, categories(len(reports)), strict=True)
    )
    return f"<p class=legend>{keys}</p>"


def _plot(title: str, lines: Sequence[tuple[str, str, str, list[tuple[float, float]]]]) -> str:
    values = [y for *_, points in lines for _, y in points]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    wide, tall = _WIDE - _LEFT - 10, _HIGH - _TOP - _BOTTOM

    def at(x: float, y: float) -> str:
        return f"{_LEFT + wide * x:.1f},{_TOP + tall * (high - y) / (high - low):.1f}"

    parts = [_text(_LEFT + wide / 2, 14, title, "middle", ' font-weight="600"')]
    for value in np.linspace(low + pad, high - pad, 3):
        level = at(0, float(value)).partition(",")[2]
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + wide}" y1="{level}" y2="{level}" stroke="#e4e4e4"/>')
        parts.append(_text(_LEFT - 4, float(level) + 4, f"{value:.3g}", "end"))
    for x, text in ((0.0, "first block"), (1.0, "last")):
        parts.append(_text(_LEFT + wide * x, _HIGH - 8, text, "end" if x else "start"))
    for name, colour, dash, points in lines:
        style = f' stroke-dasharray="{dash}"' if dash else ""
        drawn = " ".join(at(x, y) for x, y in points)
        label = safe(f"{name}, {'random weights' if dash else 'trained'}")
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.8"{style}>'
                     f"<title>{label}</title></polyline>")  # fmt: skip
        if len(points) == 1:
            across, down = at(*points[0]).split(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"/>')
    return f'<svg class=plot viewBox="0 0 {_WIDE} {_HIGH}" role="img">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{safe(text)}</text>'


def _enlarged(rgb: np.ndarray, side: int) -> np.ndarray:
    """Whole pixels, so that cells keep their edges."""
    times = max(1, side // max(rgb.shape[:2]))
    return rgb.repeat(times, 0).repeat(times, 1)
