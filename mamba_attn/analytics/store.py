"""AttentionStore: what ``mamba-attn collect`` kept of a model's attention, read from the disk as far as it is asked."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mamba_attn._types import Float
from mamba_attn.analytics import _embeddings
from mamba_attn.analytics._arrays import Arrays
from mamba_attn.analytics._models import Models
from mamba_attn.analytics._names import NotStoredError
from mamba_attn.analytics.index import Index, StoredImage, StoredLayer
from mamba_attn.analytics.projection import feature_size
from mamba_attn.core import notebook
from mamba_attn.errors import StoreError

_ROWS_AT_ONCE = 64
_PICTURES, _MAPS = 6, 12  # in a notebook


class AttentionStore(Models):
    """A store of collected attention.

    Attention is the signed mean over channels, or heads, in the token frame: row i is what token i reads. Layers are
    named by their name, their number or a ``StoredLayer``; images likewise; routes are "sum" or numbers.

    Args:
        folder: of the store.
        index: what it holds.

    Example:
        >>> store = AttentionStore.open("store")  # doctest: +SKIP
        >>> store.mean("layers.6.mixer", route=0).shape  # doctest: +SKIP
        (257, 257)
    """

    def __repr__(self) -> str:
        return f"AttentionStore({str(self.folder)!r}, {self.model_name}, {len(self.images)} images)"

    def _repr_html_(self) -> str:
        """In a notebook: some images, and per layer what the patch in the middle reads on average."""
        images = [notebook.photo(self.pixels(each), each.label or each.key, 72) for each in self.images[:_PICTURES]]
        maps = []
        for layer in self.layers[:_MAPS]:
            patches, (height, width) = layer.layout.patches.numpy(), layer.layout.grid
            middle = int(patches[height // 2 * width + width // 2])
            read = self.mean_row(layer, middle)[patches].reshape(height, width)
            maps.append(notebook.picture(read, f"stage {layer.stage}, block {layer.block}", 110))
        facts = {"images": len(self.images), "layers": len(self.layers), "folder": self.folder}
        reads = "<div>What the patch in the middle reads, mean of all images:</div>"
        return notebook.card(self.model_name, facts, notebook.row(images) + reads + notebook.row(maps))

    @classmethod
    def open(cls, path: str | Path, unfinished: bool = False) -> "AttentionStore":
        """Open a store for reading.

        Args:
            path: its folder.
            unfinished: take one that is half written, with the images that it counts.

        Raises:
            StoreError: there is none, or one that is half written, damaged or of another version.
            ImportError: zarr is not installed.
        """
        folder = Path(path).expanduser()
        index = Index.read(folder)
        if not index.images or not (index.finished or unfinished):
            how = f": {index.command}" if index.command else ""
            raise StoreError(
                f"{folder}: this store is half written: {len(index.images)} of {index.wanted} images are counted. "
                f"The same collect command goes on from there{how}; or open what there is with "
                "AttentionStore.open(path, unfinished=True)."
            )
        return cls(folder, index)

    @property
    def unreadable(self) -> dict[str, str]:
        """Reasons by key of images that could not be used."""
        return dict(self.index.unreadable)

    def mean(self, layer: StoredLayer | str | int, route: str | int = "sum") -> Float[np.ndarray, "tokens tokens"]:
        """Return the mean attention over the images, float64.

        Args:
            layer: of the model.
            route: "sum" of the routes, or the number of one.

        Raises:
            NotStoredError: no such layer or route, or routes were not collected.
            StoreError: the array is damaged.
        """
        return self._statistic("mean", layer, route, ...)

    def variance(self, layer: StoredLayer | str | int, route: str | int = "sum") -> Float[np.ndarray, "tokens tokens"]:
        """Return the variance of the attention over the images (divided by their number), float64; as ``mean``."""
        return self._statistic("m2", layer, route, ...) / len(self.index.images)

    def mean_row(
        self, layer: StoredLayer | str | int, token: int, route: str | int = "sum"
    ) -> Float[np.ndarray, " tokens"]:
        """Return what a token reads, on average; only the tiles that the row lies in are read.

        Raises:
            IndexError: no such token.
            NotStoredError: as ``mean``.
        """
        return self._statistic("mean", layer, route, (self._token(layer, token), slice(None)))

    def mean_column(
        self, layer: StoredLayer | str | int, token: int, route: str | int = "sum"
    ) -> Float[np.ndarray, " tokens"]:
        """Return where a token is read, on average; only the tiles that the column lies in are read.

        Raises:
            IndexError: no such token.
            NotStoredError: as ``mean``.
        """
        return self._statistic("mean", layer, route, (slice(None), self._token(layer, token)))

    def lines(
        self, layer: StoredLayer | str | int, start: int, stop: int, route: str | int = "sum", *,
        image: StoredImage | str | int | None = None, columns: bool = False,
    ) -> Float[np.ndarray, "lines tokens"]:  # fmt: skip
        """Return neighbouring rows of the mean, or of one image; only the tiles that they lie in are read.

        Args:
            layer: of the model.
            start: first token.
            stop: behind the last token.
            route: "sum" of the routes, or the number of one.
            image: one that is kept in full. Default: the mean over all.
            columns: return columns, one per token, instead of rows.

        Raises:
            IndexError: no such tokens.
            NotStoredError: as ``mean`` and ``matrix``.
        """
        if not 0 <= start < stop <= self.layer(layer).tokens:
            raise IndexError(f"tokens {start}..{stop}: expected some of 0..{self.layer(layer).tokens}.")
        where = (slice(None), slice(start, stop)) if columns else (slice(start, stop), slice(None))
        if image is None:
            found = self._statistic("mean", layer, route, where)
        else:
            found = self._matrix(layer, image, route, where)
        return found.T if columns else found

    def state_moments(
        self, layer: StoredLayer | str | int
    ) -> tuple[Float[np.ndarray, "routes channels length"], Float[np.ndarray, "routes channels length"]]:
        """Return the mean, and the mean square, of the state after every step, over images and states, in scan order.

        Args:
            layer: of selective scans.

        Raises:
            NotStoredError: softmax attention has no states.
        """
        number = self._number(layer)
        if self.index.layers[number].moments is None:
            raise NotStoredError(f"{self.index.layers[number].name}: softmax attention has no states.")
        mean, square = self._statistics.read(f"{number:03d}/moments")
        return mean, square

    def matrix(
        self, layer: StoredLayer | str | int, image: StoredImage | str | int, route: str | int = "sum"
    ) -> Float[np.ndarray, "tokens tokens"]:
        """Return the attention of one image, float32.

        Args:
            layer: of the model.
            image: one that is kept in full.
            route: "sum" of the routes, or the number of one.

        Raises:
            NotStoredError: no such layer, route or image, or an image that is not kept.
        """
        return self._matrix(layer, image, route, ())

    def pixels(self, image: StoredImage | str | int) -> np.ndarray:
        """Return what the model saw of an image, (height, width, 3) uint8.

        Raises:
            NotStoredError: there is no such image.
        """
        return self._rows.read("pixels", self.image(image).row)

    def features(self, layer: StoredLayer | str | int) -> Float[np.ndarray, "images features"]:
        """Return the summed matrix of every image as one row, float32: exact, or a projection that keeps distances.

        Args:
            layer: of the model.

        Raises:
            NotStoredError: there is no such layer.
        """
        size = feature_size(self.layer(layer).tokens)
        result = np.empty((len(self.index.images), size), np.float32)
        for start, rows in self.feature_rows(layer, _ROWS_AT_ONCE):
            result[start : start + len(rows)] = rows
        return result

    def feature_rows(self, layer: StoredLayer | str | int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Return ``features`` a few rows at a time, each time with the number of the first.

        Args:
            layer: of the model.
            rows: at most.

        Raises:
            NotStoredError: there is no such layer.
            StoreError: they are of another projection, or damaged.
        """
        number = self._number(layer)
        scale, count = np.float32(self.index.layers[number].scale), len(self.index.images)
        size = feature_size(self.index.layers[number].tokens)
        for start in range(0, count, rows):
            found = self._rows.read(f"features/{number:03d}", slice(start, min(start + rows, count)))
            if found.shape[1:] != (size,):
                raise StoreError(
                    f"{self.folder}: features of {self.index.layers[number].name} are {found.shape[1:]} numbers, those "
                    f"of this version {size}; they are of another projection: collect into a new folder."
                )
            yield start, found.astype(np.float32) / scale

    def embedding(self, key: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        """Return what was saved under a key, and what was said about it; None when there is nothing of these images.

        Args:
            key: everything that the embedding depends on but the images.

        Raises:
            StoreError: its file is damaged.
        """
        return _embeddings.load(self.folder / "embeddings", key, self.index.statistics)

    def save_embedding(self, key: str, array: np.ndarray, about: dict[str, Any] | None = None) -> None:
        """Save an array beside the store, in one step.

        Args:
            key: everything that it depends on but the images.
            array: of numbers.
            about: JSON values.

        Raises:
            OSError: the store cannot be written.
        """
        _embeddings.save(self.folder / "embeddings", key, self.index.statistics, array, about or {})

    @cached_property
    def _rows(self) -> Arrays:
        return Arrays(self.folder / "images")

    @cached_property
    def _statistics(self) -> Arrays:
        return Arrays(self.folder / self.index.statistics)

    def _statistic(self, what: str, layer: StoredLayer | str | int, route: str | int, selection: Any) -> np.ndarray:
        number = self._number(layer)
        return self._statistics.read(f"{number:03d}/{what}/{self._route(number, route)}", selection)

    def _matrix(
        self, layer: StoredLayer | str | int, image: StoredImage | str | int, route: str | int, where: tuple[Any, ...]
    ) -> np.ndarray:
        number, found = self._number(layer), self.image(image)
        name = self._route(number, route)
        if not found.kept:
            kept = sum(each.kept for each in self.index.images)
            raise NotStoredError(
                f"{found.key}: of this image no matrices are stored, only of {kept} others; collect with "
                f"keep=[{found.key!r}], or compute them: trace(store.model()), then layer.attention() or "
                "layer.row(token)."
            )
        return self._rows.read(f"matrices/{number:03d}/{name}", (found.row, *where))
