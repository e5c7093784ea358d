"""Reads rows and regions of stored attention lazily, and runs the model where none is stored."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mamba_attn.analytics import NotStoredError
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.viewer.errors import UnavailableError
from mamba_attn.viewer.live import Live
from mamba_attn.viewer.state import Pane

if TYPE_CHECKING:
    from mamba_attn.core.layout import TokenLayout

_REMEMBERED = 256 * 2**20  # bytes of matrices and pictures
_BAND = 256  # rows, or columns, read at once: zarr unpacks whole tiles, so fewer would cost as much
Item = TypeVar("Item")


class Source:
    """One store, with a cache of what is read repeatedly.

    Args:
        store: an ``AttentionStore``.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self.layers = list(store.layers)
        self.images = list(store.images)
        self._kept: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = RLock()

    @cached_property
    def scans(self) -> bool:
        """Whether any layer scans its tokens, and thus has routes, a path, perhaps a gate and D."""
        return any(scans(layer) for layer in self.layers)

    @cached_property
    def live(self) -> Live:
        """The model itself, built on first use."""
        return Live(self.store)

    def layer(self, pane: Pane) -> Any:
        """Return the pane's layer, or the last one if there are fewer."""
        return self.layers[min(pane.layer, len(self.layers) - 1)]

    def route(self, pane: Pane) -> str | int:
        """Return the pane's route, or "sum" if the layer does not have it."""
        return pane.route if 0 <= pane.route < self.layer(pane).routes else "sum"

    def image(self, pane: Pane) -> Any:
        """Return the pane's image, or the last one if there are fewer."""
        return self.images[min(pane.image, len(self.images) - 1)]

    def stage(self, pane: Pane) -> list[int]:
        """Return the numbers of the layers of the pane's stage."""
        stage = self.layer(pane).stage
        return [index for index, layer in enumerate(self.layers) if layer.stage == stage]

    def pixels(self, pane: Pane) -> np.ndarray:
        """Return the pane's image, (rows, columns, 3) uint8."""
        image = self.image(pane)
        return self._remember(("pixels", image.key), lambda: np.asarray(self.store.pixels(image)))

    def mean(self, pane: Pane) -> np.ndarray:
        """Return the mean attention of all images, (tokens, tokens) float32; columns as rows if the pane shows them."""
        layer = self.layer(pane)
        return np.concatenate([self._band(pane, None, number) for number in range(_bands(layer.layout.tokens))])

    def read(self, pane: Pane, tokens: Sequence[int]) -> np.ndarray:
        """Return the mean of some tokens' rows, or columns, of the attention that a pane shows: (tokens,).

        Args:
            pane: which attention.
            tokens: of the layer's token frame; empty means all.

        Raises:
            UnavailableError: gate or D of a mean (only images have them); an image that is not stored and a model that
                cannot run; the mean of a route if only sums were collected.
        """
        layer = self.layer(pane)
        chosen = list(tokens) or list(range(layer.layout.tokens))
        if pane.what == "mean":
            if pane.gate or pane.skip:
                raise UnavailableError(
                    "Gate and D exist for single images only: show 'this image' instead of the average."
                )
            return self._of_mean(pane, chosen)
        if pane.what == "difference" and (pane.gate or pane.skip):
            raise UnavailableError("The average has no gate and no D: switch them off to show the difference.")
        values = self._of_image(pane, chosen)
        return values - self._of_mean(pane, chosen) if pane.what == "difference" else values

    def _of_mean(self, pane: Pane, tokens: list[int]) -> np.ndarray:
        return self._stored(pane, tokens, None)

    def _of_image(self, pane: Pane, tokens: list[int]) -> np.ndarray:
        layer, route, image = self.layer(pane), self.route(pane), self.image(pane)
        if image.kept and not pane.gate and not pane.skip:
            return self._stored(pane, tokens, image)
        return self.live.read(
            image, layer.name, tokens, route=route, direction=pane.direction, gate=pane.gate, skip=pane.skip
        )

    def _stored(self, pane: Pane, tokens: list[int], image: Any) -> np.ndarray:
        """Mean over tokens of the stored lines; the mean over all is cached, because it reads the whole matrix."""
        layer = self.layer(pane)
        every = len(tokens) == layer.layout.tokens

        def total() -> np.ndarray:
            found = np.zeros(layer.layout.tokens)
            for number in sorted({token // _BAND for token in tokens}):
                its = [token % _BAND for token in tokens if token // _BAND == number]
                found += self._band(pane, image, number)[its].sum(axis=0, dtype=np.float64)
            return found / len(tokens)

        key = ("all", layer.name, self.route(pane), pane.direction, image and image.key)
        return self._remember(key, total) if every else total()

    def _band(self, pane: Pane, image: Any, number: int) -> np.ndarray:
        """Return a band of neighbouring lines, (lines, tokens) float32."""
        layer, route = self.layer(pane), self.route(pane)
        start = number * _BAND
        stop = min(start + _BAND, layer.layout.tokens)
        key = ("band", layer.name, route, pane.direction, number, image and image.key)

        def lines() -> np.ndarray:
            try:
                found = self.store.lines(layer, start, stop, route, image=image, columns=pane.direction == "column")
            except NotStoredError as error:  # e.g. the mean of one route, from a store that has only sums
                raise UnavailableError(str(error)) from error
            return np.ascontiguousarray(found).astype(np.float32)

        return self._remember(key, lines)

    def _remember(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            made = make()
            self._kept[key] = made
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > _REMEMBERED:
                self._kept.popitem(last=False)
            return made


def scans(layer: Any) -> bool:
    """Return whether a layer scans its tokens; softmax attention has no order."""
    return bool(layer.kind == ScanLayer.kind)


def others(layout: "TokenLayout") -> list[int]:
    """Return the tokens that are not patches, class tokens first."""
    return [*layout.class_tokens, *layout.registers]


def tokens_of(layout: "TokenLayout", cells: Sequence[int]) -> list[int]:
    """Return the tokens of selected cells; cells outside the layout are left out.

    Args:
        layout: of the layer.
        cells: raster indices of patches; -1, -2, ... for the tokens that are not patches.
    """
    patches, rest = layout.patches.tolist(), others(layout)
    return [
        *(patches[cell] for cell in cells if 0 <= cell < len(patches)),
        *(rest[-1 - cell] for cell in cells if 0 <= -1 - cell < len(rest)),
    ]


def _bands(tokens: int) -> int:
    return -(-tokens // _BAND)
