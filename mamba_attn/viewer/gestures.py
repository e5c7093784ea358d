"""Turns gestures in the browser into cells and points. Input is never trusted: anything malformed selects nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mamba_attn.viewer.state import State

_CORNERS = 20_000  # of a lasso


def clicked(event: Any, grid: tuple[int, int]) -> list[int]:
    """Return the clicked patch, in a list; empty if the click missed.

    Args:
        event: plotly's.
        grid: (height, width).
    """
    try:
        point = event["points"][0]
        row, column = round(float(point["y"])), round(float(point["x"]))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return []
    return [row * grid[1] + column] if 0 <= row < grid[0] and 0 <= column < grid[1] else []


def dragged(event: Any, grid: tuple[int, int]) -> list[int]:
    """Return the patches that a box overlaps, or whose centres lie in a lasso.

    Args:
        event: plotly's.
        grid: (height, width).
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return _held(event, columns, rows, lambda edge: float(round(edge)))


def enclosed(event: Any, points: np.ndarray) -> list[int]:
    """Return the numbers of the points in a box or lasso of the scatterplot.

    Args:
        event: plotly's.
        points: (points, 2).
    """
    return _held(event, points[:, 0], points[:, 1], float)


def _held(event: Any, x: np.ndarray, y: np.ndarray, edge: Callable[[float], float]) -> list[int]:
    """Return the numbers of the places in a lasso, or in a box whose edges are rounded by ``edge``."""
    if not isinstance(event, dict):
        return []
    try:
        if "lassoPoints" in event:
            corners = (np.asarray(event["lassoPoints"][axis][:_CORNERS], dtype=np.float64) for axis in "xy")
            inside = _inside(x, y, *corners)
        elif "range" in event:
            (left, right), (low, high) = (sorted(edge(float(one)) for one in event["range"][axis]) for axis in "xy")
            inside = (x >= left) & (x <= right) & (y >= low) & (y <= high)
        else:
            return []
    except (KeyError, TypeError, ValueError, OverflowError):
        return []
    return [int(number) for number in np.flatnonzero(inside)]


def numbers(event: Any, count: int) -> list[int]:
    """Return the numbers of the points named in an event of the scatterplot.

    Args:
        event: plotly's.
        count: of points that there are.
    """
    points = event.get("points", []) if isinstance(event, dict) else []
    found = set()
    for point in points if isinstance(points, list) else []:
        number = point.get("customdata") if isinstance(point, dict) else None
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < count:
            found.add(number)
    return sorted(found)


def moved(state: State, key: str, grid: tuple[int, int]) -> list[int]:
    """Return the neighbour of the selected patch in an arrow key's direction; the middle patch if none is selected.

    Args:
        state: the selection.
        key: "ArrowUp" and so on.
        grid: (height, width).
    """
    down, right = {"ArrowUp": (-1, 0), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowRight": (0, 1)}[key]
    chosen = state.on_grid(grid)
    if not chosen:
        return [grid[0] // 2 * grid[1] + grid[1] // 2]
    row, column = divmod(chosen[len(chosen) // 2], grid[1])
    row, column = min(max(row + down, 0), grid[0] - 1), min(max(column + right, 0), grid[1] - 1)
    return [row * grid[1] + column]


def _inside(x: np.ndarray, y: np.ndarray, corner_x: np.ndarray, corner_y: np.ndarray) -> np.ndarray:
    """Whether points lie in a polygon: a ray to the right crosses an odd number of edges."""
    odd = np.zeros(len(x), dtype=bool)
    for x0, y0, x1, y1 in zip(corner_x, corner_y, np.roll(corner_x, -1), np.roll(corner_y, -1), strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            odd ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return odd
