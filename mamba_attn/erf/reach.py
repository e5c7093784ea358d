"""How far attention reaches: distances of what a token reads, and the row of the rollout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.attention_rollout import roll_out
from mamba_attn.attribution.queries import Query, query_weights, read_rows
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.tracer import trace

DENSE = 4096  # tokens up to which whole matrices are used
_Grid = tuple[int, int, float, float]  # rows and columns, pixels from one to the next, the first one's centre


@dataclass(frozen=True)
class Reach:
    """How far the attention of one token reaches, averaged over images.

    Args:
        layers: names, first to last.
        rows: per layer (height, width), |attention| of what the token reads, as shares.
        row_distance: per layer, the mean distance of what the token reads, in pixels; NaN for a class token.
        mean_distance: per layer, the mean of that over all patches; NaN if the matrix is too large.
        rollout: (height, width) on the first layer's grid, what reaches the token through all layers, as shares; None
            if layers do not fit each other.
        rollout_distance: its mean distance in pixels.
        note: which rollout was used, or why it is missing.

    Example:
        >>> from mamba_attn.erf import receptive_field
        >>> found = receptive_field(model, images[:1]).reach
        >>> len(found.layers)
        7
    """

    layers: list[str]
    rows: dict[str, np.ndarray]
    row_distance: dict[str, float]
    mean_distance: dict[str, float]
    rollout: np.ndarray | None
    rollout_distance: float
    note: str


@dataclass
class ReachSum:
    """Accumulates reach over images; ``result`` returns the means.

    Args:
        query: one pixel or box; None for the class token.
        centre: (row, column) in pixels to measure distances from; None: measure no distances.
        given: options of ``mamba_attn.trace``: layout and orders.
    """

    query: Query | None
    centre: tuple[float, float] | None
    given: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    rows: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    rollout: Tensor | None = None
    grids: dict[str, _Grid] = field(default_factory=dict)
    note: str = ""

    def add(self, model: nn.Module, images: Tensor, tokens: int, last: str) -> None:
        """Look at a batch.

        Args:
            model: as it is.
            images: (batch, colours, rows, columns).
            tokens: number of tokens of the largest layer.
            last: name of the layer at which the rollout starts.

        Raises:
            NonFiniteError: a layer's attention contains NaN or Inf.
        """
        dense = tokens <= DENSE
        with torch.no_grad(), trace(model, attention="mean" if dense else None, **self.given) as record:
            model(images)
            layers = record.layers
            for layer in layers:
                self._row(layer)
                if dense:
                    mean = attention_distance(layer.attention(), layer.layout).sum()
                    self.means[layer.name] = self.means.get(layer.name, 0.0) + float(mean)
            self._roll(layers[: [layer.name for layer in layers].index(last) + 1], dense)
        self.images += len(images)

    def result(self) -> Reach:
        """Return the reach averaged over images."""
        rows = {name: (total / self.images).cpu().numpy() for name, total in self.rows.items()}
        rolled = None if self.rollout is None else (self.rollout / self.images).cpu().numpy()
        first = next(iter(self.grids.values()))
        return Reach(
            layers=list(rows),
            rows=rows,
            row_distance={name: self._distance(row, self.grids[name]) for name, row in rows.items()},
            mean_distance={name: self.means.get(name, float("nan")) / self.images for name in rows},
            rollout=rolled,
            rollout_distance=float("nan") if rolled is None else self._distance(rolled, first),
            note=self.note,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything that was added, for ``merge``."""
        found = {"images": np.array(self.images), "note": np.array(self.note), "layers": np.array(list(self.rows))}
        for at, (name, row) in enumerate(self.rows.items()):
            found[f"row {at}"], found[f"grid {at}"] = row.cpu().numpy(), np.array(self.grids[name])
            if name in self.means:
                found[f"mean {at}"] = np.array(self.means[name])
        return found if self.rollout is None else {**found, "rollout": self.rollout.cpu().numpy()}

    def merge(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add what another one has of the images that come next.

        Args:
            arrays: of that one.
        """
        self.images += int(arrays["images"])
        self.note = str(arrays["note"]) or self.note
        for at, name in enumerate(arrays["layers"].tolist()):
            rows, columns, step, centre = arrays[f"grid {at}"].tolist()
            self.grids[name] = (int(rows), int(columns), step, centre)
            self._add(self.rows, name, torch.from_numpy(arrays[f"row {at}"])[None])
            if f"mean {at}" in arrays:
                self.means[name] = self.means.get(name, 0.0) + float(arrays[f"mean {at}"])
        if "rollout" in arrays:
            its = torch.from_numpy(arrays["rollout"])
            self.rollout = its if self.rollout is None else self.rollout + its

    def _row(self, layer: Layer) -> None:
        row = layer.layout.to_grid(read_rows(layer, self.query).abs()).double()
        self._add(self.rows, layer.name, shares(row))
        its = layer.layout
        self.grids[layer.name] = (its.grid[0], its.grid[1], its.step, its.centre)

    def _roll(self, layers: Sequence[Layer], dense: bool) -> None:
        try:
            row = roll_out(layers, query_weights(layers[-1], self.query), signed=not dense)
        except UnsupportedModelError as error:
            self.note = f"no rollout: {error}"
            return
        self.note = "attention rollout" if dense else "signed attention rollout, its size, because of the many tokens"
        found = {"rollout": self.rollout} if self.rollout is not None else {}
        self._add(found, "rollout", shares(layers[0].layout.to_grid(row.abs()).double()))
        self.rollout = found["rollout"]

    def _distance(self, weights: np.ndarray, grid: _Grid) -> float:
        if self.centre is None or not weights.sum():
            return float("nan")
        *counts, step, centre = grid
        rows, columns = (np.arange(n) * step + centre for n in counts)
        away = np.hypot(rows[:, None] - self.centre[0], columns - self.centre[1])
        return float((weights * away).sum() / weights.sum())

    @staticmethod
    def _add(totals: dict[str, Tensor], name: str, values: Tensor) -> None:
        totals[name] = totals[name].to(values.device) + values.sum(0) if name in totals else values.sum(0)


def attention_distance(attention: Float[Tensor, "batch tokens tokens"], layout: TokenLayout) -> Float[Tensor, " batch"]:
    """Return the mean distance of what a patch reads, over all patches, in pixels (arXiv 2010.11929, figure 7).

    Distances are weighted by |attention|; class tokens, registers and padding neither read nor are read. Patches that
    read nothing are left out.

    Args:
        attention: in the token frame, signed or not.
        layout: where the tokens sit in the image.
    """
    patches = layout.patches.to(attention.device)
    weights = attention.detach()[:, patches][:, :, patches].abs().double()
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) * layout.step for n in layout.grid))
    away = torch.cdist(places, places).to(weights.device)
    total = weights.sum(2)
    each = (weights * away).sum(2) / torch.where(total > 0, total, 1)
    mean: Tensor = each.sum(1) / (total > 0).sum(1)
    return mean


def shares(maps: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
    """Return maps whose numbers sum to one; zeros stay zeros."""
    total = maps.sum((1, 2), keepdim=True)
    return maps / torch.where(total > 0, total, 1)
