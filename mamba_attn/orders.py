"""Patch orders: which cell of a height x width grid a route visits at each step.

Every order is an int64 tensor of raster indices ``row * width + column``, a permutation of the grid.
Definitions follow the scan orders of VMamba (arXiv 2401.10166) and of arXiv 2502.20764, whose diagonal, Morton and
spiral orders are not defined there; the definitions below are ours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba_attn._types import Int
from mamba_attn.errors import nearest

Order = Int[Tensor, " length"]


def raster(height: int, width: int) -> Order:
    """Rows from the top, each from the left.

    Example:
        >>> raster(2, 3).tolist()
        [0, 1, 2, 3, 4, 5]
    """
    return torch.arange(height * width)


def column(height: int, width: int) -> Order:
    """Columns from the left, each from the top.

    Example:
        >>> column(2, 3).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    return raster(height, width).view(height, width).T.flatten()


def diagonal(height: int, width: int) -> Order:
    """Anti-diagonals (row + column ascending), each from the top.

    Example:
        >>> diagonal(2, 3).tolist()
        [0, 1, 3, 2, 4, 5]
    """
    return _sorted(height, width, lambda row, col: (row + col, row))


def zigzag(height: int, width: int) -> Order:
    """Anti-diagonals, alternately up and down, which keeps consecutive cells close (as in JPEG).

    Example:
        >>> zigzag(2, 3).tolist()
        [0, 3, 1, 2, 4, 5]
    """
    return _sorted(height, width, lambda row, col: (row + col, -row if (row + col) % 2 else row))


def morton(height: int, width: int) -> Order:
    """Z-order: the bits of row and column interleaved, the column's least significant; cells outside are skipped.

    Example:
        >>> morton(2, 3).tolist()
        [0, 1, 3, 4, 2, 5]
    """
    return _sorted(height, width, lambda row, col: (_spread(row) << 1 | _spread(col),))


def hilbert(height: int, width: int) -> Order:
    """The Hilbert curve of the smallest enclosing power of two; cells outside the grid are skipped.

    Example:
        >>> hilbert(2, 3).tolist()
        [0, 1, 4, 3, 5, 2]
    """
    side = 1 << (max(height, width) - 1).bit_length()
    return _sorted(height, width, lambda row, col: (_hilbert_rank(side, row, col),))


def spiral(height: int, width: int) -> Order:
    """Clockwise from the top left corner inwards.

    Example:
        >>> spiral(2, 3).tolist()
        [0, 1, 2, 5, 4, 3]
    """
    rest = raster(height, width).view(height, width)
    rings = []
    while rest.numel():
        rings.append(rest[0])
        rest = rest[1:].T.flip(0)  # rotate: the next side becomes the top row
    return torch.cat(rings)


def random(height: int, width: int, seed: int = 0) -> Order:
    """A random permutation, fixed by its seed: the negative control.

    Example:
        >>> sorted(random(2, 3, seed=1).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    return torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))


ORDERS: dict[str, Callable[[int, int], Order]] = {
    function.__name__: function for function in (raster, column, diagonal, zigzag, morton, hilbert, spiral, random)
}


def order(name: str, height: int, width: int) -> Order:
    """Return the order of that name on a height x width grid.

    Args:
        name: one of ``ORDERS``.
        height: rows of the grid.
        width: columns of the grid.

    Raises:
        ValueError: the name is unknown, or the grid has no cells.

    Example:
        >>> order("column", 2, 3).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    if name not in ORDERS:
        raise ValueError(f"order({name!r}): no such order. {nearest(name, ORDERS)}")
    if height < 1 or width < 1:
        raise ValueError(f"order({name!r}, {height}, {width}): a grid has at least one row and one column.")
    return ORDERS[name](height, width)


def inverse(permutation: Order) -> Order:
    """Return the step at which each cell is visited: ``permutation[inverse(permutation)]`` is raster order.

    Example:
        >>> path = column(2, 3)
        >>> path[inverse(path)].tolist()
        [0, 1, 2, 3, 4, 5]
    """
    return torch.argsort(permutation)


def cross(name: str, height: int, width: int, second: str = "transpose") -> Int[Tensor, "routes length"]:
    """Return the four routes of a cross-scan: the order, its second view, and the reversals of both.

    With ``name="raster"`` these are VMamba's routes: rows, columns, rows reversed, columns reversed.

    Args:
        name: one of ``ORDERS``.
        height: rows of the grid.
        width: columns of the grid.
        second: "transpose" walks the transposed grid; "mirror" walks the grid with its columns flipped, which for
            diagonal orders covers the other diagonals.

    Raises:
        ValueError: the name or the second view is unknown.

    Example:
        >>> cross("raster", 2, 3).shape  # four routes: rows and columns, both ways
        torch.Size([4, 6])
    """
    first = order(name, height, width)
    cells = raster(height, width).view(height, width)
    if second == "transpose":
        other = cells.T.flatten()[order(name, width, height)]
    elif second == "mirror":
        other = cells.flip(1).flatten()[first]
    else:
        raise ValueError(f"cross(second={second!r}): expected 'transpose' or 'mirror'.")
    return torch.stack([first, other, first.flip(0), other.flip(0)])


def both_ways(permutation: Order) -> Int[Tensor, "routes length"]:
    """Return the order and its reversal: the two routes of a bidirectional mixer such as Vim's.

    Example:
        >>> both_ways(raster(1, 3)).tolist()
        [[0, 1, 2], [2, 1, 0]]
    """
    return torch.stack([permutation, permutation.flip(0)])


def sub_grid(height: int, width: int, rows: slice, columns: slice, transpose: bool = False) -> Order:
    """Return the cells of a strided sub-grid, row by row or, transposed, column by column.

    Args:
        height: rows of the whole grid.
        width: columns of the whole grid.
        rows: which rows, e.g. ``slice(0, None, 2)``.
        columns: which columns.
        transpose: walk column by column.

    Example:
        >>> sub_grid(2, 4, slice(None), slice(0, 4, 2)).tolist()
        [0, 2, 4, 6]
    """
    cells = raster(height, width).view(height, width)[rows, columns]
    return (cells.T if transpose else cells).flatten()


def insert_tokens(permutation: Int[Tensor, " patches"], positions: Sequence[int]) -> Int[Tensor, " tokens"]:
    """Insert tokens that are not patches (class token, registers) into an order of patches.

    Args:
        permutation: an order of the patches, as raster indices.
        positions: token indices of the inserted tokens; each is also the step at which it is visited.

    Returns:
        The order of all tokens, as token indices.

    Raises:
        ValueError: positions are repeated or outside the sequence.

    Example:
        >>> insert_tokens(raster(2, 2), [2]).tolist()  # a class token in the middle
        [0, 1, 2, 3, 4]
    """
    total = len(permutation) + len(positions)
    if len(set(positions)) != len(positions) or any(not 0 <= position < total for position in positions):
        raise ValueError(f"insert_tokens: positions {tuple(positions)} must be distinct and in 0..{total - 1}.")
    is_patch = torch.ones(total, dtype=torch.bool)
    is_patch[list(positions)] = False
    patch_token = is_patch.nonzero().squeeze(1)
    result = torch.arange(total)
    result[is_patch] = patch_token[permutation]
    return result


def _sorted(height: int, width: int, key: Callable[[int, int], tuple[int, ...]]) -> Order:
    """The cells of the grid sorted by a key of (row, column)."""
    cells = sorted(range(height * width), key=lambda cell: key(cell // width, cell % width))
    return torch.tensor(cells, dtype=torch.int64)


def _spread(value: int) -> int:
    """Insert a zero bit above every bit, to interleave two numbers."""
    return sum((value >> bit & 1) << 2 * bit for bit in range(value.bit_length()))


def _hilbert_rank(side: int, row: int, column: int) -> int:
    """Distance of a cell along the Hilbert curve of a side x side grid (side a power of two)."""
    rank = 0
    half = side // 2
    while half:
        lower, right = int(row & half > 0), int(column & half > 0)
        rank += half * half * ((3 * right) ^ lower)
        if not lower:
            if right:
                row, column = side - 1 - row, side - 1 - column
            row, column = column, row
        half //= 2
    return rank
