"""``store.json``: what a store is of, and which images are wanted; the images are in its parts.

It is written first, and again only when more images are wanted, or fewer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from types import UnionType
from typing import Any

import numpy as np

from mamba_attn.analytics.places import Place, read_object
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import StoreError

FORMAT = 2  # increase it when the format changes; stores of other formats, but the first, are refused
INDEX = "store.json"
_LARGEST = 2**30  # bytes of an index that is read; of the first format it holds all images


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A layer whose attention was collected.

    Args:
        name: in the model.
        kind: "selective scans" or "softmax attention".
        stage: of the model, from 0.
        block: in its stage, from 0.
        routes: scans of the layer; 1 for softmax attention.
        layout: where its tokens sit in the image.
        orders: (routes, length), the token that a route visits at each step, -1 for none; (routes, 0) where images
            differ.
        exact: whether features are matrices as they are, and no projections of them.
        scale: what exact features are multiplied with on the disk, a power of two, besides every row's own.
        moments: shape (routes, channels, length) of the states' moments, or None.

    Example:
        >>> layout = TokenLayout(grid=(8, 8), patch_size=8)
        >>> StoredLayer("layers.0.mixer", "selective scans", 0, 0, 2, layout, np.zeros((2, 64), int), exact=True).tokens
        64
    """

    name: str
    kind: str
    stage: int
    block: int
    routes: int
    layout: TokenLayout
    orders: np.ndarray
    exact: bool
    scale: float = 1.0
    moments: tuple[int, int, int] | None = None

    @property
    def tokens(self) -> int:
        """Side of the layer's matrices."""
        return self.layout.tokens

    def same_as(self, other: "StoredLayer") -> bool:
        """Whether both are the same layer of the same model, regardless of what was collected."""
        names = ("name", "kind", "routes", "layout", "moments")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and np.array_equal(self.orders, other.orders)


@dataclass(frozen=True)
class StoredImage:
    """An image that was counted.

    Args:
        key: its name in the collection.
        label: name of its class: the model's if the model has it, else the collection's; None without labels.
        predicted: name of the class with the highest score; None if the model has no classes.
        correct: whether that is the label; None if unknown.
        kept: whether its matrices are stored in full.
        row: its row in the store.

    Example:
        >>> image = StoredImage("hat/1.jpg", "hat", "shoe", correct=False, kept=True, row=0)
        >>> image.label, image.predicted
        ('hat', 'shoe')
    """

    key: str
    label: str | None
    predicted: str | None
    correct: bool | None
    kept: bool
    row: int


@dataclass
class Index:
    """``store.json``: the model, what is collected, and which images are wanted.

    Args:
        model: "name", "weights", "options", "fingerprint".
        classes: names of the model's.
        transform: "size", "cover", "interpolation".
        data: "name", "identity" and "path" of every collection.
        routes: "each" or "sum": whether routes are collected one by one.
        keep: number of first images whose matrices are kept in full, or keys of such images.
        layers: in execution order.
        part: images of a part.
        batch: images at once, on which the last digits depend.
        wanted: number of requested images, readable or not, after every request for more.
        command: the command that resumes the collection.
        package: version of this package.
        features: number of first images whose features and pixels are stored; of merged stores a number per part; None:
            of all.
    """

    model: dict[str, Any]
    classes: list[str]
    transform: dict[str, Any]
    data: list[dict[str, str]]
    routes: str
    keep: int | list[str]
    layers: list[StoredLayer]
    part: int
    batch: int
    wanted: list[int] = field(default_factory=list)
    command: str = ""
    package: str = ""
    features: int | list[int] | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, behind the last) of every part, in the order of the wanted images.

        Later requests for more images begin a new part: no part ever changes.
        """
        bounds = pairwise([0, *self.wanted])
        return [
            (at, min(at + self.part, stop)) for start, stop in bounds for at in range(start, stop, max(1, self.part))
        ]

    def keeps(self, place: int, key: str) -> bool:
        """Whether the matrices of an image are kept in full.

        Args:
            place: of the image among the wanted ones.
            key: of the image.
        """
        return place < self.keep if isinstance(self.keep, int) else key in self._kept_keys

    def featured(self, number: int) -> int:
        """Return how many of a part's images have features and pixels, if all are readable: its first ones.

        Args:
            number: of the part.
        """
        if isinstance(self.features, list):
            return self.features[number]
        start, stop = self.spans[number]
        return stop - start if self.features is None else min(max(0, self.features - start), stop - start)

    @cached_property
    def _kept_keys(self) -> frozenset[str]:
        return frozenset(self.keep if isinstance(self.keep, list) else ())

    def content(self) -> bytes:
        """Return what is written as ``store.json``."""
        layers = [{**asdict(layer), "orders": layer.orders.tolist()} for layer in self.layers]
        for layer in layers:
            layer["layout"].pop("tokens")
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        content = {"format": FORMAT, **own, "layers": layers, "package": package_version()}
        return json.dumps(content, allow_nan=False).encode()

    @classmethod
    def read(cls, where: Place) -> "Index":
        """Read the index of a store of this format.

        Raises:
            StoreError: it is missing, damaged, or of another version.
        """
        content = read_index(where)
        if content["format"] != FORMAT:
            raise StoreError(
                f"{where}: a store of format {content['format']}, which opens, and is not added to; "
                f"merge_stores([store], new), or merge= of the command, copies it into one of format {FORMAT}."
            )
        return cls.of(where, content)

    @classmethod
    def of(cls, where: Place, content: dict[str, Any]) -> "Index":
        """Return the index that ``store.json`` describes.

        Args:
            where: the store, for messages.
            content: of the file.

        Raises:
            StoreError: it is damaged.
        """
        try:
            return cls._from(dict(content))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{where}/{INDEX}: it is damaged ({error!r}); collect into a new folder.") from error

    @classmethod
    def _from(cls, content: dict[str, Any]) -> "Index":
        content.pop("format")
        layers = [_layer(dict(each)) for each in content.pop("layers")]
        index = cls(**content, layers=layers)
        expected: Mapping[str, type | UnionType] = {
            "model": dict,
            "classes": list,
            "transform": dict,
            "data": list,
            "keep": int | list,
            "routes": str,
            "part": int,
            "batch": int,
            "wanted": list,
            "features": int | list | None,
        }
        wrong = [name for name, kind in expected.items() if not isinstance(getattr(index, name), kind)]
        grows = all(before < after for before, after in pairwise([0, *index.wanted]))
        if wrong or index.part < 1 or not grows:
            raise ValueError(wrong or f"part={index.part}, wanted={index.wanted}")
        listed = index.features if isinstance(index.features, list) else [index.features or 0] * len(index.spans)
        if len(listed) != len(index.spans) or min(listed, default=0) < 0:
            raise ValueError(f"features={index.features}")
        return index


def read_index(where: Place) -> dict[str, Any]:
    """Read ``store.json`` of a store of this format, or of the first.

    Args:
        where: the store.

    Raises:
        StoreError: it is missing, damaged, or of another version.
    """
    if not where.there:
        raise StoreError(f"{where}: there is no such folder; make a store with mamba-attn collect.")
    try:
        text = read_object(where, INDEX, _LARGEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{where}: this folder is not a store of mamba-attn collect, or its {INDEX} is lost; choose another."
        ) from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{where}/{INDEX}: this is not JSON, or damaged ({error}); collect into a new folder."
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found not in (1, FORMAT) or isinstance(found, bool):
        raise StoreError(
            f"{where}/{INDEX}: a store of format {found!r}, and mamba_attn {package_version()} reads formats 1 to "
            f"{FORMAT}; collect into a new folder, or use the version that wrote it "
            f"({content.get('package', 'unknown') if isinstance(content, dict) else 'unknown'})."
        )
    return dict(content)


def place_of(names: Sequence[str], grids: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return (stage, block) of every layer, each pair once.

    They are the numbers in its name. Where these repeat, as in the encoder and decoder of a U-Net, stages are counted
    by what stands before the block's number; where that repeats too, or names hold other numbers, by changes of the
    grid.

    Args:
        names: of the layers, in execution order.
        grids: theirs.
    """
    numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in names]
    if len({len(each) for each in numbers}) == 1 and 1 <= len(numbers[0]) <= 2:
        blocks = [its[-1] for its in numbers]
        parts = [_before_last_number(name) for name in names]
        counted = [list(dict.fromkeys(parts)).index(part) for part in parts]
        for stages in ([its[0] if len(its) == 2 else 0 for its in numbers], counted):
            found = list(zip(stages, blocks, strict=True))
            if len(set(found)) == len(found):
                return found
    places: list[tuple[int, int]] = []
    for at, grid in enumerate(grids):
        stage, block = places[-1] if places else (0, -1)
        places.append((stage, block + 1) if not at or grid == grids[at - 1] else (stage + 1, 0))
    return places


def _before_last_number(name: str) -> str:
    parts = name.split(".")
    last = max(at for at, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[:last])


def package_version() -> str:
    """Return this package's version; "unknown" if it is not installed."""
    try:
        return version("mamba_attn")
    except PackageNotFoundError:
        return "unknown"


def _layer(content: dict[str, Any]) -> StoredLayer:
    found: dict[str, Any] = content.pop("layout")
    layout: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    orders = np.asarray(content.pop("orders"), dtype=np.int64)
    moments = content.pop("moments")
    layer = StoredLayer(
        **content, layout=TokenLayout(**layout), orders=orders, moments=None if moments is None else tuple(moments)
    )
    if orders.ndim != 2 or orders.shape[0] != layer.routes or not _within(orders, layer.tokens):
        raise ValueError(f"orders of {layer.name}")
    return layer


def _within(orders: np.ndarray, tokens: int) -> bool:
    return not orders.size or (int(orders.min()) >= -1 and int(orders.max()) < tokens)
