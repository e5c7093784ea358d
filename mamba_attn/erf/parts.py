"""Effective receptive fields over many images in parts: each is saved as soon as it is measured, by whichever process.

The parts are merged in their order, so that no number depends on who measured what, or on how often it was stopped.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mamba_attn.analytics.places import LocalPlace
from mamba_attn.distributed import Ranks
from mamba_attn.erf.fields import FieldSum, ReceptiveField
from mamba_attn.images import ImageError

PART = 16  # images, which a kill loses at most
_VERSION = 1  # of the measurement; what older ones have saved is measured again


class FieldParts:
    """The receptive field of one model over images, in parts in a folder.

    Args:
        folder: where parts are saved.
        about: everything that the field depends on, JSON values: the model, the token, the images.
        images: functions that read an image, (1, colours, rows, columns); each may raise ``ImageError``.
        total: returns a sum of no images.
    """

    def __init__(
        self, folder: Path, about: Any, images: Sequence[Callable[[], Tensor]], total: Callable[[], FieldSum]
    ) -> None:
        text = json.dumps([_VERSION, PART, len(images), about], sort_keys=True, default=str)
        self.place = LocalPlace(folder / hashlib.sha256(text.encode()).hexdigest()[:20])
        self.images, self.total = images, total
        self._count = -(-len(images) // PART)

    def measure(self, ranks: Ranks, advance: Callable[[int], None] = lambda images: None) -> int:
        """Measure this process's share of the parts that are not saved; return how many are other processes'.

        Args:
            ranks: this process among all.
            advance: called with the number of images that were done, after every image.

        Raises:
            OSError: the folder cannot be written.
        """

        def make(number: int) -> None:
            images = self.images[number * PART : (number + 1) * PART]
            if self.place.exists(_name(number)):
                advance(len(images))
                return
            total, damaged = self.total(), []
            for read in images:
                try:
                    total.add(read())
                except ImageError as error:
                    damaged.append(str(error))
                advance(1)
            file = io.BytesIO()
            np.savez(file, damaged=np.array(json.dumps(damaged)), **total.arrays())  # type: ignore[arg-type]
            self.place.create(_name(number), file.getvalue())

        def missing() -> int:
            return self._count - len({*map(_name, range(self._count))} & {*self.place.names()})

        return ranks.work(f"erf {self.place.name}", self._count, make, missing)

    @property
    def damaged(self) -> list[str]:
        """Why images could not be read, once all parts are saved."""
        return [reason for number in range(self._count) for reason in json.loads(str(self._part(number)["damaged"]))]

    def result(self) -> ReceptiveField:
        """Return the field over all images, once all parts are saved.

        Raises:
            ValueError: no image could be read.
            NonFiniteError: every image gave NaN or Inf.
        """
        whole = self.total()
        for number in range(self._count):
            whole.merge(self._part(number))
        return whole.result()

    def _part(self, number: int) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(self.place.read(_name(number))), allow_pickle=False) as found:
            return dict(found)


def _name(number: int) -> str:
    return f"{number:06d}.npz"
