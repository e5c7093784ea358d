"""The places of patches: in the image, in rows, columns and z-blocks, and along the scans of their layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch

from mamba_attn import orders
from mamba_attn.analytics.index import StoredLayer
from mamba_attn.core.ranks import ranks

BEFORE = 3  # steps that count as "just before"
_FAR = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Places:
    """Places of n patches, and relations of pairs of them; the first axis of a pair is the reader.

    Args:
        row: (n,) label of the patch's row.
        column: (n,) label of its column.
        block: (n,) label of its z-block: the aligned square of cells that Morton's order visits in one go, its side the
            power of two nearest to the square root of the grid's, so that there are about as many of them as rows.
        away: (n, n) distance in pixels, float32.
        near: (n, n) whether a patch is another's neighbour in the grid, of eight, or itself.
        steps: (n, n) fewest steps between two patches over the layer's routes; class tokens do not count.
        before: (n, n) whether the second is 1 to 3 steps before the first in one of the routes.
        raster: (n, n) as ``steps``, in raster order; where a layer has more than two routes, in rows or columns.
    """

    row: np.ndarray
    column: np.ndarray
    block: np.ndarray
    away: np.ndarray
    near: np.ndarray
    steps: np.ndarray
    before: np.ndarray
    raster: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def ranked(self) -> dict[str, np.ndarray]:
        """Centred ranks of "away", "steps" and "raster" over all pairs."""
        pairs = np.triu_indices(len(self), 1)
        found = {name: ranks(getattr(self, name)[pairs]) for name in ("away", "steps", "raster")}
        return {name: values - values.mean() for name, values in found.items()}

    @property
    def in_raster_order(self) -> bool:
        """Whether the layer's own order is the raster."""
        return np.array_equal(self.steps, self.raster)

    def taken(self, patches: Sequence[int] | np.ndarray) -> "Places":
        """Return the places of some of the patches, or of all in another order.

        Args:
            patches: their indices.
        """
        index = np.asarray(patches)
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return Places(**{name: v[index] if v.ndim == 1 else v[np.ix_(index, index)] for name, v in values.items()})

    def shuffled(self, seed: int = 0) -> "Places":
        """Return the places in random order: what then remains of a statistic is chance.

        Args:
            seed: of the permutation.
        """
        return self.taken(np.random.default_rng(seed).permutation(len(self)))


def places_of(layer: StoredLayer) -> Places:
    """Return the places of a layer's patches, in raster order.

    Args:
        layer: uses its layout and the orders of its routes; softmax attention has one route, the raster.
    """
    height, width = layer.layout.grid
    row, column = np.divmod(np.arange(height * width), width)
    rows, columns = row[:, None] - row, column[:, None] - column
    side = 2 ** max(0, round(math.log2(max(1.0, math.sqrt(min(height, width))))))
    patches = layer.layout.patches.numpy()
    visited = _positions(np.asarray(layer.orders), layer.tokens)[:, patches]
    skipped = (visited < 0).sum(1, keepdims=True)  # these sort first
    visited = np.where(visited < 0, -1, np.argsort(np.argsort(visited, axis=1), axis=1) - skipped).astype(np.int32)
    raster = orders.cross("raster", height, width) if layer.routes > 2 else torch.arange(height * width)[None]
    return Places(
        row=row,
        column=column,
        block=(row // side) * width + column // side,
        away=(np.hypot(rows, columns) * layer.layout.step).astype(np.float32),
        near=np.maximum(abs(rows), abs(columns)) <= 1,
        steps=_fewest_steps(visited),
        before=_just_before(visited),
        raster=_fewest_steps(_positions(raster.numpy(), height * width)),
    )


def _positions(routes: np.ndarray, tokens: int) -> np.ndarray:
    """Return the step at which each token is visited, (routes, tokens); -1 if a route skips it."""
    found = np.full((len(routes), tokens), -1, dtype=np.int32)
    np.put_along_axis(found, routes, np.arange(routes.shape[1], dtype=np.int32)[None], axis=1)
    return found


def _fewest_steps(visited: np.ndarray) -> np.ndarray:
    """Return the fewest steps between tokens, over the routes that visit both."""
    fewest = np.full((visited.shape[1],) * 2, _FAR, dtype=np.int32)
    for steps in visited:
        both = (steps[:, None] >= 0) & (steps >= 0)
        fewest = np.minimum(fewest, np.where(both, abs(steps[:, None] - steps), _FAR))
    return fewest


def _just_before(visited: np.ndarray) -> np.ndarray:
    before = np.zeros((visited.shape[1],) * 2, dtype=bool)
    for steps in visited:
        ahead = steps[:, None] - steps
        before |= (ahead >= 1) & (ahead <= BEFORE) & (steps >= 0) & (steps[:, None] >= 0)
    return before
