"""What the page asks the server for: one pane's attention, or its points, and the selected cells; checked."""

import re
from dataclasses import dataclass, fields
from typing import Any, Self

CELLS = 2**16  # selected cells of one request
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("blocks", "patches"),
    "direction": ("row", "column"),
    "what": ("mean", "image", "spread"),
    "method": ("pca", "tsne", "umap"),
}
_RUN = re.compile(r"(-?\d{1,7})(?::(-?\d{1,7}))?", re.ASCII)


@dataclass(frozen=True)
class Pane:
    """Which attention, or which points.

    Args:
        store: number of the store among those that are open.
        layer: number of the layer in it.
        route: number of a route, or -1 for their sum.
        mode: points are (block, image) pairs, "blocks", or one block's "patches".
        direction: "row", what patches read; "column", where they are read.
        what: the "mean" of all images, one "image", or the "spread" (standard deviation) over images.
        image: number of the image in the store.
        gate: weigh rows by the mixer's gate; of an image only.
        skip: add D to the diagonal; of an image only.
        method: of dimension reduction.
        first: reduce the features to 100 principal components before t-SNE and UMAP.
    """

    store: int = 0
    layer: int = 0
    route: int = -1
    mode: str = "patches"
    direction: str = "row"
    what: str = "mean"
    image: int = 0
    gate: bool = False
    skip: bool = False
    method: str = "pca"
    first: bool = True

    @classmethod
    def parsed(cls, given: Any) -> Self:
        """Return the pane from JSON; missing fields take their defaults, unknown ones are ignored.

        Raises:
            ValueError: a field has an impossible value.
        """
        if not isinstance(given, dict):
            raise ValueError(f"a pane is an object, got {type(given).__name__}.")  # noqa: TRY004 - of parsed text
        values = {
            its.name: _checked(its.name, given[its.name], its.default) for its in fields(cls) if its.name in given
        }
        return cls(**values)


def _checked(name: str, value: Any, default: Any) -> Any:
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name} is one of {CHOICES[name]}.")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{name} is true or false.")  # noqa: TRY004 - of parsed text
    least = -1 if name == "route" else 0
    if type(default) is int and not (type(value) is int and least <= value <= 10**6):
        raise ValueError(f"{name} is a whole number from {least} on.")
    return value


def unpacked(text: Any, most: int = CELLS) -> list[int]:
    """Return numbers that are written as runs: "3:5,9" are 3, 4, 5, 9.

    Args:
        text: runs.
        most: numbers.

    Raises:
        ValueError: no runs, or more numbers.
    """
    if not isinstance(text, str):
        raise ValueError("cells are runs of numbers, as text.")  # noqa: TRY004 - of parsed text
    found: list[int] = []
    for run in text.split(",") if text else []:
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"{run[:20]!r} is not a run of numbers.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= most - len(found):
            raise ValueError(f"more than {most} numbers are selected.")
        found += range(first, last + 1)
    return found
