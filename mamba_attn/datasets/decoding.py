"""Decodes images in order, by a DataLoader whose processes read ahead while the model computes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mamba_attn import images
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.samples import Data

_AT_ONCE = 8  # images that a process hands over together


@dataclass(frozen=True)
class Decoded:
    """One image of a list.

    Args:
        place: in the list, from 0.
        key: its name in the collection.
        label: index into the collection's classes.
        pixels: uint8, before normalisation; or why it cannot be read.
    """

    place: int
    key: str
    label: int | None
    pixels: np.ndarray | str


class _Images(Dataset[Decoded]):
    def __init__(self, data: Data, numbers: Sequence[int], transform: Transform) -> None:
        self._data, self._numbers, self._transform = data, numbers, transform

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Decoded:
        item = self._data.items[self._numbers[place]]
        try:
            pixels: np.ndarray | str = self._data.pixels(self._numbers[place], self._transform)
        except images.ImageError as error:
            pixels = str(error)
        return Decoded(place, item.key, item.label, pixels)


def decoded(data: Data, numbers: Sequence[int], transform: Transform, workers: int) -> Iterator[Decoded]:
    """Yield images as a model sees them, in order.

    Args:
        data: the collection.
        numbers: indices of its items.
        transform: of the model.
        workers: processes that decode; 0: this one. Collections in memory are never sent to others.
    """
    found = _Images(data, numbers, transform)
    if not workers or not data.in_files or len(numbers) < 2 * _AT_ONCE:
        yield from (found[place] for place in range(len(found)))
        return
    # a list, because batches of arrays would be collated into tensors
    for group in DataLoader(found, batch_size=_AT_ONCE, num_workers=workers, collate_fn=list):
        yield from group
