"""Effective receptive fields over many images in parts: each is saved as soon as it is measured, by whichever process.

The parts are merged in their order, so that no number depends on who measured what, or on how often it was stopped. A
part is named by its images: whoever asks for more of them, or for fewer, finds the same parts.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mamba_attn.analytics.places import LocalPlace
from mamba_attn.distributed import Ranks
from mamba_attn.erf.fields import FieldSum, ReceptiveField
from mamba_attn.images import ImageError

PART = 16  # images, which a kill loses at most
QUESTIONS = 4  # models, tokens and layers whose parts stay in a folder: those used last
_VERSION = 2  # of the measurement; what older ones have saved is measured again


class FieldParts:
    """The receptive field of one model over images, in parts in a folder.

    Args:
        folder: where parts are saved.
        about: everything that the field depends on but the images, JSON values: the model, the token.
        identities: what each image is, a text that changes with the image.
        images: functions that read an image, (1, colours, rows, columns); each may raise ``ImageError``.
        total: returns a sum of no images.
    """

    def __init__(
        self,
        folder: Path,
        about: Any,
        identities: Sequence[str],
        images: Sequence[Callable[[], Tensor]],
        total: Callable[[], FieldSum],
    ) -> None:
        self.place = LocalPlace(folder / _hash([_VERSION, about]))
        self.identities, self.images, self.total = list(identities), images, total
        self.names = [_name(self.identities[at : at + PART]) for at in range(0, len(self.identities), PART)]

    def measure(self, ranks: Ranks, advance: Callable[[int], None] = lambda images: None) -> int:
        """Measure this process's share of the parts that are not saved; return how many are other processes'.

        Args:
            ranks: this process among all.
            advance: called with the number of images that were done, after every image.

        Raises:
            OSError: the folder cannot be written.
        """

        def make(number: int) -> None:
            start, stop = number * PART, min((number + 1) * PART, len(self.images))
            if self.place.exists(self.names[number]):
                advance(stop - start)
                return
            total, damaged, done = self._begun(start, stop)
            advance(done)
            for read in self.images[start + done : stop]:
                try:
                    total.add(read())
                except ImageError as error:
                    damaged.append(str(error))
                advance(1)
            file = io.BytesIO()
            np.savez(file, damaged=np.array(json.dumps(damaged)), **total.arrays())  # type: ignore[arg-type]
            self.place.create(self.names[number], file.getvalue())

        def missing() -> int:
            return len({*self.names} - {*self.place.names()})

        return ranks.work(f"erf {self.place.name}", len(self.names), make, missing)

    @property
    def damaged(self) -> list[str]:
        """Why images could not be read, once all parts are saved."""
        return [reason for name in self.names for reason in json.loads(str(self._part(name)["damaged"]))]

    def result(self) -> ReceptiveField:
        """Return the field over all images, once all parts are saved.

        Raises:
            ValueError: no image could be read.
            NonFiniteError: every image gave NaN or Inf.
        """
        whole = self.total()
        for name in self.names:
            whole.merge(self._part(name))
        return whole.result()

    def tidy(self, everything: Callable[[], Iterable[str]]) -> None:
        """Remove parts of images that have changed or gone, once all parts are saved.

        Args:
            everything: returns what each image is, also of those that this call leaves out; asked for only if there
                are parts that this call does not need.
        """
        os.utime(self.place.path)  # used now
        others = {*self.place.names()} - {*self.names}
        every = list(everything()) if others else []
        for start in range(0, len(every), PART):
            stops = range(start + 1, min(start + PART, len(every)) + 1)  # also of calls that ended within a part
            others -= {_name(every[start:stop]) for stop in stops}
            if not others:
                break
        for name in others:
            self.place.remove(name)

    def _begun(self, start: int, stop: int) -> tuple[FieldSum, list[str], int]:
        """Return the sum of the first images of a part, as a call for fewer images has saved it; how many they are."""
        total = self.total()
        for end in range(stop - 1, start, -1):
            name = _name(self.identities[start:end])
            if self.place.exists(name):
                known = self._part(name)
                total.merge(known)
                return total, json.loads(str(known["damaged"])), end - start
        return total, [], 0

    def _part(self, name: str) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(self.place.read(name)), allow_pickle=False) as found:
            return dict(found)


def tidy_questions(folder: Path) -> None:
    """Remove the parts of all models, tokens and layers but those used last.

    Args:
        folder: where parts are saved.
    """
    each = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
    for path in each[QUESTIONS:]:
        LocalPlace(folder).remove(path.name)


def _name(identities: Sequence[str]) -> str:
    """Return the name of the part of some images."""
    return f"{_hash(identities)}.npz"


def _hash(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:20]
