"""Whose rows a method reads: the tokens of a query on a layer's token frame."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.layers import Layer

Query = Sequence[float] | None  # (row, column) or (x0, y0, x1, y1), in pixels


def check_query(call: str, query: Any, size: tuple[int, int]) -> None:
    """Refuse a query that is not inside the image.

    Args:
        call: the name of the caller, for the message.
        query: (row, column) or (x0, y0, x1, y1) in pixels, or None.
        size: (rows, columns) of the image.

    Raises:
        ValueError: a pixel outside the image, an empty box or one that leaves it, or neither of the two.
    """
    if query is None:
        return
    rows, columns = size
    where = f"{call}(query={query!r})"
    numbers = not isinstance(query, str) and hasattr(query, "__len__")
    if not numbers or not all(hasattr(each, "__float__") for each in query):
        raise ValueError(f"{where}: expected (row, column) or (x0, y0, x1, y1), in pixels.")
    if len(query) == 2:
        if not (0 <= query[0] < rows and 0 <= query[1] < columns):
            raise ValueError(f"{where}: the pixel (row, column) is outside the image of {rows} x {columns} pixels.")
    elif len(query) == 4:
        x0, y0, x1, y1 = query
        if not (0 <= x0 < x1 <= columns and 0 <= y0 < y1 <= rows):
            raise ValueError(
                f"{where}: expected a box with 0 <= x0 < x1 <= {columns} and 0 <= y0 < y1 <= {rows}, the image's size."
            )
    else:
        raise ValueError(f"{where}: expected (row, column) or (x0, y0, x1, y1), in pixels.")


def query_tokens(layout: TokenLayout, query: Query) -> list[int]:
    """Return the token indices of a query.

    Args:
        layout: the token frame.
        query: (row, column): the token whose patch centre is nearest; (x0, y0, x1, y1): those whose centre is inside,
            or the nearest to the box's centre; None: the class tokens, or without them all patches.
    """
    if query is None:
        return list(layout.class_tokens) or layout.patches.tolist()
    if len(query) == 2:
        return [_nearest(layout, query[0], query[1])]
    x0, y0, x1, y1 = query
    centres = [torch.arange(n) * layout.step + layout.centre for n in layout.grid]
    rows, columns = (centres[0] >= y0) & (centres[0] < y1), (centres[1] >= x0) & (centres[1] < x1)
    inside = layout.patches[(rows[:, None] & columns[None, :]).flatten()].tolist()
    return inside or [_nearest(layout, (y0 + y1) / 2, (x0 + x1) / 2)]


def query_weights(layer: Layer, query: Query) -> Float[Tensor, "batch tokens"]:
    """Return the mean over a query's tokens as a row vector: 1 / count on each of them, 0 elsewhere."""
    tokens = query_tokens(layer.layout, query)
    weights = torch.zeros(layer.batch, layer.tokens, dtype=layer.dtype, device=layer.device)
    weights[:, tokens] = 1 / len(tokens)
    return weights


def read_rows(
    layer: Layer,
    query: Query,
    *,
    fold: str = "mean",
    row_weight: Float[Tensor, "batch channels tokens"] | None = None,
    col_weight: Float[Tensor, "batch routes channels length"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """Return the mean of the rows of a query's tokens in the folded attention, signed; for scans in linear time.

    Args:
        layer: the layer.
        query: whose rows.
        fold: "mean" or "sum" over channels or heads.
        row_weight: as in the layer's ``row``.
        col_weight: likewise.
    """
    tokens = query_tokens(layer.layout, query)
    if len(tokens) == 1:
        return layer.row(tokens[0], fold=fold, row_weight=row_weight, col_weight=col_weight)
    # left_product(weights) - weights would cancel: attention can be thousands of times smaller than the identity
    vector = query_weights(layer, query)
    return layer.left_product(vector, fold=fold, row_weight=row_weight, col_weight=col_weight, residual=False)


def _nearest(layout: TokenLayout, row: float, column: float) -> int:
    """The token nearest to a pixel; pixels at the border that no patch covers belong to the last one."""
    last = [(n - 1) * layout.step + layout.patch_size - 1 for n in layout.grid]
    return layout.token_at(min(row, last[0]), min(column, last[1]))
