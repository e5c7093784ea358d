"""Draws the scatterplots: colours, sizes and hover texts of the points."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from mamba_attn import figures
from mamba_attn.viewer.source import Source

_SIZES = (5.0, 13.0)  # pixels, of the first and the last row


def of_blocks(source: Source, xy: np.ndarray, pairs: np.ndarray, colour: str, shared: dict[str, Any]) -> go.Figure:
    """Return the scatterplot of a stage's (block, image) pairs.

    Args:
        source: of their names.
        xy: (points, 2).
        pairs: (points, 2) numbers of layer and image.
        colour: "block", "class" or "predicted".
        shared: for ``figures.embedding``.
    """
    kinds, texts = [], []
    for index, number in pairs.tolist():
        layer, image = source.layers[index], source.images[number]
        kinds.append(
            {"block": f"block {layer.block}", "class": _known(image.label)}.get(colour, _known(image.predicted))
        )
        texts.append(f"stage {layer.stage}, block {layer.block}<br>{image.key}")
    sizes = np.full(len(xy), 10.0 if len(xy) <= 400 else 7.0)
    return figures.embedding(xy, kinds, sizes=sizes, texts=texts, colour_title=colour, **shared)


def of_patches(
    layer: Any, xy: np.ndarray, ranks: np.ndarray, route: int, colour: str, shared: dict[str, Any]
) -> go.Figure:
    """Return the scatterplot of a block's patches.

    Args:
        layer: whose patches.
        xy: (points, 2).
        ranks: (routes, patches), at which step a route visits a patch.
        route: whose ranks are meant by the colour "rank".
        colour: "column", "row" or "rank".
        shared: for ``figures.embedding``.
    """
    rows, columns = np.divmod(np.arange(len(xy)), layer.layout.grid[1])
    values = {"column": columns, "row": rows, "rank": ranks[min(route, len(ranks) - 1)]}[colour]
    # as in arXiv 2502.20764: colour shows the column and size the row
    sized = columns if colour == "row" else rows
    sizes = np.interp(sized, (0, max(int(sized.max()), 1)), _SIZES) * (0.6 if len(xy) > 1500 else 1.0)
    title = f"rank in route {min(route, len(ranks) - 1) + 1}" if colour == "rank" else colour
    texts = [f"row {row}, column {column}" for row, column in zip(rows, columns, strict=True)]
    return figures.embedding(xy, values, sizes=sizes, texts=texts, colour_title=title, **shared)


def _known(name: str | None) -> str:
    return "not known" if name is None else str(name)
