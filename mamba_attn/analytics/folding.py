"""Statistics of all parts: those of each part merged one after another, in the order of the parts.

Every layer and route is merged by itself, so that ranks share the work and no number depends on who did what. What is
merged is named by ``merged/000017.json``, of the first 17 parts, written if no one has done so; then the statistics of
those parts are not needed any more.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mamba_attn.analytics.arrays import Arrays
from mamba_attn.analytics.index import Index, StoredLayer
from mamba_attn.analytics.part_writer import route_names, write_statistics
from mamba_attn.analytics.parts import FOLDER, Parts
from mamba_attn.analytics.places import Place, read_object, writer_id
from mamba_attn.analytics.statistics import LayerStatistics, Running, merge, merge_means
from mamba_attn.distributed import Ranks, wait
from mamba_attn.errors import StoreError

MERGED = "merged"
_LARGEST = 2**26  # bytes of a list that is read


@dataclass(frozen=True)
class Merged:
    """The statistics of the first parts.

    Args:
        parts: how many.
        counts: (images, unreadable ones) of each.
        folders: where the arrays of every layer and route are, by ``unit``.
    """

    parts: int
    counts: list[tuple[int, int]]
    folders: dict[str, str]

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(images for images, _ in self.counts)

    @classmethod
    def latest(cls, where: Place) -> "Merged | None":
        """Return what of a store is merged; None before anything is.

        Raises:
            StoreError: its list is damaged.
        """
        numbers = _merged(where)
        if not numbers:
            return None
        name = f"{MERGED}/{numbers[-1]:06d}.json"
        try:
            content = json.loads(read_object(where, name, _LARGEST))
            counts = [(int(images), int(unreadable)) for images, unreadable in content["counts"]]
            return cls(int(content["parts"]), counts, dict(content["folders"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreError(f"{where}/{name}: it is damaged ({error}); collect into a new folder.") from error

    def write(self, where: Place) -> None:
        """Write the list, if no one has done so."""
        where.create(f"{MERGED}/{self.parts:06d}.json", json.dumps(vars(self)).encode())


def unit(layer: int, route: str) -> str:
    """Return the name of a layer's route among all that is merged."""
    return f"{layer:03d}-{route}"


def units(index: Index) -> list[tuple[int, str]]:
    """Return every layer and route of a store, each to be merged by itself."""
    return [(number, route) for number, layer in enumerate(index.layers) for route in route_names(layer, index.routes)]


class StatisticsReader:
    """Reads statistics over all counted images: what is merged, and the other parts' merged while they are read.

    Args:
        where: the store.
        index: of it.
        parts: the counted ones.
        merged: of the first of them; None if nothing is.
    """

    def __init__(self, where: Place, index: Index, parts: Parts, merged: Merged | None) -> None:
        self.place, self.index, self.parts, self.merged = where, index, parts, merged
        self._open: dict[str, Arrays] = {}

    def mean(self, layer: int, route: str, selection: Any = ...) -> np.ndarray:
        """Return a part of a route's mean."""
        mean, _ = self._folded(layer, route, selection, squares=False)
        return mean.numpy()

    def squares(self, layer: int, route: str, selection: Any = ...) -> np.ndarray:
        """Return a part of a route's sum of squared deviations from the mean."""
        return self._folded(layer, route, selection, squares=True)[1].numpy()

    def moments(self, layer: int) -> np.ndarray:
        """Return (2, routes, channels, length): means and mean squares of a layer's states."""
        moments: torch.Tensor | None = None
        for arrays, before, count in self._sources(layer, "sum"):
            found = torch.from_numpy(arrays.read(f"{layer:03d}/moments"))
            moments = torch.zeros_like(found) if moments is None else moments
            merge_means(moments, before, found, count)
        return self._some(moments).numpy()

    def _folded(self, layer: int, route: str, selection: Any, *, squares: bool) -> tuple[torch.Tensor, torch.Tensor]:
        mean: torch.Tensor | None = None
        m2 = torch.zeros(())
        for arrays, before, count in self._sources(layer, route):
            its = torch.from_numpy(arrays.read(f"{layer:03d}/mean/{route}", selection))
            if mean is None:
                mean, m2 = torch.zeros_like(its), torch.zeros_like(its)
            if squares:
                merge(mean, m2, before, its, torch.from_numpy(arrays.read(f"{layer:03d}/m2/{route}", selection)), count)
            else:
                merge_means(mean, before, its, count)
        return self._some(mean), m2

    def _sources(self, layer: int, route: str) -> list[tuple[Arrays, int, int]]:
        """(arrays, images before them, their images): of what is merged, then of every other part."""
        found, merged = [], 0
        before = 0
        if self.merged is not None and self.merged.images:
            found.append((self._arrays(self.merged.folders[unit(layer, route)]), 0, self.merged.images))
            before = self.merged.images
        if self.merged is not None:
            merged = self.merged.parts
        for at in range(merged, len(self.parts.numbers)):
            count = self.parts.counts[at][0]
            if count:
                found.append((self._arrays(self.parts.part(at).statistics), before, count))
            before += count
        return found

    def _arrays(self, folder: str) -> Arrays:
        if folder not in self._open:
            self._open[folder] = Arrays(self.place, folder)
        return self._open[folder]

    def _some(self, found: torch.Tensor | None) -> torch.Tensor:
        if found is None:
            raise StoreError(f"{self.place}: it counts no images.")
        return found

    def layer(self, number: int, route: str, layer: StoredLayer) -> LayerStatistics:
        """Return the statistics of one route of a layer, and with its sum the moments of the states.

        Raises:
            StoreError: they are missing, damaged, or of another shape.
        """
        mean, m2 = self._folded(number, route, ..., squares=True)
        moments = torch.from_numpy(self.moments(number)) if route == "sum" and layer.moments is not None else None
        expected = (layer.tokens, layer.tokens)
        if mean.shape != expected or m2.shape != expected:
            raise StoreError(
                f"{self.place}: the statistics of {layer.name} have the shape {tuple(mean.shape)}, not {expected}; "
                "it is damaged: collect into a new folder."
            )
        return LayerStatistics({route: Running(mean, m2)}, moments)


def fold(where: Place, index: Index, ranks: Ranks, count: int) -> Merged:
    """Merge the statistics of the first parts, together with other ranks; what a killed call did stays done.

    Args:
        where: the store.
        index: of it.
        ranks: this process among all.
        count: number of parts; all of them are counted.

    Raises:
        StoreError: statistics are missing or damaged.
        OSError: the store cannot be written.
    """
    latest = Merged.latest(where)
    if latest is None or latest.parts < count:
        tasks, folder = units(index), f"{MERGED}/{count:06d}"
        own = f"{folder}-{writer_id()}"
        shares: Sequence[int] | Any = range(len(tasks))
        if ranks.together:
            shares = ranks.shares(f"merge {count}", len(tasks))
        done = set(where.names(folder))
        for number in shares:
            if f"{unit(*tasks[number])}.json" not in done:
                _fold_unit(where, index, *tasks[number], count, own)
        while len(done := set(where.names(folder))) < len(tasks) and not where.exists(f"{folder}.json"):
            wait()
        if not where.exists(f"{folder}.json"):
            try:
                folders = {
                    name.removesuffix(".json"): json.loads(where.read(f"{folder}/{name}"))["folder"] for name in done
                }
            except FileNotFoundError:  # another rank has written the list meanwhile, and tidied up
                if not where.exists(f"{folder}.json"):
                    raise
            else:
                Merged(count, _parts(where, index, count, latest).counts, folders).write(where)
        latest = Merged.latest(where)
    if latest is None:
        raise StoreError(f"{where}: its merged statistics were removed while they were read.")
    if ranks.first or not ranks.together:
        _tidy(where, index, latest)
    return latest


def _fold_unit(where: Place, index: Index, layer: int, route: str, count: int, own: str) -> None:
    """Merge one route of a layer; begin again if another rank has merged more meanwhile, and tidied up."""
    latest = Merged.latest(where)
    while True:
        parts = _parts(where, index, count, latest)
        try:
            found = StatisticsReader(where, index, parts, latest).layer(layer, route, index.layers[layer])
            break
        except StoreError:
            before, latest = latest, Merged.latest(where)
            if latest is None or (before is not None and latest.parts <= before.parts):
                raise
            if latest.parts >= count:
                return
    write_statistics(Arrays(where, own, writable=True), layer, found)
    name = f"{MERGED}/{count:06d}/{unit(layer, route)}.json"
    where.create(name, json.dumps({"folder": own}).encode())


def _parts(where: Place, index: Index, count: int, latest: Merged | None) -> Parts:
    return Parts(where, index, range(count), () if latest is None else latest.counts)


def _merged(where: Place) -> list[int]:
    names = (name.removesuffix(".json") for name in where.names(MERGED) if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


def _tidy(where: Place, index: Index, latest: Merged) -> None:
    """Remove what the merged statistics replace; a call that is killed here is gone on with by the next one."""
    older = [number for number in _merged(where) if number < latest.parts]
    first = older[-1] if older else 0
    parts = _parts(where, index, latest.parts, latest)
    if older or where.exists(parts.part(0).statistics):
        for at in reversed(range(first, latest.parts)):
            where.remove(parts.part(at).statistics)
    needed = set(latest.folders.values())
    for name in where.names(MERGED):
        if name.endswith(".json") or f"{MERGED}/{name}" in needed or int(name[:6]) > latest.parts:
            continue
        where.remove(f"{MERGED}/{name}")
    for number in older:  # last: where they are, tidying up has not ended
        where.remove(f"{MERGED}/{number:06d}.json")


def tidy_parts(where: Place, parts: Parts) -> None:
    """Remove folders of parts that no counted part names: of processes that were killed, or came second.

    Args:
        where: the store.
        parts: all of them, counted.
    """
    folders = [name for name in where.names(FOLDER) if not name.endswith(".json")]
    if len(folders) > len(parts.numbers):
        named = {part.rows.split("/")[1] for part in parts}
        for name in folders:
            if name not in named:
                where.remove(f"{FOLDER}/{name}")
