"""The state of the explorer: a small dataclass that fits into JSON and into the page's address.

Numbers are packed as runs, to fit a lasso over thousands into an address: 3, 4, 5, 9 become "3:5,9".
"""

import base64
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np

LONGEST = 20_000  # characters of an address that are parsed
_LARGEST = 2**20  # bytes of JSON in it
_CELLS = 2**16  # selected cells, or points

# patches are not coloured by block or class: all are of one block, and their mean is over all classes
COLOURS: dict[str, tuple[str, ...]] = {
    "patches": ("column", "row", "rank"),
    "blocks": ("block", "class", "predicted"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("blocks", "patches"),
    "direction": ("row", "column"),
    "sign": ("signed", "positive", "absolute"),
    "normalise": ("none", "largest", "range", "sum"),
    "what": ("mean", "image", "difference"),
    "method": ("pca", "tsne", "umap"),
    "colour": tuple(name for names in COLOURS.values() for name in names),
    "palette": ("viridis", "cividis"),
}
_RUN = re.compile(r"(-?\d{1,7})(?::(-?\d{1,7}))?")


@dataclass(frozen=True)
class Pane:
    """One pane: which attention it shows, and how.

    Args:
        store: number of the store among those that are open.
        layer: number of the layer in it.
        route: number of a route, or -1 for their sum.
        mode: points are (block, image) pairs, "blocks", or one block's "patches".
        direction: "row", what patches read; "column", where they are read.
        what: the "mean" of all images, one "image", or their "difference".
        image: number of the image in the store.
        sign: see ``figures.shown``.
        normalise: see ``figures.shown``.
        log: see ``figures.shown``.
        gate: weigh rows by the mixer's gate; of an image only.
        skip: add D to the diagonal; of an image only.
        method: of dimension reduction.
        first: reduce the features to 100 principal components before t-SNE and UMAP.
        colour: what the points' colours mean.
        palette: of values that are not negative.
        opacity: of the map over the image.
        path: draw the route's path.
        step: number of steps drawn; 0 for all.
    """

    store: int = 0
    layer: int = 0
    route: int = -1
    mode: str = "patches"
    direction: str = "row"
    what: str = "mean"
    image: int = 0
    sign: str = "signed"
    normalise: str = "none"
    log: bool = False
    gate: bool = False
    skip: bool = False
    method: str = "pca"
    first: bool = True
    colour: str = "column"
    palette: str = "viridis"
    opacity: float = 0.9
    path: bool = False
    step: int = 0

    @classmethod
    def parsed(cls, given: Any) -> Self:
        """Return the pane from JSON; missing fields take their defaults, unknown ones are ignored.

        Raises:
            ValueError: a field has an impossible value.
        """
        if not isinstance(given, dict):
            raise ValueError(f"a pane is an object, got {type(given).__name__}.")  # noqa: TRY004 - of parsed text
        values: dict[str, Any] = {}
        for its in fields(cls):
            if its.name in given:
                values[its.name] = _checked(its.name, given[its.name], its.default)
        return cls(**values)


@dataclass(frozen=True)
class State:
    """The whole page: its panes and the selection they share.

    Args:
        panes: one, or two side by side.
        grid: (height, width) of the grid that the cells refer to.
        cells: selected patches as raster indices; -1, -2, ... are the tokens that are not patches, in their order.
        points: selected (layer, image) pairs.
    """

    panes: tuple[Pane, ...] = (Pane(),)
    grid: tuple[int, int] = (1, 1)
    cells: tuple[int, ...] = ()
    points: tuple[tuple[int, int], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values, without defaults."""
        plain = asdict(Pane())
        panes = [{name: value for name, value in asdict(pane).items() if value != plain[name]} for pane in self.panes]
        return {
            "panes": panes,
            "grid": list(self.grid),
            "cells": list(self.cells),
            "points": [list(pair) for pair in self.points],
        }

    @classmethod
    def from_json(cls, given: Any) -> Self:
        """Return the state from JSON of any origin.

        Raises:
            ValueError: a part is invalid; the message says which.
        """
        if not isinstance(given, dict):
            raise ValueError("the state is an object.")  # noqa: TRY004 - of parsed text
        panes = given.get("panes", [{}])
        if not isinstance(panes, list) or not 1 <= len(panes) <= 2:
            raise ValueError("the state has one or two panes.")
        height, width = _integers("grid", given.get("grid", [1, 1]), 2)
        if not (1 <= height <= 4096 and 1 <= width <= 4096):
            raise ValueError(f"the grid {height}x{width} is not possible.")
        cells = _integers("cells", given.get("cells", []))
        if any(not -64 <= cell < height * width for cell in cells):
            raise ValueError(f"cells outside a grid of {height}x{width}.")
        pairs = given.get("points", [])
        if not isinstance(pairs, list) or len(pairs) > _CELLS:
            raise ValueError("points is a list of pairs.")
        points = tuple(_integers("points", pair, 2) for pair in pairs)
        return cls(tuple(Pane.parsed(pane) for pane in panes), (height, width), cells, points)  # type: ignore[arg-type]

    def to_url(self) -> str:
        """Return the state as URL-safe text; a selection too long for an address is left out."""
        given = self.to_json()
        given |= {"cells": packed(self.cells), "points": packed_pairs(self.points)}
        squeezed = zlib.compress(json.dumps(given, separators=(",", ":")).encode(), 9)
        text = base64.urlsafe_b64encode(squeezed).decode("ascii").rstrip("=")
        return text if len(text) <= LONGEST else replace(self, cells=(), points=()).to_url()

    @classmethod
    def from_url(cls, text: str) -> Self:
        """Return the state from the text of ``to_url``.

        Raises:
            ValueError: the text is damaged, or too long.
        """
        if len(text) > LONGEST:
            raise ValueError(f"the address holds {len(text)} characters of state, more than {LONGEST}.")
        try:
            packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(packed, _LARGEST)
            if unpacker.unconsumed_tail:
                raise ValueError(f"more than {_LARGEST} bytes")
            return cls.from_json(_unpacked(json.loads(raw)))
        except (ValueError, zlib.error, RecursionError) as error:  # ValueError includes base64's and JSON's
            raise ValueError(f"the state in the address cannot be read ({error}).") from error

    def with_pane(self, index: int, **changes: Any) -> "State":
        """Return a copy with some fields of one pane changed."""
        panes = list(self.panes)
        panes[index] = replace(panes[index], **changes)
        return replace(self, panes=tuple(panes))

    def on_grid(self, grid: tuple[int, int]) -> list[int]:
        """Return the selected patches on another grid over the same image: the cells at the same places.

        Args:
            grid: (height, width).
        """
        patches = [cell for cell in self.cells if cell >= 0]
        if grid == self.grid or not patches:
            return patches
        height, width = self.grid
        mask = np.zeros(self.grid, dtype=bool)
        rows, columns = np.divmod(np.array(patches), width)
        mask[rows, columns] = True
        down = ((np.arange(grid[0]) + 0.5) * height / grid[0]).astype(int)  # where each new cell's centre lies
        right = ((np.arange(grid[1]) + 0.5) * width / grid[1]).astype(int)
        there = mask[np.ix_(down, right)]
        # larger cells may miss every centre above, so also take those that hold an old cell's centre
        there[((rows + 0.5) * grid[0] / height).astype(int), ((columns + 0.5) * grid[1] / width).astype(int)] = True
        return [int(cell) for cell in np.flatnonzero(there)]


def _unpacked(given: Any) -> Any:
    """Unpack runs to lists; older addresses already have lists."""
    if not isinstance(given, dict):
        return given
    cells, points = given.get("cells"), given.get("points")
    if isinstance(cells, str):
        given = {**given, "cells": unpacked(cells, _CELLS)}
    if isinstance(points, dict):
        given = {**given, "points": unpacked_pairs(points, _CELLS)}
    return given


def _checked(name: str, value: Any, default: Any) -> Any:
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is one of {CHOICES[name]}.")
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is true or false.")  # noqa: TRY004 - of parsed text
        return value
    if isinstance(default, int):
        (number,) = _integers(name, [value])
        if not -1 <= number <= 10**6:
            raise ValueError(f"{name} is out of range.")
        return number
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} lies in 0..1.")
    return float(value)


def _integers(name: str, values: Any, count: int | None = None) -> tuple[int, ...]:
    fits = isinstance(values, list) and len(values) <= _CELLS and (count is None or len(values) == count)
    if not fits or any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise ValueError(f"{name} is a list of {'' if count is None else f'{count} '}whole numbers.")
    return tuple(values)


def packed(numbers: Sequence[int]) -> str:
    """Return numbers as text, in their order; neighbours that count up become one run."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}:{last}" for first, last in found)


def unpacked(text: str, most: int) -> list[int]:
    """Return the numbers of ``packed``.

    Args:
        text: runs.
        most: numbers.

    Raises:
        ValueError: no runs, or more numbers.
    """
    found: list[int] = []
    for run in text.split(",") if text else []:
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"{run[:20]!r} is not a run of numbers")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= most - len(found):
            raise ValueError(f"more than {most} numbers are selected")
        found += range(first, last + 1)
    return found


def packed_pairs(pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return pairs, in their order, as the first numbers and, for each of them, runs of the second ones."""
    firsts: list[int] = []
    lines: list[list[int]] = []
    for first, second in pairs:
        if not firsts or firsts[-1] != first:
            firsts.append(first)
            lines.append([])
        lines[-1].append(second)
    return {"of": firsts, "runs": [packed(line) for line in lines]} if pairs else {}


def unpacked_pairs(given: dict[str, Any], most: int) -> list[list[int]]:
    """Return the pairs of ``packed_pairs``, as lists.

    Args:
        given: its result, from anywhere.
        most: pairs.

    Raises:
        ValueError: something else, or more pairs.
    """
    firsts, lines = given.get("of", []), given.get("runs", [])
    fits = isinstance(firsts, list) and isinstance(lines, list) and len(firsts) == len(lines)
    if not fits or {type(first) for first in firsts} - {int} or {type(line) for line in lines} - {str}:
        raise ValueError("points are runs of numbers")
    found: list[list[int]] = []
    for first, line in zip(firsts, lines, strict=True):
        found += [[first, second] for second in unpacked(line, most - len(found))]
    return found
