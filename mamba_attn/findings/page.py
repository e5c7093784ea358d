"""The findings of some stores as one self-contained HTML page.

Its pictures: matrices at a quarter, half and three quarters of the depth, and numbers by depth.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from mamba_attn.analytics.store import AttentionStore
from mamba_attn.core.document import Look, Plot, render
from mamba_attn.figures import png
from mamba_attn.figures.colours import GRID, categories, limits
from mamba_attn.figures.picture import data_uri
from mamba_attn.findings.accuracy import Orders
from mamba_attn.findings.controls import Report
from mamba_attn.findings.registry import FINDINGS
from mamba_attn.findings.tables import (
    CAUTION,
    TERMS,
    blocks_table,
    orders_sentence,
    orders_table,
    side_by_side,
    summary,
    verdicts,
)

DEPTHS = (0.25, 0.5, 0.75)
_SIDE = 256  # of a matrix, in pixels
_WIDE, _HIGH, _LEFT, _TOP, _BOTTOM = 330, 190, 62, 24, 26  # a label has up to nine characters


def page(
    reports: Sequence[Report], orders: Sequence[Orders], stores: Mapping[str, AttentionStore], command: str
) -> str:
    """Render the page of findings.

    Args:
        reports: of the stores.
        orders: what correlates with accuracy.
        stores: by name, for the pictures.
        command: how to make it again.
    """
    blocks = [name for name, finding in FINDINGS.items() if finding.level == "block"]
    several = [side_by_side(reports)] if len(reports) > 1 else []
    return render(
        "findings.html",
        title="mamba-attn findings",
        command=command,
        terms=TERMS,
        caution=CAUTION,
        verdicts=[(each.name, verdicts(each)) for each in reports],
        summaries=[*several, *map(summary, reports)],
        orders=[(orders_sentence(its), orders_table(its)) for its in orders],
        matrices=data_uri(matrices_rgb(stores)),
        looks=looks(reports),
        plots=[by_depth(reports, name) for name in blocks if any(each.row(name) for each in reports)],
        questions=_questions(),
        blocks=list(map(blocks_table, reports)),
        notes=[f"{each.name}: {note}" for each in reports for note in each.notes],
    )


def _questions() -> list[list[str]]:
    return [
        [
            each.of,
            each.title,
            each.question,
            "" if each.claim is None else "{} {:g}".format(*each.claim),
            (each.function.__doc__ or "").partition("\n")[0],
        ]
        for each in FINDINGS.values()
    ]


def matrices_rgb(stores: Mapping[str, AttentionStore], side: int = _SIDE) -> np.ndarray:
    """Return mean attention at 25, 50 and 75 % of the depth, a row per model, and what the patch in the middle reads.

    Patches are in raster order; every panel has its own colours. Larger matrices are averaged over blocks.

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
    """Return a matrix of at most ``most`` rows and columns: means of equal squares, dropping an incomplete last one.

    Args:
        matrix: square.
        most: largest number of rows and columns.
    """
    step = -(-len(matrix) // most)
    side = len(matrix) // step
    cut = matrix[: side * step, : side * step]
    return np.asarray(cut.reshape(side, step, side, step).mean((1, 3)))


def looks(reports: Sequence[Report]) -> list[tuple[str, Look]]:
    """Return the name of every store and how its lines look."""
    return [(report.name, Look(its)) for report, its in zip(reports, categories(len(reports)), strict=True)]


def by_depth(reports: Sequence[Report], name: str) -> Markup:
    """Return a finding against depth as SVG: a line per store, solid if trained, dashed for random weights.

    Args:
        reports: of the stores.
        name: of the finding, one of blocks.
    """
    lines = []
    for report, (_, look) in zip(reports, looks(reports), strict=True):
        last = max(1, len(report.depths) - 1)
        every = [(at / last, report.row(name, place)) for at, place in enumerate(report.depths)]
        rows = [(depth, row) for depth, row in every if row is not None]
        random = [(depth, row.random) for depth, row in rows if row.random is not None]
        lines.append((f"{report.name}, trained", look, [(depth, row.trained.value) for depth, row in rows]))
        lines.append((f"{report.name}, random weights", look._replace(dash="4 3"), random))
    return _plot(FINDINGS[name].title, [line for line in lines if line[2]])


def _plot(title: str, lines: Sequence[tuple[str, Look, list[tuple[float, float]]]]) -> Markup:
    values = [y for *_, points in lines for _, y in points]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    wide, tall = _WIDE - _LEFT - 10, _HIGH - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + wide * x, _TOP + tall * (high - y) / (high - low)

    plot = Plot(_WIDE, _HIGH)
    plot.text(_LEFT + wide / 2, 14, title, bold=True)
    for value in np.linspace(low + pad, high - pad, 3).tolist():
        y = at(0, value)[1]
        plot.level(_LEFT, _LEFT + wide, y, Look(GRID, width=1))
        plot.text(_LEFT - 4, y + 4, f"{value:.3g}", "end")
    plot.text(_LEFT, _HIGH - 8, "first block", "start")
    plot.text(_LEFT + wide, _HIGH - 8, "last", "end")
    for name, look, points in lines:
        plot.line([at(*point) for point in points], look, name)
        if len(points) == 1:
            plot.dot(*at(*points[0]), look.colour)
    return plot.svg()


def _enlarged(rgb: np.ndarray, side: int) -> np.ndarray:
    """Enlarge by whole pixels, which keeps the edges of cells sharp."""
    times = max(1, side // max(rgb.shape[:2]))
    return rgb.repeat(times, 0).repeat(times, 1)
