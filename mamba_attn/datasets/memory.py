"""Images of a user's program as a collection: a DataLoader, a tensor, Pillow images or files."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mamba_attn import images
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.samples import Data, Item, Regions, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

_MEMORY = "in memory"


class InMemory(Data):
    """Images without files.

    Args:
        pictures: uint8 (rows, columns, 3) as a model saw them, or Pillow images.
        keys: their names.
        labels: index into ``classes`` of each; None without.
        classes: names of the labels.
    """

    def __init__(
        self,
        pictures: "Sequence[np.ndarray | Image]",
        keys: Sequence[str],
        labels: Sequence[int | None],
        classes: Sequence[str],
    ) -> None:
        items = [Item(key, label) for key, label in zip(keys, labels, strict=True)]
        known = classes if any(label is not None for label in labels) else []
        super().__init__(_MEMORY, _MEMORY, items, classes=known)
        self._pictures = dict(zip(keys, pictures, strict=True))

    def load(self, index: int, transform: Transform) -> Sample:
        """Return one image, which has no truth, as a model sees it."""
        item = self.items[index]
        return Sample(item.key, self.pixels(index, transform), item.label, None, None)

    def pixels(self, index: int, transform: Transform) -> np.ndarray:
        """Return one image as a model sees it; a tensor was transformed already, so it is only resized."""
        picture = self._pictures[self.items[index].key]
        if not isinstance(picture, np.ndarray):
            return super().pixels(index, transform)
        if picture.shape[:2] == transform.size:
            return picture
        return images.crop(_image(picture), transform.size, interpolation=transform.interpolation, squash=True)

    def _picture(self, item: Item, range: tuple[float, float] | None) -> "Image":
        picture = self._pictures[item.key]
        return _image(picture) if isinstance(picture, np.ndarray) else picture

    def _regions(self, item: Item, picture: "Image", transform: Transform) -> Regions:
        return None, None


def as_data(given: Any, model: LoadedModel) -> Data:
    """Return a collection of images.

    Args:
        given: a selector of ``open_data``; a ``Data``; a tensor of the model's input (batch, colours, rows, columns);
            a list of files or Pillow images; or anything that yields tensors or (tensor, labels), such as a DataLoader.
        model: whose transform made the tensors, and whose classes the labels are.

    Raises:
        TypeError: something else.
        ValueError: no images; as ``open_data``.
    """
    if isinstance(given, Data):
        return given
    if isinstance(given, str | Path):
        return open_data(str(given))
    if not isinstance(given, Iterable):
        raise TypeError(
            f"data={type(given).__name__}: expected a folder or zip, a tensor, a list of images, or a DataLoader."
        )
    pictures: list[Any] = []
    keys: list[str] = []
    labels: list[int | None] = []
    for picture, key, label in _each(given, model.transform):
        pictures.append(picture)
        keys.append(key or f"{len(keys):06d}")
        labels.append(label)
    if not pictures:
        raise ValueError("data: it holds no images.")
    return InMemory(pictures, keys, labels, model.classes)


def _each(given: Iterable[Any], transform: Transform) -> Iterator[tuple[Any, str, int | None]]:
    """Yield pictures with their names and labels."""
    if isinstance(given, Tensor):
        given = [given]
    for batch in given:
        first, *rest = batch if isinstance(batch, tuple | list) and batch else (batch,)
        if isinstance(first, str | Path):
            yield images.read(first, range=transform.range), str(first), None
        elif hasattr(first, "convert"):
            yield first, "", _label(rest)
        elif isinstance(first, Tensor):
            shown = transform.pixels(first if first.ndim == 4 else first[None])
            known = rest[0].tolist() if rest and isinstance(rest[0], Tensor) and rest[0].ndim else [_label(rest)]
            for place, picture in enumerate(shown):
                yield picture, "", known[place] if len(known) == len(shown) else None
        else:
            raise TypeError(
                f"data: it yields {type(first).__name__}; expected tensors, (tensor, labels), Pillow images or files."
            )


def _label(rest: Sequence[Any]) -> int | None:
    return int(rest[0]) if rest and isinstance(rest[0], int | Tensor) else None


def _image(picture: np.ndarray) -> "Image":
    from PIL import Image

    return Image.fromarray(picture)
