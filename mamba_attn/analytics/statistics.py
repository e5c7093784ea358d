"""Running mean and variance of batches of matrices, in float64, that can be merged (Chan, Golub and LeVeque, 1979).

``state_moments`` are those of a scan's hidden state, in time linear in the length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import NonFiniteError

_AT_ONCE = 2**17  # numbers of a batch to process at once: they stay in the cache
Moment = Float[Tensor, "routes channels length"]


@dataclass(eq=False)
class Running:
    """Running mean, and sum of squared deviations from it, of matrices.

    Args:
        mean: float64.
        m2: float64; divided by the number of matrices it is their variance.
    """

    mean: Float[Tensor, "tokens tokens"]
    m2: Float[Tensor, "tokens tokens"]

    @classmethod
    def zeros(cls, tokens: int, device: torch.device | str = "cpu") -> "Running":
        """Return the statistics of no images."""
        return cls(*torch.zeros(2, tokens, tokens, dtype=torch.float64, device=device))

    def update(self, values: Float[Tensor, "batch tokens tokens"], before: int) -> None:
        """Add a batch.

        Args:
            values: the batch, on the device of the statistics.
            before: matrices that are counted already.

        Raises:
            NonFiniteError: the batch contains NaN or Inf; the statistics are then invalid.
        """
        batch, tokens = values.shape[:2]
        rows = max(1, _AT_ONCE // (batch * tokens)) if values.device.type == "cpu" else tokens
        room = self.mean.new_empty(2, min(rows, tokens), tokens) if batch == 1 else None
        for start in range(0, tokens, rows):
            own, m2 = self.mean[start : start + rows], self.m2[start : start + rows]
            if room is not None:
                _merge_one(own, m2, before, values[0, start : start + rows], *room[:, : len(own)])
                continue
            part = values[:, start : start + rows].to(torch.float64, copy=True)
            mean = part.mean(0)
            merge(own, m2, before, mean, part.sub_(mean).square_().sum(0), batch)
        if not bool(torch.isfinite(self.mean.sum())):
            raise NonFiniteError("attention contains NaN or Inf; check the weights.")


@dataclass(eq=False)
class LayerStatistics:
    """The statistics of one layer.

    Args:
        routes: statistics by "sum", "0", "1", ...
        moments: (2, routes, channels, length) float64, the states' means and mean squares; None without states.
    """

    routes: dict[str, Running]
    moments: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        routes: list[str],
        tokens: int,
        moments: tuple[int, int, int] | None,
        device: torch.device | str = "cpu",
    ) -> "LayerStatistics":
        """Return the statistics of no images."""
        states = None if moments is None else torch.zeros(2, *moments, dtype=torch.float64, device=device)
        return cls({route: Running.zeros(tokens, device) for route in routes}, states)

    def update_moments(self, moments: tuple[Tensor, Tensor], before: int, count: int) -> None:
        """Add the states of a batch.

        Args:
            moments: of the batch.
            before: images counted already.
            count: of the batch.

        Raises:
            NonFiniteError: the moments contain NaN or Inf.
        """
        if self.moments is not None:
            finite = True
            for own, found in zip(self.moments.flatten(1), moments, strict=True):
                its, step = found.to(own.device).flatten(), _AT_ONCE if own.device.type == "cpu" else len(own)
                for start in range(0, len(own), step):
                    merge_means(own[start : start + step], before, its[start : start + step].double(), count)
                finite = finite and bool(torch.isfinite(its.sum(dtype=torch.float64)))
            if not finite:
                raise NonFiniteError("the states of the scans contain NaN or Inf; check the weights.")

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name."""
        found: dict[str, np.ndarray] = {}
        for route, running in self.routes.items():
            found |= {f"mean/{route}": running.mean.cpu().numpy(), f"m2/{route}": running.m2.cpu().numpy()}
        return found if self.moments is None else {**found, "moments": self.moments.cpu().numpy()}


@dataclass(eq=False)
class Statistics:
    """Statistics of all layers, of the same images.

    Args:
        layers: in the order of the store's.
        count: images.
    """

    layers: list[LayerStatistics]
    count: int = 0


def merge_means(mean: Tensor, before: int, other: Tensor, count: int) -> None:
    """Update a mean in place by that of other images.

    Args:
        mean: of ``before`` images.
        before: number of images.
        other: mean of ``count`` other images.
        count: number of other images.
    """
    mean += (other - mean) * (count / (before + count))


def merge(mean: Tensor, m2: Tensor, before: int, other_mean: Tensor, other_m2: Tensor, count: int) -> None:
    """Update a mean and sum of squared deviations in place by Chan's formula."""
    difference = other_mean - mean
    mean += difference * (count / (before + count))
    squares = difference.square_() * (before * count / (before + count))
    m2 += other_m2 + squares


def _merge_one(mean: Tensor, m2: Tensor, before: int, other: Tensor, difference: Tensor, room: Tensor) -> None:
    """Do what ``merge`` does, of one image, in memory that is there: new memory costs more than the sums."""
    difference.copy_(other).sub_(mean)
    mean += torch.mul(difference, 1 / (before + 1), out=room)
    m2 += difference.square_().mul_(before / (before + 1))


def state_moments(record: ScanRecord) -> tuple[Moment, Moment]:
    """Return the mean, and the mean square, of the state h after every step, over the batch and the states.

    h = exp(delta A) h + delta B u (arXiv 2312.00752, eq. 2a), in scan order. The second, summed over channels and times
    the number of states, is the mean squared norm of the whole state at that step.

    Args:
        record: of a mixer's call.
    """
    u, delta, B = record.u, record.delta, record.B
    shape = (record.routes, record.channels, record.length)
    mean, square = torch.zeros(2, *shape, device=delta.device, dtype=torch.promote_types(delta.dtype, torch.float32))
    for state in range(record.states):  # one state alone, read as it is (C = 1), is the output of a scan
        own = slice(state, state + 1)
        A = record.A if record.A.shape[2] == 1 else record.A[..., own]
        h = ops.selective_scan(u, delta, A, B[..., own, :], torch.ones_like(B[..., own, :]))
        for image in h:  # several times faster than a mean over the first axis
            mean += image
            square.addcmul_(image, image)
    count = record.batch * record.states
    return mean / count, square / count
