"""An image as a plotly trace that holds a PNG instead of a list of numbers."""

import base64
import io

import numpy as np
import plotly.graph_objects as go
from PIL import Image


def data_uri(rgb: np.ndarray) -> str:
    """Return a (rows, columns, 3) uint8 image as the address of a PNG that it contains."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def photo(source: str, size: tuple[int, int], cells: tuple[int, int]) -> go.Image:
    """Return an image laid under a grid of cells, whose centres are at whole numbers.

    Args:
        source: the image, from ``data_uri``.
        size: its (rows, columns) in pixels.
        cells: (rows, columns) of the grid that it fills.
    """
    dy, dx = cells[0] / size[0], cells[1] / size[1]
    return go.Image(source=source, x0=(dx - 1) / 2, dx=dx, y0=(dy - 1) / 2, dy=dy, hoverinfo="skip", zsmooth="fast")


def patch_size(call: str, size: tuple[int, ...], cells: tuple[int, ...]) -> tuple[int, int]:
    """Return the (rows, columns) in pixels of a cell of a grid that fills an image.

    Raises:
        ValueError: the cells do not tile the image.
    """
    if size[0] % cells[0] or size[1] % cells[1]:
        raise ValueError(
            f"{call}: {cells} cells do not tile an image of {size} pixels; pass what the model saw, cut to what its "
            "patches cover."
        )
    return size[0] // cells[0], size[1] // cells[1]
