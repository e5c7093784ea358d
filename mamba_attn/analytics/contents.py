"""What a store holds, ready to be read: its parts as one list of rows, and its statistics.

A store of the first format was one part: an ``images`` folder of rows, one of statistics, and all images in
``store.json``. It opens as it stands, and nothing is ever written into it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mamba_attn.analytics.arrays import Arrays
from mamba_attn.analytics.folding import Merged, StatisticsReader, unit, units
from mamba_attn.analytics.index import FORMAT, INDEX, Index, read_index
from mamba_attn.analytics.parts import Images, Part, Parts, counted
from mamba_attn.analytics.places import Place
from mamba_attn.errors import StoreError

_STATISTICS = re.compile(r"statistics-\d{1,9}")


@dataclass(frozen=True, eq=False)
class Contents:
    """What a store holds.

    Args:
        place: where the store is.
        index: what it is of.
        parts: the counted ones.
        merged: the statistics that are merged; None if none are.
        finished: whether every wanted image is counted, or known to be unreadable.
    """

    place: Place
    index: Index
    parts: Parts
    merged: Merged | None
    finished: bool

    @classmethod
    def open(cls, where: Place) -> "Contents":
        """Look at a store.

        Args:
            where: the store.

        Raises:
            StoreError: it is missing, damaged or of another version.
        """
        content = read_index(where)
        if content["format"] != FORMAT:
            return _of_first_format(where, content)
        index, merged = Index.of(where, content), Merged.latest(where)
        planned = len(index.spans)
        whole = merged is not None and merged.parts == planned
        numbers = list(range(planned)) if whole else counted(where)
        parts = Parts(where, index, numbers, () if merged is None else merged.counts)
        return cls(where, index, parts, merged, bool(planned) and numbers == list(range(planned)))

    @property
    def signature(self) -> str:
        """Text that changes with the images that are counted."""
        return f"{len(self.parts)} images in {len(self.parts.numbers)} parts"

    @cached_property
    def images(self) -> Images:
        """The counted images."""
        return Images(self.parts)

    @cached_property
    def statistics(self) -> StatisticsReader:
        """The statistics of all counted images."""
        return StatisticsReader(self.place, self.index, self.parts, self.merged)

    def rows(self, row: int) -> tuple[Arrays, int]:
        """Return the arrays that hold an image's row, and its row in them."""
        at, own = self.parts.of_row(row)
        return self.arrays(at), own

    def row_groups(self) -> Iterator[tuple[Arrays, int]]:
        """Yield the arrays and the number of images with features of every part that has any."""
        for at in range(len(self.parts.counts)):
            count = self.parts.featured(at)
            if count:
                yield self.arrays(at), count

    @cached_property
    def featured(self) -> Sequence[int]:
        """Rows of the images that have features and pixels."""
        found: list[int] = []
        for at in range(len(self.parts.counts)):
            first = self.parts.first_row(at)
            found += range(first, first + self.parts.featured(at))
        return found

    @cached_property
    def _open(self) -> dict[int, Arrays]:
        return {}

    def arrays(self, at: int) -> Arrays:
        """Return the arrays of a part's rows, by its place among the counted ones."""
        if at not in self._open:
            self._open[at] = Arrays(self.place, self.parts.part(at).rows)
        return self._open[at]


def _of_first_format(where: Place, content: dict[str, Any]) -> Contents:
    try:
        own = {key: content.pop(key) for key in ("images", "unreadable", "statistics", "wanted") if key in content}
        images, unreadable = list(own["images"]), dict(own.get("unreadable", {}))
        statistics, wanted = str(own.get("statistics", "")), int(own["wanted"])
        well = all(len(each) == 5 and isinstance(each[0], str) for each in images)
        if not well or (statistics and not _STATISTICS.fullmatch(statistics)):
            raise ValueError(statistics or "images")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{where}/{INDEX}: it is damaged ({error!r}); collect into a new folder.") from error
    done = len(images) + len(unreadable)
    index = Index.of(where, {**content, "part": max(1, wanted, done), "batch": 0, "wanted": [max(1, wanted, done)]})
    part = Part(0, 0, index.wanted[0], "images", statistics, images, unreadable, {})
    parts = Parts(where, index, [0], known=[part])
    folders = {unit(*each): statistics for each in units(index)}
    merged = Merged(1, parts.counts, folders) if statistics else None
    return Contents(where, index, parts, merged, bool(statistics) and done >= wanted)
