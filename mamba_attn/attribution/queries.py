"""Pixels, boxes and positions: which tokens of a layer's token frame a method reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.deprecation import warn_deprecated
from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.layers import Layer

_WORDS = {"pixel": "(row, column)", "box": "(x0, y0, x1, y1)"}
_COUNTS = {"pixel": 2, "box": 4}
Place = Sequence[float] | Sequence[Sequence[float]] | Tensor | np.ndarray  # one for all images, or one per image


@dataclass(frozen=True)
class Query:
    """Pixels, boxes or positions in texts; a method reads the rows of their tokens.

    Args:
        kind: "pixel", "box" or "position".
        places: (row, column) or (x0, y0, x1, y1) each, in pixels, or (position,), counted from a text's first token;
            one for all images, or one per image.
    """

    kind: str
    places: tuple[tuple[float, ...], ...]

    def scaled(self, rows: float, columns: float) -> "Query":
        """Return the same places in an image that is larger by these factors."""
        factors = (rows, columns) if self.kind == "pixel" else (columns, rows, columns, rows)
        return Query(self.kind, tuple(tuple(x * f for x, f in zip(p, factors, strict=True)) for p in self.places))

    @property
    def argument(self) -> dict[str, Any]:
        """The query as a keyword argument of ``attribute``."""
        if self.kind == "position":
            return {"query": [int(place) for (place,) in self.places]}
        return {self.kind: self.places[0] if len(self.places) == 1 else self.places}

    def __str__(self) -> str:
        """Write the query as an argument of a call."""
        return ", ".join(f"{name}={value}" for name, value in self.argument.items())


def split_query(call: str, query: Any, pixel: Any, box: Any, *, stacklevel: int = 3) -> tuple[Any, Any]:
    """Return (pixel, box); a deprecated ``query`` of two or four numbers becomes one of them.

    Args:
        call: the name of the caller, for the message.
        query: (row, column) or (x0, y0, x1, y1), or None.
        pixel: the argument of the call.
        box: the argument of the call.
        stacklevel: of the warning; 3 points at the line that called the caller.

    Raises:
        ValueError: ``query`` has other numbers, or is given together with ``pixel`` or ``box``.
    """
    if query is None:
        return pixel, box
    expected = "expected pixel=(row, column) or box=(x0, y0, x1, y1), in pixels"
    rows = _numbers(query)
    kind = {2: "pixel", 4: "box"}.get(len(rows[0]) if rows is not None and len(rows) == 1 else 0)
    if kind is None:
        raise ValueError(f"{call}(query={query!r}): {expected}.")
    if pixel is not None or box is not None:
        raise ValueError(f"{call}(query={query!r}, ...): query is deprecated; {expected}, alone.")
    written = f"{call}(query={query!r}): query"
    warn_deprecated(written, write=f"{kind}={_WORDS[kind]}", gone="0.3", stacklevel=stacklevel)
    return (query, None) if kind == "pixel" else (None, query)


def make_query(call: str, size: tuple[int, ...], batch: int | None, pixel: Any, box: Any) -> Query | None:
    """Return whose rows are read; None where neither a pixel nor a box is given.

    Args:
        call: the name of the caller, for the message.
        size: (rows, columns) of the images.
        batch: number of images; None if all images must have the same place.
        pixel: (row, column) in pixels; one, or one per image.
        box: (x0, y0, x1, y1) in pixels; one, or one per image.

    Raises:
        ValueError: both are given; unexpected counts of numbers or places; a place outside the image.
    """
    if pixel is not None and box is not None:
        raise ValueError(f"{call}(pixel={pixel!r}, box={box!r}): both choose the rows to read; leave one out.")
    kind, value = ("pixel", pixel) if box is None else ("box", box)
    if value is None:
        return None
    where, each = f"{call}({kind}={value!r})", "" if batch is None else f", or a list of one per image ({batch})"
    rows = _numbers(value)
    if rows is None or any(len(row) != _COUNTS[kind] for row in rows):
        raise ValueError(f"{where}: expected {_WORDS[kind]}, {_COUNTS[kind]} numbers in pixels{each}.")
    if _nested(value) and (batch is None or len(rows) != batch):
        raise ValueError(f"{where}: a list of {len(rows)}; expected one {_WORDS[kind]} for all images{each}.")
    query = Query(kind, tuple(rows))
    require_inside(where, query, size)
    return query


def require_inside(where: str, query: Query, size: tuple[int, ...]) -> None:
    """Refuse places outside the image.

    Args:
        where: what the user wrote, for the message.
        query: with the places to check.
        size: (rows, columns) of the image.

    Raises:
        ValueError: a pixel is outside the image; a box is empty or leaves it.
    """
    if len(size) != 2:
        raise ValueError(f"{where}: pixels and boxes lie in images of rows and columns; the inputs have sizes {size}.")
    rows, columns = size
    for index, place in enumerate(query.places):
        of = f" of image {index}, {place}," if len(query.places) > 1 else ""
        if query.kind == "pixel":
            if not (0 <= place[0] < rows and 0 <= place[1] < columns):
                raise ValueError(
                    f"{where}: the pixel (row, column){of} is outside the image of {rows} x {columns} pixels."
                )
            continue
        x0, y0, x1, y1 = place
        if not (0 <= x0 < x1 <= columns and 0 <= y0 < y1 <= rows):
            raise ValueError(
                f"{where}: the box{of} is empty or leaves the image; expected 0 <= x0 < x1 <= {columns} and "
                f"0 <= y0 < y1 <= {rows}."
            )


def query_tokens(layout: TokenLayout, query: Query | None) -> list[list[int]]:
    """Return the token indices of a query: one list for all images, or one per image.

    Args:
        layout: the token frame.
        query: for positions, the token there; for pixels, the token with the nearest patch centre; for boxes, those
            with their centre inside, or else the one nearest to the box's centre; None: the class tokens, or all
            patches if there are none.
    """
    if query is None:
        return [list(layout.class_tokens) or layout.patches.tolist()]
    if query.kind == "position":
        return [[int(place)] for (place,) in query.places]
    if query.kind == "pixel":
        return [[_nearest(layout, row, column)] for row, column in query.places]
    return [_inside(layout, *place) for place in query.places]


def query_weights(layer: Layer, query: Query | None) -> Float[Tensor, "batch tokens"]:
    """Return the mean over a query's tokens as a row vector: 1 / count on each of them, 0 elsewhere."""
    chosen = query_tokens(layer.layout, query)
    weights = torch.zeros(len(chosen), layer.tokens, dtype=layer.dtype)
    for row, tokens in enumerate(chosen):
        weights[row, tokens] = 1 / len(tokens)
    weights = weights.to(layer.device)
    return weights.repeat(layer.batch, 1) if len(chosen) == 1 else weights


def read_rows(
    layer: Layer,
    query: Query | None,
    *,
    fold: str = "mean",
    row_weight: Float[Tensor, "batch channels tokens"] | None = None,
    col_weight: Float[Tensor, "batch routes channels length"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """Return the mean of the rows of a query's tokens in the folded attention, signed; for scans in linear time.

    Args:
        layer: the layer.
        query: whose rows to read.
        fold: "mean" or "sum" over channels or heads.
        row_weight: as in the layer's ``row``.
        col_weight: as in the layer's ``row``.
    """
    token = single_token(layer.layout, query)
    if token is not None:
        return layer.row(token, fold=fold, row_weight=row_weight, col_weight=col_weight)
    # residual=False, because left_product(weights) - weights would cancel: attention can be thousands of times smaller
    # than the identity
    vector = query_weights(layer, query)
    return layer.left_product(vector, fold=fold, row_weight=row_weight, col_weight=col_weight, residual=False)


def single_token(layout: TokenLayout, query: Query | None) -> int | None:
    """Return the token to read if it is a single one, the same in every image; else None."""
    chosen = query_tokens(layout, query)
    first = chosen[0]
    return first[0] if len(first) == 1 and all(tokens == first for tokens in chosen) else None


def _inside(layout: TokenLayout, x0: float, y0: float, x1: float, y1: float) -> list[int]:
    axes = zip(layout.grid, layout.steps, layout.centres, strict=True)
    centres = [torch.arange(n) * step + first for n, step, first in axes]
    rows, columns = (centres[0] >= y0) & (centres[0] < y1), (centres[1] >= x0) & (centres[1] < x1)
    inside: list[int] = layout.patches[(rows[:, None] & columns[None, :]).flatten()].tolist()
    return inside or [_nearest(layout, (y0 + y1) / 2, (x0 + x1) / 2)]


def _nearest(layout: TokenLayout, row: float, column: float) -> int:
    """The token nearest to a pixel; pixels at the border that no patch covers belong to the last one."""
    last = [covered - 1 for covered in layout.covered]
    return layout.token_at(min(row, last[0]), min(column, last[1]))


def _numbers(value: Any) -> list[tuple[float, ...]] | None:
    """Return places as tuples of numbers, a single one if not nested; None for anything else."""
    rows = _plain(value)
    rows = rows if _nested(rows) else [rows]
    places = []
    for row in rows:
        if isinstance(row, str) or not isinstance(row, Sequence):
            return None
        if not all(isinstance(each, Real) and not isinstance(each, bool) for each in row):
            return None
        places.append(tuple(each if isinstance(each, int) else float(each) for each in row))
    return places or None


def _nested(value: Any) -> bool:
    """Whether a value is a sequence of places, rather than of numbers."""
    plain = _plain(value)
    return not isinstance(plain, str) and isinstance(plain, Sequence) and any(isinstance(x, Sequence) for x in plain)


def _plain(value: Any) -> Any:
    """Return tensors and arrays as lists, also those inside a sequence."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return [_plain(each) for each in value]
