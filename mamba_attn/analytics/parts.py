"""Parts of a store: which images each counts, and where its arrays are.

A part is so many consecutive wanted images. Whoever collects one writes its arrays into a folder of a new name, and
then ``parts/000017.json``, which names this folder and the images, if no other has done so: that counts the part. Two
writers of one part make the same numbers, and the first one counts.
"""

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

from mamba_attn.analytics.index import Index, StoredImage
from mamba_attn.analytics.places import Place, read_object
from mamba_attn.errors import StoreError

FOLDER = "parts"
_LARGEST = 2**28  # bytes of one part's list that are read


@dataclass(frozen=True)
class Part:
    """A part that is counted.

    Args:
        number: of the part, from 0.
        start: its first wanted image.
        stop: behind the last.
        rows: folder of its arrays, one row per image.
        statistics: folder of its statistics.
        images: the readable ones, in order: key, label, predicted, correct, kept.
        unreadable: reasons by key of the others.
        writer: "rank", "world", "host" of who collected it.
        featured: number of first images whose features and pixels are in the rows; None: all.
    """

    number: int
    start: int
    stop: int
    rows: str
    statistics: str
    images: list[list[Any]]
    unreadable: dict[str, str]
    writer: dict[str, Any]
    featured: int | None = None

    @property
    def object_name(self) -> str:
        """Name of the object that counts it."""
        return object_name(self.number)

    def content(self) -> bytes:
        """Return what is written to count it."""
        return json.dumps(vars(self), allow_nan=False).encode()

    @classmethod
    def read(cls, where: Place, number: int) -> "Part":
        """Read a part of a store.

        Raises:
            StoreError: it is missing or damaged.
        """
        name = object_name(number)
        try:
            part = cls(**json.loads(read_object(where, name, _LARGEST)))
            well = part.number == number and 0 <= part.start < part.stop and isinstance(part.unreadable, dict)
            if not well or any(len(each) != 5 or not isinstance(each[0], str) for each in part.images):
                raise ValueError(f"part {part.number}, {part.start}..{part.stop}")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise StoreError(
                f"{where}/{name}: it is missing or damaged ({error}); collect into a new folder."
            ) from error
        return part


def stored_image(content: Sequence[Any], row: int) -> StoredImage:
    """Return an image as a part lists it.

    Args:
        content: key, label, predicted, correct, kept.
        row: in the store.
    """
    key, label, predicted, correct, kept = content
    return StoredImage(key, label, predicted, correct, kept, row)


def object_name(number: int) -> str:
    """Return the name of the object that counts a part."""
    return f"{FOLDER}/{number:06d}.json"


def counted(where: Place) -> list[int]:
    """Return the numbers of the parts that are counted, in order."""
    names = (name.removesuffix(".json") for name in where.names(FOLDER) if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


class Parts:
    """The counted parts of a store as one list of images; each part is read when it is needed.

    Args:
        where: the store.
        index: of it.
        numbers: of the counted parts.
        counts: (images, unreadable ones) of the first parts, as far as known without reading them.
        known: parts that are not read from the disk.
    """

    def __init__(
        self,
        where: Place,
        index: Index,
        numbers: Sequence[int],
        counts: Sequence[tuple[int, int]] = (),
        known: Sequence[Part] = (),
    ) -> None:
        self.place, self.numbers = where, list(numbers)
        self._index, self._spans = index, index.spans
        self._parts = {part.number: part for part in known}
        each = [counts[at] if at < len(counts) else self._count(number) for at, number in enumerate(self.numbers)]
        self.counts = each
        self._starts = [0, *accumulate(images for images, _ in each)]

    def __len__(self) -> int:
        """Number of counted images."""
        return self._starts[-1]

    def __iter__(self) -> Iterator[Part]:
        return (self.part(at) for at in range(len(self.numbers)))

    def part(self, at: int) -> Part:
        """Return a counted part by its place among them.

        Raises:
            StoreError: it is missing, damaged, or of another list of images.
        """
        number = self.numbers[at]
        if number not in self._parts:
            self._parts[number] = self._read(number)
        return self._parts[number]

    def first_row(self, at: int) -> int:
        """Return the row of a part's first image."""
        return self._starts[at]

    def featured(self, at: int) -> int:
        """Return how many of a part's images, from its first on, have features and pixels."""
        number, images = self.numbers[at], self.counts[at][0]
        whole, (start, stop) = self._index.featured(number), self._spans[number]
        if isinstance(self._index.features, list) or whole in (0, stop - start):
            return min(whole, images)
        own = self.part(at).featured  # where the first images end; some may be unreadable
        return images if own is None else min(own, images)

    def of_row(self, row: int) -> tuple[int, int]:
        """Return the place of the part that holds a row, and the row in it."""
        at = bisect.bisect_right(self._starts, row) - 1
        return at, row - self._starts[at]

    def image(self, row: int) -> StoredImage:
        """Return the image of a row."""
        at, own = self.of_row(row)
        return stored_image(self.part(at).images[own], row)

    @property
    def unreadable(self) -> dict[str, str]:
        """Reasons by key of images that could not be used."""
        with_some = (at for at, (_, unreadable) in enumerate(self.counts) if unreadable)
        return {key: why for at in with_some for key, why in self.part(at).unreadable.items()}

    def _count(self, number: int) -> tuple[int, int]:
        part = self._parts[number] if number in self._parts else self._read(number)  # not kept: there may be thousands
        return len(part.images), len(part.unreadable)

    def _read(self, number: int) -> Part:
        found = Part.read(self.place, number)
        span = self._spans[number] if number < len(self._spans) else None
        if span != (found.start, found.stop):
            raise StoreError(
                f"{self.place}/{object_name(number)}: it counts images {found.start}..{found.stop}, and the store "
                f"plans {span} there: two calls with other limits wrote at once; collect into a new folder."
            )
        return found


class Images(Sequence[StoredImage]):
    """The counted images of a store; only the parts that are looked at are read.

    Args:
        parts: of the store.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[StoredImage]:
        row = 0
        for part in self._parts:
            for each in part.images:
                yield stored_image(each, row)
                row += 1

    @overload
    def __getitem__(self, at: int) -> StoredImage: ...
    @overload
    def __getitem__(self, at: slice) -> list[StoredImage]: ...
    def __getitem__(self, at: int | slice) -> StoredImage | list[StoredImage]:
        if isinstance(at, slice):
            return [self._parts.image(row) for row in range(len(self))[at]]
        return self._parts.image(range(len(self))[at])
