"""The interface of test images: names and labels at once, an image with its truth on demand.

The truth, boxes or masks, is transformed like the image: it lies in the pixels that a model sees.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mamba_attn._types import Float
from mamba_attn.core.transform import Transform

if TYPE_CHECKING:
    from PIL.Image import Image


HALVES = ("choose", "report")
Regions = tuple[torch.Tensor | None, torch.Tensor | None]  # the truth, and the distractor


@dataclass(frozen=True)
class Sample:
    """One image as a model sees it.

    Args:
        key: its name in the collection.
        pixels: uint8, before normalisation.
        label: index into the collection's classes.
        inside: the fraction of every pixel that belongs to the object, in 0..1; None if unknown.
        distractor: the same for a distractor that resembles the object.

    Example:
        >>> Sample("hat/1.jpg", np.zeros((32, 32, 3), np.uint8), label=0, inside=None, distractor=None).key
        'hat/1.jpg'
    """

    key: str
    pixels: np.ndarray
    label: int | None
    inside: Float[torch.Tensor, "rows columns"] | None
    distractor: Float[torch.Tensor, "rows columns"] | None


@dataclass(frozen=True)
class Item:
    """An image's entry in a collection, before it is read.

    Args:
        key: its name in the collection.
        label: index into the collection's classes.
        boxes: (x0, y0, x1, y1) of its objects, in pixels of the file; as read, and checked with the image.
        mask: the name of its mask.
        values: of the mask's pixels that are the object.
        distractors: of those that only resemble it.

    Example:
        >>> Item("hat/1.jpg", label=0, boxes=[(4, 8, 60, 72)]).label
        0
    """

    key: str
    label: int | None = None
    boxes: Any = None
    mask: str | None = None
    values: frozenset[int] = frozenset({1})
    distractors: frozenset[int] = frozenset()


class Data(ABC):
    """A collection of test images, in the order of their names' hashes: any first part of it is a fair sample.

    Args:
        name: to display.
        identity: key of stored results.
        items: all images, in any order.
        classes: names by label; empty without labels.
        imagenet: ImageNet-1k index by label, if the collection has it.
        truth: "boxes", "masks" or "".
        note: what a reader must know to interpret its figures.

    Example:
        >>> from mamba_attn.datasets import open_data
        >>> from mamba_attn.images import SAMPLES
        >>> data = open_data(str(SAMPLES))
        >>> len(data), data.load(0, Transform((64, 64))).pixels.shape
        (6, (64, 64, 3))
    """

    def __init__(
        self,
        name: str,
        identity: str,
        items: Sequence[Item],
        *,
        classes: Sequence[str] = (),
        imagenet: Sequence[int] | None = None,
        truth: str = "",
        note: str = "",
    ) -> None:
        self.name, self.truth, self.note, self._identity = name, truth, note, identity
        self.path = ""  # where the files are, below which keys are paths; "" where they are in no folder
        self.in_files = False  # whether other processes can read the images too
        self.items = sorted(items, key=lambda item: (_digest(item.key), item.key))
        self.classes, self.imagenet = list(classes), None if imagenet is None else list(imagenet)

    @property
    def identity(self) -> str:
        """Key of stored results: equal for the same images, wherever they lie."""
        return self._identity

    def identity_of(self, index: int) -> str:
        """Return the key of stored results of one image: equal as long as it is unchanged.

        Args:
            index: of the image.
        """
        return f"{self.identity}\0{self.items[index].key}"

    def __len__(self) -> int:
        return len(self.items)

    def chosen(self, half: str = "all", limit: int | None = None) -> list[int]:
        """Return the indices of a half, or the first of them.

        Args:
            half: "choose", "report" or "all".
            limit: at most this number.
        """
        found = [index for index, item in enumerate(self.items) if half == "all" or half_of(item.key) == half]
        return found[:limit]

    def load(self, index: int, transform: Transform) -> Sample:
        """Read one image, and its truth, as a model sees them.

        Raises:
            ImageError: the file, or its mask, is damaged or absent.
        """
        item = self.items[index]
        picture = self._picture(item, transform.range)
        inside, distractor = self._regions(item, picture, transform)
        return Sample(item.key, transform.pixels(picture), item.label, inside, distractor)

    def pixels(self, index: int, transform: Transform) -> np.ndarray:
        """Read one image without its truth, as a model sees it.

        Raises:
            ImageError: the file is damaged or absent.
        """
        return transform.pixels(self._picture(self.items[index], transform.range))

    @abstractmethod
    def _picture(self, item: Item, range: tuple[float, float] | None) -> "Image":
        """Read the image, 8-bit RGB; ``range`` as in ``images.read``."""

    @abstractmethod
    def _regions(self, item: Item, picture: "Image", transform: Transform) -> Regions:
        """Return its truth in the pixels of the transformed image."""


def half_of(key: str) -> str:
    """Return the half that an image belongs to, from its name: one for choosing methods, one for reporting.

    Args:
        key: the image's name in its collection.

    Example:
        >>> half_of("hat/1.jpg") in HALVES
        True
    """
    return HALVES[_digest(key)[-1] % 2]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def box_coverage(
    boxes: Sequence[Sequence[float]], image: tuple[int, int], transform: Transform
) -> Float[torch.Tensor, "rows columns"]:
    """Return the fraction of every pixel of the transformed image that lies in the boxes, in 0..1.

    Where several boxes share an edge pixel the largest part counts.

    Args:
        boxes: (x0, y0, x1, y1) each, in pixels of the image.
        image: its (rows, columns).
        transform: of the model.

    Raises:
        ValueError: the transform is a function.
    """
    axes = transform.axes(*image)
    whole = torch.zeros(transform.size)
    for x0, y0, x1, y1 in boxes:
        parts = [
            _covered(low * axis.scale - axis.cut, high * axis.scale - axis.cut, length)
            for (low, high), axis, length in zip(((y0, y1), (x0, x1)), axes, transform.size, strict=True)
        ]
        whole = torch.maximum(whole, parts[0][:, None] * parts[1])
    return whole


def transformed_mask(mask: "Image", transform: Transform) -> np.ndarray:
    """Return a mask as the model sees its image, (rows, columns): the value of the nearest pixel, never a mixture.

    Args:
        mask: 8-bit grey, the image's size; its values are numbers of regions.
        transform: of the model.
    """
    transform.axes(mask.height, mask.width)  # raises where it is a function
    return replace(transform, interpolation="nearest").pixels(mask)[..., 0]


def _covered(low: float, high: float, length: int) -> torch.Tensor:
    """Return the fraction of each unit interval from 0 on that lies between two numbers."""
    start = torch.arange(length, dtype=torch.float32)
    return ((start + 1).clamp(max=high) - start.clamp(min=low)).clamp(min=0)
