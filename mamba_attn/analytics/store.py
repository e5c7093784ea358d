"""AttentionStore: reads from disk, on demand, what ``mamba-attn collect`` kept of a model's attention."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mamba_attn._types import Float
from mamba_attn.analytics import rebuild
from mamba_attn.analytics.contents import Contents
from mamba_attn.analytics.index import Index, StoredImage, StoredLayer
from mamba_attn.analytics.part_writer import route_names
from mamba_attn.analytics.parts import Images
from mamba_attn.analytics.places import LocalPlace, Place, place, read_object
from mamba_attn.analytics.projection import feature_size
from mamba_attn.core import notebook
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.errors import StoreError, nearest

_ROWS_AT_ONCE = 64
_PICTURES, _MAPS = 6, 12  # in a notebook
_LARGEST_EMBEDDING = 2**30  # bytes of a file that is read


class NotStoredError(StoreError, KeyError):
    """The store does not hold this layer, route, image, or image's matrices.

    Example:
        >>> try:
        ...     AttentionStore.open("store").matrix(0, 0)  # doctest: +SKIP
        ... except NotStoredError as error:
        ...     print(error)
    """

    __str__ = RuntimeError.__str__  # KeyError would print the repr of the sentence


class AttentionStore:
    """A store of collected attention.

    Attention is the signed mean over channels, or heads, in the token frame: row i is what token i reads. Refer to
    layers by name, number or ``StoredLayer``, to images by key, number or ``StoredImage``; routes are "sum" or numbers.

    Args:
        contents: what it holds.
        given: its model, where the user has it.

    Example:
        >>> store = AttentionStore.open("store")  # doctest: +SKIP
        >>> store.mean("layers.6.mixer", route=0).shape  # doctest: +SKIP
        (257, 257)
    """

    def __init__(self, contents: Contents, given: LoadedModel | None = None) -> None:
        self._contents, self._given = contents, given

    def __repr__(self) -> str:
        return f"AttentionStore({str(self.folder)!r}, {self.model_name}, {len(self.images)} images)"

    def _repr_html_(self) -> str:
        """Show in a notebook some images, and per layer what the middle patch reads on average."""
        shown = [self.image(row) for row in self.featured[:_PICTURES]]
        images = [notebook.photo(self.pixels(each), each.label or each.key, 72) for each in shown]
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
    def open(
        cls, path: str | Path | Place, unfinished: bool = False, *, model: LoadedModel | nn.Module | None = None
    ) -> "AttentionStore":
        """Open a store for reading.

        Args:
            path: its folder, or its address in object storage.
            unfinished: also open a half-written store, with the images that it counts.
            model: the one that it was collected from, where that was made in memory or by your own code.

        Raises:
            StoreError: the store is missing, half written, damaged or of another version.
            ImportError: zarr is not installed.
        """
        contents = Contents.open(place("store", path))
        index = contents.index
        if not len(contents.parts) or not (contents.finished or unfinished):
            how = f": {index.command}" if index.command else ""
            raise StoreError(
                f"{contents.place}: this store is half written: {len(contents.parts)} of {index.wanted[-1]} images are "
                f"counted. The same collect command resumes from there{how}; or open what there is with "
                "AttentionStore.open(path, unfinished=True)."
            )
        given = model if model is None or isinstance(model, LoadedModel) else LoadedModel(model)
        if given is not None:
            given = rebuild.trained(contents.place, index, given)
        if given is not None and given.transform is None:
            given.transform = rebuild.transform_of(index)
        return cls(contents, given)

    @property
    def folder(self) -> Path | Place:
        """Where it is: a path, or a place in object storage, whose text is its address."""
        where = self._contents.place
        return where.path if isinstance(where, LocalPlace) else where

    @property
    def index(self) -> Index:
        """What it is of: ``store.json``."""
        return self._contents.index

    @property
    def layers(self) -> list[StoredLayer]:
        """The layers, in execution order."""
        return list(self.index.layers)

    @property
    def images(self) -> Images:
        """The images that are counted, a sequence; parts of a large store are read when they are needed."""
        return self._contents.images

    @property
    def featured(self) -> Sequence[int]:
        """Numbers of the images whose features and pixels are stored, as a rule those of the first 10,000."""
        return self._contents.featured

    @property
    def unreadable(self) -> dict[str, str]:
        """Reasons by key of images that could not be used."""
        return self._contents.parts.unreadable

    def layer(self, layer: StoredLayer | str | int) -> StoredLayer:
        """Return a layer.

        Args:
            layer: the layer, its name, or its number; negative numbers count from the last.

        Raises:
            NotStoredError: there is no such layer.
        """
        return self.index.layers[self._number(layer)]

    def image(self, image: StoredImage | str | int) -> StoredImage:
        """Return an image.

        Args:
            image: the image, its key, or its number.

        Raises:
            NotStoredError: there is no such image.
        """
        if isinstance(image, StoredImage):
            image = image.key
        number = image if isinstance(image, int) else self._rows_by_key.get(image, -1)
        parts = self._contents.parts  # not `images`: its part is read, and no other
        if not 0 <= number < len(parts):
            hint = nearest(image, self._rows_by_key) if isinstance(image, str) else ""
            raise NotStoredError(f"{self.folder}: it holds no image {image!r} of {len(parts)}. {hint}".rstrip())
        return parts.image(number)

    @property
    def model_name(self) -> str:
        """Name of the model."""
        return str(self.index.model["name"])

    @property
    def classes(self) -> list[str]:
        """Names of the model's classes."""
        return list(self.index.classes)

    @property
    def transform(self) -> Transform:
        """The transform from an image to the model's input."""
        return rebuild.transform_of(self.index) if self._given is None else self._given.transform

    @cached_property
    def subject(self) -> LoadedModel:
        """The model with its classes and transform, rebuilt from the store's record; see ``model``."""
        return rebuild.trained(self.folder, self.index, self._given)

    def untrained(self, seed: int = 0) -> LoadedModel:
        """Return a model of the same name and options with random weights; its own weights are not needed.

        A model built by your own code is built again by it, if it was given to ``open``.

        Args:
            seed: of the weights.

        Raises:
            StoreError: the name is not a known model, or the options build one with other layers.
        """
        return rebuild.untrained(self.folder, self.index, seed, self._given)

    def with_weights(self, weights: str | Path) -> LoadedModel:
        """Return a model of the same name and options with other weights, as of another seed of training.

        Args:
            weights: the file.

        Raises:
            StoreError: the name is not a known model, or the options build one with other layers.
            WeightsError: the file is not there, or not of this model.
        """
        return rebuild.with_weights(self.folder, self.index, weights)

    def reordered(self, order: str) -> LoadedModel:
        """Return the model with its weights, its scans in another order than it was trained in.

        Args:
            order: one of ``mamba_attn.orders.ORDERS``.

        Raises:
            StoreError: as ``model``; or the model has no scan order.
            WeightsError: the weights' file is gone.
        """
        return rebuild.reordered(self.folder, self.index, order)

    def model(self) -> nn.Module:
        """Return the model, in eval mode.

        Raises:
            StoreError: its weights are not in a file, or the file has changed.
            WeightsError: the file is gone.
        """
        return self.subject.model

    def mean(self, layer: StoredLayer | str | int, route: str | int = "sum") -> Float[np.ndarray, "tokens tokens"]:
        """Return the mean attention over the images, float64.

        Args:
            layer: of the model.
            route: "sum" of the routes, or the number of one.

        Raises:
            NotStoredError: no such layer or route, or routes were not collected.
            StoreError: the array is damaged.
        """
        return self._mean(layer, route, ...)

    def variance(self, layer: StoredLayer | str | int, route: str | int = "sum") -> Float[np.ndarray, "tokens tokens"]:
        """Return the variance of the attention over the images (divided by their number), float64; as ``mean``."""
        number = self._number(layer)
        squares = self._contents.statistics.squares(number, self._route(number, route))
        variance: np.ndarray = squares / len(self.images)
        return variance

    def mean_row(
        self, layer: StoredLayer | str | int, token: int, route: str | int = "sum"
    ) -> Float[np.ndarray, " tokens"]:
        """Return what a token reads, on average; only the tiles that the row lies in are read.

        Raises:
            IndexError: no such token.
            NotStoredError: as ``mean``.
        """
        return self._mean(layer, route, (self._token(layer, token), slice(None)))

    def mean_column(
        self, layer: StoredLayer | str | int, token: int, route: str | int = "sum"
    ) -> Float[np.ndarray, " tokens"]:
        """Return where a token is read, on average; only the tiles that the column lies in are read.

        Raises:
            IndexError: no such token.
            NotStoredError: as ``mean``.
        """
        return self._mean(layer, route, (slice(None), self._token(layer, token)))

    def lines(
        self,
        layer: StoredLayer | str | int,
        start: int,
        stop: int,
        route: str | int = "sum",
        *,
        image: StoredImage | str | int | None = None,
        columns: bool = False,
    ) -> Float[np.ndarray, "lines tokens"]:
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
        found = self._mean(layer, route, where) if image is None else self._matrix(layer, image, route, where)
        return found.T if columns else found

    def state_moments(
        self, layer: StoredLayer | str | int
    ) -> tuple[Float[np.ndarray, "routes channels length"], Float[np.ndarray, "routes channels length"]]:
        """Return the mean, and the mean square, of the state after every step, over images and states, in scan order.

        Args:
            layer: a layer of selective scans.

        Raises:
            NotStoredError: softmax attention has no states.
        """
        number = self._number(layer)
        if self.index.layers[number].moments is None:
            raise NotStoredError(f"{self.index.layers[number].name}: softmax attention has no states.")
        mean, square = self._contents.statistics.moments(number)
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
            NotStoredError: there is no such image, or it counts in the statistics alone.
        """
        row = self._row(image)
        at, own = self._contents.parts.of_row(row)
        if own >= self._contents.parts.featured(at):
            raise NotStoredError(
                f"{self.image(row).key}: this store has features and pixels of {len(self.featured)} of "
                f"{len(self.images)} images, and not of this one, which counts in the statistics alone; collect with "
                "features='all' into a new folder."
            )
        return self._contents.arrays(at).read("pixels", own)

    def features(self, layer: StoredLayer | str | int) -> Float[np.ndarray, "images features"]:
        """Return the summed matrix of every image as one row, float32: exact, or a projection that keeps distances.

        Rows are the images of ``featured``.

        Args:
            layer: of the model.

        Raises:
            NotStoredError: there is no such layer.
        """
        size = feature_size(self.layer(layer).tokens)
        result = np.empty((len(self.featured), size), np.float32)
        for start, rows in self.feature_rows(layer, _ROWS_AT_ONCE):
            result[start : start + len(rows)] = rows
        return result

    def feature_rows(self, layer: StoredLayer | str | int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Return ``features`` a few rows at a time, each time with the number of the first among them.

        Args:
            layer: of the model.
            rows: at most.

        Raises:
            NotStoredError: there is no such layer.
            StoreError: they are of another projection, or damaged.
        """
        number = self._number(layer)
        scale, name = np.float32(self.index.layers[number].scale), f"features/{number:03d}"
        size = feature_size(self.index.layers[number].tokens)
        start = 0
        for arrays, count in self._contents.row_groups():
            for own in range(0, count, rows):
                part = slice(own, min(own + rows, count))
                found = arrays.read(name, part)
                if found.shape[1:] != (size,):
                    raise StoreError(
                        f"{self.folder}: features of {self.index.layers[number].name} are {found.shape[1:]} numbers, "
                        f"those of this version {size}; they are of another projection: collect into a new folder."
                    )
                each = arrays.read("scales", (part, slice(number, number + 1))) if arrays.exists("scales") else 1
                yield start + own, found.astype(np.float32) / (scale * each)
            start += count

    def embedding(self, key: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        """Return what was saved under a key, with its ``about``; None if nothing was saved for these images.

        Args:
            key: everything that the embedding depends on except the images.

        Raises:
            StoreError: its file is damaged.
        """
        where, name = self._contents.place, self._embedding_name(key)
        if not where.exists(name):
            return None
        try:
            with np.load(io.BytesIO(read_object(where, name, _LARGEST_EMBEDDING)), allow_pickle=False) as content:
                said, array = json.loads(str(content["said"])), content["array"]
            fits = said["key"] == key and said["statistics"] == self._contents.signature
            return (array, dict(said["about"])) if fits else None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise StoreError(f"{where}/{name}: it is damaged ({error}); delete this file.") from error

    def save_embedding(self, key: str, array: np.ndarray, about: dict[str, Any] | None = None) -> None:
        """Save an array in the store's folder, in one step.

        Args:
            key: everything that it depends on except the images.
            array: of numbers.
            about: JSON values.

        Raises:
            OSError: the store cannot be written.
        """
        content = io.BytesIO()
        said = json.dumps({"key": key, "statistics": self._contents.signature, "about": about or {}})
        np.savez(content, array=array, said=np.array(said))
        self._contents.place.replace(self._embedding_name(key), content.getvalue())

    def _embedding_name(self, key: str) -> str:
        return f"embeddings/{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

    def _mean(self, layer: StoredLayer | str | int, route: str | int, selection: Any) -> np.ndarray:
        number = self._number(layer)
        return self._contents.statistics.mean(number, self._route(number, route), selection)

    def _row(self, image: StoredImage | str | int) -> int:
        return image.row if isinstance(image, StoredImage) else self.image(image).row

    def _matrix(
        self, layer: StoredLayer | str | int, image: StoredImage | str | int, route: str | int, where: tuple[Any, ...]
    ) -> np.ndarray:
        number, found = self._number(layer), self.image(image)
        name = self._route(number, route)
        if not found.kept:
            kept = sum(each.kept for each in self.images)
            raise NotStoredError(
                f"{found.key}: no matrices are stored for this image, only for {kept} others; collect with "
                f"keep=[{found.key!r}], or compute them: trace(store.model()), then layer.attention() or "
                "layer.row(token)."
            )
        rows, own = self._contents.rows(found.row)
        return rows.read(f"matrices/{number:03d}/{name}", (own, *where))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {layer.name: number for number, layer in enumerate(self.index.layers)}

    @cached_property
    def _rows_by_key(self) -> dict[str, int]:
        return {image.key: image.row for image in self.images}

    def _number(self, layer: StoredLayer | str | int) -> int:
        name = layer.name if isinstance(layer, StoredLayer) else layer
        count = len(self.index.layers)
        number = name if isinstance(name, int) and not isinstance(name, bool) else self._numbers.get(str(name), count)
        if not -count <= number < count:
            hint = nearest(name, self._numbers) if isinstance(name, str) else f"It has {count}, 0..{count - 1}."
            raise NotStoredError(f"{self.folder}: it holds no layer {name!r}. {hint}")
        return number % count

    def _route(self, number: int, route: str | int) -> str:
        """Return the route's name on disk; the only route of a layer is the sum."""
        layer = self.index.layers[number]
        if layer.routes == 1 and route == 0:
            return "sum"
        if str(route) not in route_names(layer, self.index.routes):
            collected = self.index.routes == "each"
            expected = f"'sum' or 0..{layer.routes - 1}" if collected else "'sum': it was collected with routes='sum'"
            raise NotStoredError(f"{layer.name}: no route {route!r}; expected {expected}.")
        return str(route)

    def _token(self, layer: StoredLayer | str | int, token: int) -> int:
        tokens = self.layer(layer).tokens
        if not 0 <= token < tokens:
            raise IndexError(f"token {token!r}: expected the index of a token, 0..{tokens - 1}.")
        return token
