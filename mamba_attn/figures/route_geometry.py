"""The path of a route over the patch grid, without its drawing."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def as_route(call: str, order: Any, grid: tuple[int, int], name: str = "order") -> np.ndarray:
    """Return the (row, column) of each step, shaped (length, 2).

    Raises:
        ValueError: a grid without cells, an order that is not (length,) whole numbers, or a patch outside the grid.
    """
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"{call}(grid={grid}): a grid has at least one row and one column.")
    patches = np.asarray(order)
    if patches.ndim != 1 or not patches.size or not np.issubdtype(patches.dtype, np.integer):
        raise ValueError(
            f"{call}({name}): expected raster indices of patches, (length,) whole numbers, got {patches.shape} of "
            f"{patches.dtype}."
        )
    outside = (patches < 0) | (patches >= height * width)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(
            f"{call}({name}): entry {at} is patch {patches[at]}, but a {height}x{width} grid has the patches "
            f"0..{height * width - 1}; leave tokens that are not patches out."
        )
    return np.stack(np.divmod(patches.astype(np.int64), width), axis=1)


def as_marks(call: str, marks: Iterable[int], grid: tuple[int, int]) -> np.ndarray:
    """Return the (row, column) of each marked patch, shaped (marks, 2).

    Raises:
        ValueError: a patch outside the grid.
    """
    patches = list(marks)
    return as_route(call, patches, grid, "marks") if patches else np.zeros((0, 2), dtype=int)


def shown_steps(call: str, step: int | None, length: int) -> int:
    """Return how many steps to draw.

    Raises:
        ValueError: less than one or more than there are.
    """
    if step is not None and not 1 <= step <= length:
        raise ValueError(f"{call}(step={step}): expected 1..{length}, the route's steps.")
    return length if step is None else step


def jumps(points: np.ndarray) -> np.ndarray:
    """Return, for each move of a route, whether it is a jump: longer than twice the median move.

    In a raster, the ends of rows are jumps; on a strided sub-grid, moves of two are not.
    """
    lengths = np.hypot(*np.diff(points, axis=0).T)
    return lengths > 2 * np.median(lengths) if len(lengths) else np.zeros(0, dtype=bool)


def stroke(cell: float) -> float:
    """Return the width in pixels of the line through cells of a size in pixels."""
    return min(max(0.16 * cell, 1.2), 4.0)


def mark(cell: float) -> float:
    """Return the size in pixels of the marks at both ends."""
    return min(max(0.5 * cell, 9.0), 16.0)
