"""Reads rows and regions of stored attention lazily, and runs the model where none is stored."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_attn import images
from mamba_attn.analytics.index import StoredImage
from mamba_attn.core.transform import Transform
from mamba_attn.errors import MambaAttnError
from mamba_attn.viewer.errors import UnavailableError
from mamba_attn.viewer.live import Live
from mamba_attn.viewer.state import Pane

if TYPE_CHECKING:
    from PIL.Image import Image

    from mamba_attn.core.layout import TokenLayout

_LARGEST = 512  # side of a picture for the eye, in pixels
_REMEMBERED = 256 * 2**20  # bytes of matrices and pictures
_BAND = 256  # rows, or columns, read at once: zarr unpacks whole tiles, so fewer would cost as much


@dataclass(frozen=True, eq=False)
class Shown(StoredImage):
    """An image or a text that no store on a disk holds.

    Args:
        pixels: as the model sees it, (rows, columns, 3) uint8; None: the store knows, and a text has none.
        picture: the same for the eye, larger.
        words: tokens of a text.
    """

    pixels: np.ndarray | None = None
    picture: np.ndarray | None = None
    words: tuple[str, ...] | None = None


class Source:
    """One store, with a cache of what is read repeatedly.

    Args:
        store: an ``AttentionStore``.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self.layers = list(store.layers)
        # features and pixels are of these alone; the others count in the statistics
        self.images = [store.images[number] for number in featured(store)]
        self.featured = len(self.images)
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
        if isinstance(image, Shown) and (image.words or image.pixels is not None):
            return image.pixels
        return self._remember(("pixels", image), lambda: np.asarray(self.store.pixels(image)))

    def picture(self, pane: Pane) -> np.ndarray | None:
        """Return the pane's image for the eye: cut from its file as for the model, but larger, where the file is there.

        The file counts only if the model's own picture of it is the one that is stored. None of a text.
        """
        pixels, image = self.pixels(pane), self.image(pane)
        if pixels is None or isinstance(image, Shown):
            return pixels if image.picture is None else image.picture
        return self._remember(("picture", image), lambda: self._original(image.key, pixels))

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
        its = replace(pane, what="mean")
        return np.concatenate([self._band(its, start) for start in range(0, self.layer(pane).layout.tokens, _BAND)])

    def read(self, pane: Pane, tokens: Sequence[int]) -> np.ndarray:
        """Return the mean of some tokens' rows, or columns, of the attention that a pane shows: (tokens,).

        Args:
            pane: which attention.
            tokens: of the layer's token frame; empty means all.

        Raises:
            UnavailableError: gate or D of a mean: only images have them.
            MambaAttnError: a mean or spread that was not collected, an image that is not stored, and a model that
                cannot run.
        """
        layer, image = self.layer(pane), self._single(pane)
        chosen = list(tokens) or list(range(layer.layout.tokens))
        if image is None and (pane.gate or pane.skip):
            raise UnavailableError("Gate and D exist for single images only.")
        if image is not None and (pane.gate or pane.skip or not image.kept):
            return self.live.read(image, layer.name, chosen, self.route(pane), pane)
        if len(chosen) < layer.layout.tokens:
            return self._mean_line(pane, chosen)
        return self._remember(("all", *self._key(pane)), lambda: self._mean_line(pane, chosen))

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

    def spread(self, pane: Pane) -> np.ndarray:
        """Return the standard deviation over images, (tokens, tokens) float32.

        Raises:
            MambaAttnError: of a route, if only sums were collected.
        """
        layer, route = self.layer(pane), self.route(pane)
        key = ("spread", layer.name, route)
        return self._remember(key, lambda: np.sqrt(self.store.variance(layer, route), dtype=np.float32))

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
            key = f"{name} (added {len(self.images) - self.featured + 1})"
            predicted = self.live.predicted(pixels)
            self.images.append(Shown(key, None, predicted, None, False, -1, pixels, picture))
            return len(self.images) - 1

    def _single(self, pane: Pane) -> Any:
        """The image whose own attention the pane shows; None of a mean or spread."""
        return self.image(pane) if pane.what == "image" else None

    def _key(self, pane: Pane) -> tuple[Hashable, ...]:
        return pane.what, self.layer(pane).name, self.route(pane), pane.direction, self._single(pane)

    def _mean_line(self, pane: Pane, tokens: list[int]) -> np.ndarray:
        found = np.zeros(self.layer(pane).layout.tokens)
        for start in sorted({token - token % _BAND for token in tokens}):
            its = [token - start for token in tokens if start <= token < start + _BAND]
            found += self._band(pane, start)[its].sum(axis=0, dtype=np.float64)
        return found / len(tokens)

    def _band(self, pane: Pane, start: int) -> np.ndarray:
        """A band of neighbouring lines, (lines, tokens) float32."""
        layer, columns = self.layer(pane), pane.direction == "column"
        stop = min(start + _BAND, layer.layout.tokens)

        def lines() -> np.ndarray:
            if pane.what == "spread":
                spread = self.spread(pane)
                found = spread[:, start:stop].T if columns else spread[start:stop]
            else:
                image = self._single(pane)
                found = self.store.lines(layer, start, stop, self.route(pane), image=image, columns=columns)
            return np.ascontiguousarray(found, dtype=np.float32)

        return self._remember(("band", start, *self._key(pane)), lines)

    def _remember(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > _REMEMBERED:
                self._kept.popitem(last=False)
            return self._kept[key]


def featured(store: Any) -> Sequence[int]:
    """Return the numbers of a store's images that can be shown: those with features and pixels.

    Args:
        store: an ``AttentionStore``, or what has its interface; without ``featured``, of all images.
    """
    found: Sequence[int] = getattr(store, "featured", range(len(store.images)))
    return found


def enlarged(transform: Any, picture: "Image") -> np.ndarray:
    """Return what a transform cuts out of a picture, in as many pixels as the picture has there, up to 512 a side.

    Raises:
        ValueError: the transform is a function, which makes one size.
    """
    finest = min(1 / axis.scale for axis in transform.axes(picture.height, picture.width))
    times = max(1.0, min(finest, _LARGEST / max(transform.size)))
    rows, columns = (round(times * side) for side in transform.size)
    return np.asarray(Transform.of(transform, size=(rows, columns)).pixels(picture))


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


def cells_of(layout: "TokenLayout") -> list[int]:
    """Return all tokens in the page's order: patches, class tokens, registers."""
    return [*patches_of(layout), *others(layout)]


def tokens_of(layout: "TokenLayout", cells: Sequence[int]) -> list[int]:
    """Return the tokens of selected cells; cells outside the layout are left out.

    Args:
        layout: of the layer.
        cells: raster indices of patches; -1, -2, ... for the tokens that are not patches.
    """
    patches, rest = patches_of(layout), others(layout)
    kinds = ((patches, cell) if cell >= 0 else (rest, -1 - cell) for cell in cells)
    return [of[at] for of, at in kinds if at < len(of)]
