"""Reads rows and regions of stored attention lazily, and runs the model where none is stored."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mamba_attn import images
from mamba_attn.analytics import NotStoredError
from mamba_attn.core.transform import Transform
from mamba_attn.errors import MambaAttnError
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.viewer.errors import UnavailableError
from mamba_attn.viewer.live import Live
from mamba_attn.viewer.state import Pane

if TYPE_CHECKING:
    from PIL.Image import Image

    from mamba_attn.core.layout import TokenLayout

_LARGEST = 512  # side of a picture for the eye, in pixels
_REMEMBERED = 256 * 2**20  # bytes of matrices and pictures
_BAND = 256  # rows, or columns, read at once: zarr unpacks whole tiles, so fewer would cost as much
Item = TypeVar("Item")


@dataclass(eq=False)
class Added:
    """An image that the store does not have.

    Args:
        key: its name.
        pixels: as the model sees it.
        picture: for the eye, larger.
        predicted: name of the class with the highest score.
        label: not known.
        correct: not known.
        kept: nothing of it is stored.
    """

    key: str
    pixels: np.ndarray
    picture: np.ndarray | None = None
    predicted: str | None = None
    label: None = None
    correct: None = None
    kept: bool = False


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

    def pixels(self, pane: Pane) -> np.ndarray | None:
        """Return the pane's image, (rows, columns, 3) uint8; None of a text."""
        image = self.image(pane)
        if getattr(image, "words", None) is not None:
            return None
        if isinstance(image, Added):
            return np.asarray(image.pixels)
        return self._remember(("pixels", image.key), lambda: np.asarray(self.store.pixels(image)))

    def picture(self, pane: Pane) -> np.ndarray | None:
        """Return the pane's image for the eye: cut from its file as for the model, but larger, where the file is there.

        The file counts only if the model's own picture of it is the one that is stored. None of a text.
        """
        pixels, image = self.pixels(pane), self.image(pane)
        if pixels is None or isinstance(image, Added):
            return pixels if pixels is None or image.picture is None else image.picture
        return self._remember(("picture", image.key), lambda: self._original(image.key, pixels))

    def _original(self, key: str, pixels: np.ndarray) -> np.ndarray:
        index = getattr(self.store, "index", None)
        for each in getattr(index, "data", ()):
            path = Path(each.get("path") or each["identity"].rpartition(":")[0]) / key
            with suppress(OSError, ValueError, MambaAttnError):  # moved, changed, or of a function
                if path.is_file() and np.array_equal(self.store.transform.pixels(path), pixels):
                    return enlarged(self.store.transform, images.read(path, range=self.store.transform.range))
        return pixels

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
            UnavailableError: gate or D of a mean (only images have them); the mean of a route if only sums were
                collected.
            MambaAttnError: an image that is not stored, and a model that cannot run.
        """
        layer = self.layer(pane)
        chosen = list(tokens) or list(range(layer.layout.tokens))
        if pane.what == "image":
            return self._of_image(pane, chosen)
        if pane.gate or pane.skip:
            raise UnavailableError("Gate and D exist for single images only.")
        if pane.what == "mean":
            return self._stored(pane, chosen, None)
        spread = self.spread(pane)
        lines = spread[chosen] if pane.direction == "row" else spread[:, chosen].T
        return np.asarray(lines.mean(0, dtype=np.float64))

    def matrix(self, number: int, image: int | None, route: str | int) -> np.ndarray:
        """Return the whole attention of a layer, (tokens, tokens), of an image or the mean; of the model if not stored.

        Raises:
            MambaAttnError: neither the store nor the model has it.
        """
        layer = self.layers[number]
        if image is None:
            return np.asarray(self.store.mean(layer, route))
        its = self.images[image]
        return np.asarray(
            self.store.matrix(layer, its, route) if its.kept else self.live.matrix(its, layer.name, route)
        )

    def add(self, pixels: np.ndarray, name: str, picture: np.ndarray | None = None) -> int:
        """Run the model on another image, which joins the others, and return its number.

        Args:
            pixels: as the model sees it, (rows, columns, 3) uint8.
            name: of its file.
            picture: the same for the eye, larger.

        Raises:
            MambaAttnError: the model cannot be built.
        """
        with self._lock:
            image = Added(f"{name} (added {len(self.images) - len(self.store.images) + 1})", pixels, picture)
            image.predicted = self.live.predicted(image)
            self.images.append(image)
            return len(self.images) - 1

    def spread(self, pane: Pane) -> np.ndarray:
        """Return the standard deviation over images, (tokens, tokens) float32.

        Raises:
            UnavailableError: of a route, if only sums were collected.
        """
        layer, route = self.layer(pane), self.route(pane)

        def make() -> np.ndarray:
            try:
                return np.asarray(np.sqrt(self.store.variance(layer, route)), dtype=np.float32)
            except NotStoredError as error:
                raise UnavailableError(str(error)) from error

        return self._remember(("spread", layer.name, route), make)

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


def enlarged(transform: Any, picture: "Image") -> np.ndarray:
    """Return what a transform cuts out of a picture, in as many pixels as the picture has there, up to 512 a side.

    Raises:
        ValueError: the transform is a function, which makes one size.
    """
    finest = min(1 / axis.scale for axis in transform.axes(picture.height, picture.width))
    times = max(1.0, min(finest, _LARGEST / max(transform.size)))
    rows, columns = (round(times * side) for side in transform.size)
    return np.asarray(Transform.of(transform, size=(rows, columns)).pixels(picture))


def scans(layer: Any) -> bool:
    """Return whether a layer scans its tokens; softmax attention has no order."""
    return bool(layer.kind == ScanLayer.kind)


def others(layout: "TokenLayout") -> list[int]:
    """Return the tokens that are not patches, class tokens first."""
    return [*layout.class_tokens, *layout.registers]


def sheet_of(layout: "TokenLayout") -> tuple[int, int, int]:
    """Return rows and columns of the page's sheet of patches, and of a volume how many slices lie side by side, else 0.

    A text is one row. Slices fill all their rows, so that the sheet is as near as can be to three wide and two high.
    """
    if len(layout.grid) < 3:
        return layout.grid[0] if len(layout.grid) == 2 else 1, layout.grid[-1], 0
    high, wide = layout.grid[-2:]
    deep = math.prod(layout.grid[:-2])
    divisors = [count for count in range(1, deep + 1) if deep % count == 0]
    across = min(divisors, key=lambda count: abs(math.log(count * wide / (deep / count * high) / 1.5)))
    return deep // across * high, across * wide, across


def patches_of(layout: "TokenLayout") -> list[int]:
    """Return the tokens of the patches in the page's order: along the rows of the sheet."""
    rows, _, across = sheet_of(layout)
    patches = layout.patches.numpy()
    if across:
        high, wide = layout.grid[-2:]
        patches = patches.reshape(rows // high, across, high, wide).transpose(0, 2, 1, 3)
    found: list[int] = patches.ravel().tolist()
    return found


def tokens_of(layout: "TokenLayout", cells: Sequence[int]) -> list[int]:
    """Return the tokens of selected cells; cells outside the layout are left out.

    Args:
        layout: of the layer.
        cells: raster indices of patches; -1, -2, ... for the tokens that are not patches.
    """
    patches, rest = patches_of(layout), others(layout)
    return [
        *(patches[cell] for cell in cells if 0 <= cell < len(patches)),
        *(rest[-1 - cell] for cell in cells if 0 <= -1 - cell < len(rest)),
    ]


def _bands(tokens: int) -> int:
    return -(-tokens // _BAND)
