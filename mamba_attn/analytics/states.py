"""Where the hidden state of a scan goes: its path on principal components, its norm over the image, its distances."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from mamba_attn.analytics.projection import Components, components
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.ranks import spearman
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.layers import Layer, ScanLayer

KINDS = ("grid", "raster", "sequence")
_MOST_PAIRS_OF = 1024  # steps


@dataclass(frozen=True)
class Distances:
    """Distance between states as a function of the distance between their tokens, over all pairs of some steps.

    Args:
        kind: "grid", Euclidean on the patch grid; "raster", difference of raster indices; "sequence", steps between.
        distance: (bins,) of the tokens: 0 < 1 < ..., for "grid" rounded to whole patches.
        mean: (bins,) of the Euclidean distance between states.
        deviation: (bins,) its standard deviation.
        pairs: (bins,) number of pairs.
        correlation: Spearman's, between both distances over all pairs; NaN if either is constant.
    """

    kind: str
    distance: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    pairs: np.ndarray
    correlation: float


@dataclass(frozen=True)
class StateTrajectory:
    """The hidden state of one route, of one image, after every step.

    Args:
        states: (length, features): channels times states of each channel.
        order: (length,) token that was read at each step.
        layout: where the tokens sit in the image.
    """

    states: np.ndarray
    order: np.ndarray
    layout: TokenLayout

    def __post_init__(self) -> None:
        if self.states.ndim != 2 or self.order.shape != self.states.shape[:1] or not self.states.size:
            raise ValueError(
                f"StateTrajectory(states{self.states.shape}, order{self.order.shape}): expected (length, features) and "
                "the token of every step."
            )
        if self.order.min() < 0 or self.order.max() >= self.layout.tokens:
            raise ValueError(f"StateTrajectory(order): tokens outside the layout's 0..{self.layout.tokens - 1}.")

    def standardised(self) -> "StateTrajectory":
        """Return the trajectory whose features have mean 0 and standard deviation 1; constant ones are zeros."""
        spread = self.states.std(0)
        scaled = (self.states - self.states.mean(0)) / np.where(spread > 0, spread, 1)
        return StateTrajectory(np.where(spread > 0, scaled, 0.0), self.order, self.layout)

    def path(self, count: int = 2) -> Components:
        """Return the states on their first principal components, in the order of the steps.

        Args:
            count: how many components.
        """
        return components(self.states, count)

    def norm(self) -> np.ndarray:
        """Return the state's Euclidean norm at every step, (length,)."""
        return np.asarray(np.linalg.norm(self.states, axis=1))

    def norm_map(self) -> np.ndarray:
        """Return the state's norm where each patch was read, (height, width); NaN at patches that the route skips."""
        tokens = np.full(self.layout.tokens, np.nan)
        tokens[self.order] = self.norm()
        return self.layout.to_grid(torch.from_numpy(tokens)).numpy()

    def distances(self, kind: str = "sequence", *, steps: int = _MOST_PAIRS_OF, seed: int = 0) -> Distances:
        """Return the distance between states by the distance of their tokens.

        Steps that read no patch (class tokens, registers, padding) are left out; longer routes use pairs of a random
        sample of steps.

        Args:
            kind: "grid", "raster" or "sequence".
            steps: sample at most this number of steps.
            seed: of the sample.

        Raises:
            ValueError: an unknown kind, or fewer than two steps.
        """
        if kind not in KINDS or steps < 2:
            raise ValueError(f"distances(kind={kind!r}, steps={steps}): expected one of {KINDS} and two steps.")
        place = np.full(self.layout.tokens, -1)
        place[self.layout.patches.numpy()] = np.arange(len(self.layout.patches))
        (on_patches,) = np.nonzero(place[self.order] >= 0)
        if len(on_patches) < 2:
            raise ValueError(f"distances(kind={kind!r}): the route reads fewer than two patches.")
        if len(on_patches) > steps:
            on_patches = np.sort(np.random.default_rng(seed).choice(on_patches, steps, replace=False))
        first, second = np.triu_indices(len(on_patches), 1)
        between = _pairwise(self.states[on_patches])[first, second]
        apart = _apart(kind, on_patches, place[self.order[on_patches]], self.layout.grid[1], first, second)
        return _binned(kind, apart, between)


def state_trajectory(
    layer: Layer, route: int = 0, channels: int | Iterable[int] | None = None, image: int = 0
) -> StateTrajectory:
    """Return the hidden states of one route of a traced layer, of one image; computes only the requested channels.

    Args:
        layer: a traced layer of selective scans.
        route: its number.
        channels: the number of one channel, or several. Default: all.
        image: its number in the batch.

    Raises:
        UnsupportedModelError: the layer is softmax attention, which has no states.
        ValueError: a route, channel or image out of range.
        TraceError: the tokens' place in the image is not known.

    Example:
        >>> from mamba_attn import trace
        >>> with torch.no_grad(), trace(model) as record:
        ...     logits = model(images)
        >>> state_trajectory(record["layers.6.mixer"], route=1).norm_map().shape
        (14, 14)
    """
    if not isinstance(layer, ScanLayer):
        raise UnsupportedModelError(f"state_trajectory: {layer.name} is {layer.kind}, which has no hidden state.")
    if not 0 <= image < layer.batch:
        raise ValueError(f"state_trajectory(image={image}): {layer.name} saw 0..{layer.batch - 1}.")
    scan = _of_image(layer.scan, image)
    states = ScanLayer(layer.name, scan).states(route, channels)[0]
    flat, order = states.flatten(0, 1).T.double().cpu().numpy(), scan.read_order.view(-1, scan.length)[route]
    return StateTrajectory(flat, order.cpu().numpy(), layer.layout)


def _of_image(scan: ScanRecord, image: int) -> ScanRecord:
    return scan.replace(gate=None, bypass=None).select_images(slice(image, image + 1)).map_tensors(torch.Tensor.detach)


def _pairwise(states: np.ndarray) -> np.ndarray:
    """Return (steps, steps) Euclidean distances."""
    centred = states - states.mean(0)
    squares = np.einsum("sf,sf->s", centred, centred)
    distances: np.ndarray = np.sqrt(np.maximum(squares[:, None] + squares - 2 * centred @ centred.T, 0))
    return distances


def _apart(
    kind: str, steps: np.ndarray, patches: np.ndarray, width: int, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Distances of the tokens of pairs of steps."""
    if kind == "grid":
        rows, columns = np.divmod(patches, width)
        return np.asarray(np.hypot(rows[first] - rows[second], columns[first] - columns[second]))
    places = steps if kind == "sequence" else patches
    return np.asarray(np.abs(places[first] - places[second]), dtype=np.float64)


def _binned(kind: str, apart: np.ndarray, between: np.ndarray) -> Distances:
    places = np.rint(apart).astype(np.int64)
    pairs = np.bincount(places)
    (bins,) = np.nonzero(pairs)
    mean = np.bincount(places, between)[bins] / pairs[bins]
    square = np.bincount(places, (between - np.bincount(bins, mean)[places]) ** 2)[bins] / pairs[bins]
    even = np.round(between / (between.max() or 1), 9)  # rounding errors must not rank equal distances
    return Distances(kind, bins, mean, np.sqrt(square), pairs[bins], spearman(apart, even))
