"""``store.json``: everything in a store but the arrays; written atomically, as the last step of every change."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import StoreError

FORMAT = 1  # increase it when the format changes; stores of other formats are refused
INDEX = "store.json"
_LARGEST = 2**28  # bytes of an index that is read: a million images
_STATISTICS = re.compile(r"statistics-\d{1,9}")


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
        scale: what exact features are multiplied with on the disk, a power of two.
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
    """``store.json``: the model, what was collected, and which images are counted.

    Args:
        model: "name", "weights", "options", "fingerprint".
        classes: names of the model's.
        transform: "size", "cover", "interpolation".
        data: "name" and "identity" of every collection.
        routes: "each" or "sum": whether routes were collected one by one.
        keep: number of first images whose matrices are kept in full, or keys of such images.
        layers: in execution order.
        images: the counted ones, in order.
        unreadable: reasons by key of images that could not be used.
        statistics: name of the folder with the statistics of exactly these images.
        wanted: number of requested images, readable or not.
        command: the command that resumes the collection.
        package: version of this package.
    """

    model: dict[str, Any]
    classes: list[str]
    transform: dict[str, Any]
    data: list[dict[str, str]]
    routes: str
    keep: int | list[str]
    layers: list[StoredLayer]
    images: list[StoredImage] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    statistics: str = ""
    wanted: int = 0
    command: str = ""
    package: str = ""

    @property
    def finished(self) -> bool:
        """Whether every requested image is counted, or known to be unreadable."""
        return bool(self.statistics) and len(self.images) + len(self.unreadable) >= self.wanted

    def keeps(self, row: int, key: str) -> bool:
        """Whether the matrices of an image are kept in full."""
        return row < self.keep if isinstance(self.keep, int) else key in self.keep

    def write(self, folder: Path) -> None:
        """Replace the index of a store in one step: a kill leaves the old one or the new one.

        Raises:
            OSError: it cannot be written.
        """
        layers = [{**asdict(layer), "orders": layer.orders.tolist()} for layer in self.layers]
        for layer in layers:
            layer["layout"].pop("tokens")
        images = [[i.key, i.label, i.predicted, i.correct, i.kept] for i in self.images]
        content = {"format": FORMAT, **vars(self), "layers": layers, "images": images, "package": package_version()}
        temporary = folder / f"{INDEX}.new"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / INDEX)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Read the index of a store.

        Raises:
            StoreError: it is missing, damaged, or of another version.
        """
        path = folder / INDEX
        if not folder.is_dir():
            raise StoreError(f"{folder}: there is no such folder; make a store with mamba-attn collect.")
        if not path.is_file():
            raise StoreError(
                f"{folder}: this folder is not a store of mamba-attn collect, or its {INDEX} is lost; choose another."
            )
        if path.stat().st_size > _LARGEST:
            raise StoreError(f"{path}: larger than {_LARGEST:,} bytes; this is not what mamba-attn collect wrote.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path}: this is not JSON, or damaged ({error}); collect into a new folder.") from error
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise StoreError(
                f"{path}: a store of format {found!r}, and mamba_attn {package_version()} reads format {FORMAT}; "
                "collect into a new folder, or use the version that wrote it "
                f"({content.get('package', 'unknown') if isinstance(content, dict) else 'unknown'})."
            )
        try:
            return cls._from(content)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: it is damaged ({error!r}); collect into a new folder.") from error

    @classmethod
    def _from(cls, content: dict[str, Any]) -> "Index":
        layers = [_layer(each) for each in content.pop("layers")]
        images = [_image(row, *each) for row, each in enumerate(content.pop("images"))]
        index = cls(**content, layers=layers, images=images)
        expected: Mapping[str, type | UnionType] = {
            "model": dict,
            "classes": list,
            "transform": dict,
            "data": list,
            "unreadable": dict,
            "statistics": str,
            "wanted": int,
            "keep": int | list,
            "routes": str,
        }
        wrong = [name for name, kind in expected.items() if not isinstance(getattr(index, name), kind)]
        wrong += [f"image {image.row}" for image in images if not isinstance(image.key, str)]
        if wrong or (index.statistics and not _STATISTICS.fullmatch(index.statistics)):
            raise ValueError(wrong or index.statistics)
        return index


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


def _image(
    row: int, key: str, label: str | None, predicted: str | None, correct: bool | None, kept: bool
) -> StoredImage:
    return StoredImage(key, label, predicted, correct, kept, row)


def _within(orders: np.ndarray, tokens: int) -> bool:
    return not orders.size or (int(orders.min()) >= -1 and int(orders.max()) < tokens)
