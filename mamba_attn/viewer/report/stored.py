"""Selects the layers, matrices, points and pictures of a store that go into a frozen page."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image

from mamba_attn.viewer.page import described
from mamba_attn.viewer.points import Scatter
from mamba_attn.viewer.report.budget import Content, ReportError
from mamba_attn.viewer.report.quantised import as_text, places
from mamba_attn.viewer.source import Source, cells_of
from mamba_attn.viewer.state import Pane

CELLS = 32 * 32  # of the largest grid that is shown
PICTURES = 400  # images with a thumbnail on the page
_SMALL = 56  # pixels of it
_LEFT_OUT = 3  # layers that are named
MEAN, SPREAD = "mean", "spread"
_KINDS = {MEAN: "means of routes", SPREAD: "maps of how much images differ"}  # else of images


class Stored:
    """One store on its way into the page.

    Args:
        source: of the store.
        content: of the page.
        methods: of dimension reduction; all but the first are used for the sum of the routes only.
        first: number of an image that goes in before the others, computed if it is not kept.

    Raises:
        ReportError: the store has no images.
    """

    def __init__(self, source: Source, content: Content, methods: Sequence[str], first: int | None = None) -> None:
        store = source.store
        self.name, self.content, self.methods, self.first = store.model_name, content, methods, first
        self.source, self.scatter = source, Scatter(source)
        if not source.images:
            raise ReportError(
                f"{store.folder}: the store has no images to show, or counts them in the statistics alone."
            )
        large = [layer for layer in source.layers if np.prod(layer.layout.grid) > CELLS]
        self.shown = [number for number, layer in enumerate(source.layers) if layer not in large]
        self.matrices: dict[int, dict[str, int]] = {number: {} for number in self.shown}
        self.points: dict[str, str] = {}
        self.kept: list[int] = []
        self.photos: dict[int, str] = {}
        self.small: list[str] = []
        self.lost: dict[str, list[int]] = {}  # by kind: for each matrix its bytes if it is left out, else 0
        self._too_large: float = np.inf  # side of the smallest matrix that did not fit
        if source.featured < len(store.images):
            self._note(
                f"single images and their dots are the {source.featured:,} of {len(store.images):,} that the store has "
                "features and pixels of; means and spread are over all."
            )
        if large:
            grids = ", ".join("x".join(map(str, layer.layout.grid)) for layer in large[:_LEFT_OUT])
            self._note(
                f"{_count(len(large), 'layer')} of more than {CELLS:,} patches ({grids}"
                f"{', ...' if len(large) > _LEFT_OUT else ''}) {'is' if len(large) == 1 else 'are'} left out. "
                f"{elsewhere([store])}"
            )

    def means(self) -> None:
        """Add every layer's mean, summed over routes, as far as there is room.

        Raises:
            ReportError: there is none for the first.
        """
        for at, number in enumerate(self.shown):
            if self._add(number, MEAN, "sum"):
                continue
            if not at:
                raise ReportError(
                    f"size={self.content.limit / 1e6:g}: the mean of {self.source.layers[number].name} does not "
                    "fit; choose a larger size."
                )
            self._note("later layers are left out to stay within the page's size; mamba-attn explore shows them.")
            self.shown = self.shown[:at]
            return

    def layouts(self) -> None:
        """Add points of the stages, and of the layers' patches."""
        for number in self.shown:
            for method in self.methods:
                stage = f"stage{self.source.layers[number].stage}/{method}"
                self._plane(stage, Pane(layer=number, mode="blocks", method=method))
                self._planes(number, -1, method)

    def pictures(self, count: int) -> None:
        """Add the images whose matrices follow, or the first one, as the model saw them, and thumbnails of many.

        Args:
            count: how many of the images kept in full.
        """
        images = self.source.images
        kept = [number for number, image in enumerate(images) if image.kept and number != self.first]
        self.kept = kept[:count] if self.first is None else [self.first, *kept][: max(count, 1)]
        beyond, shown = len(set(kept) - set(self.kept)), len(self.kept)
        if beyond:
            self._note(
                f"{beyond} of {beyond + shown} images kept in full are not on this page; images={beyond + shown} "
                "adds them."
            )
        for number in self.kept or [0]:
            photo = self._picture(self.source.picture(Pane(image=number)), None)
            if photo is not None:
                self.photos[number] = photo
        for number in range(min(len(images), PICTURES)):
            small = self._picture(self.source.pixels(Pane(image=number)), _SMALL)
            if small is None:
                break
            self.small.append(small)

    def rest(self) -> Iterator[int]:
        """Add the first image, then means of routes and other images, small grids first; one matrix at each turn."""
        layers, collected = self.source.layers, self.source.store
        each = collected.index.routes == "each"
        routes = [(n, r) for n in self.shown if each and layers[n].routes > 1 for r in range(layers[n].routes)]
        wanted: list[tuple[int, str | int, str | int]] = [(n, MEAN, route) for n, route in routes]
        wanted += [(n, image, "sum") for image in self.kept for n in self.shown]
        wanted += [(n, SPREAD, "sum") for n in self.shown if len(collected.images) > 1]
        wanted += [(n, image, route) for image in self.kept for n, route in routes]
        ahead = [(n, image, "sum") for image in self.kept[:1] for n in self.shown]
        for number, what, route in sorted(wanted, key=lambda its: (its not in ahead, layers[its[0]].tokens)):
            if self._fits(number, what, route):
                if what == MEAN:
                    self._planes(number, int(route), self.methods[0])
                yield number

    def note_what_is_left_out(self) -> None:
        """Add a note on what did not fit, and on the size that would hold everything."""
        missing = [f"{np.count_nonzero(lost)} of {len(lost)} {what}" for what, lost in self.lost.items() if any(lost)]
        if not missing:
            return
        enough = -int(-1.02 * (self.content.size + sum(map(sum, self.lost.values()))) // 1e6)
        whole = sum(all(f"{image}/sum" in self.matrices[n] for n in self.shown) for image in self.kept)
        images = f" ({whole} of {_count(len(self.kept), 'image')} can be shown in every block)" if self.kept else ""
        fewer = ", showing fewer images leaves room" if len(self.kept) > 1 else ""
        self._note(
            f"{' and '.join(missing)} are left out to stay within size={self.content.limit / 1e6:g}{images}; "
            f"size={enough} holds all{fewer}; mamba-attn explore shows them without a page."
        )

    def described(self) -> dict[str, Any]:
        """Return the store for the page's script, as JSON values."""
        found = described(self.source, self.shown)
        for layer in found["layers"]:
            layer["matrices"] = self.matrices[layer["number"]]
        return {**found, "points": self.points, "photos": self.photos, "small": self.small}

    def _fits(self, number: int, what: str | int, route: str | int) -> bool:
        """Add a matrix, or count it as left out; once one does not fit, none of its size is tried again."""
        lost = self.lost.setdefault(_KINDS.get(str(what), "matrices of images"), [])
        tokens, pictured = self.source.layers[number].tokens, what in _KINDS or what in self.photos
        if pictured and tokens < self._too_large and self._add(number, what, route):
            lost.append(0)
            return True
        self._too_large = min(self._too_large, tokens) if pictured else self._too_large
        held = self.matrices[number]
        alike = held.get(f"{MEAN}/{route}", held[f"{MEAN}/sum"])  # stands in for it, as its text is about as long
        lost.append(len(self.content.matrices[alike]))
        return False

    def _add(self, number: int, what: str | int, route: str | int) -> bool:
        if what == SPREAD:
            matrix = self.source.spread(Pane(layer=number))
        else:
            matrix = self.source.matrix(number, None if what == MEAN else int(what), route)
        cells = cells_of(self.source.layers[number].layout)
        added = self.content.add_matrix(matrix[np.ix_(cells, cells)])
        if added is not None:
            self.matrices[number][f"{what}/{route}"] = added
        return added is not None

    def _planes(self, number: int, route: int, method: str) -> None:
        for direction in ("row", "column"):
            key = f"{number}/{'sum' if route < 0 else route}/{direction}/{method}"
            self._plane(key, Pane(layer=number, route=route, direction=direction, method=method))

    def _plane(self, key: str, pane: Pane) -> None:
        if key not in self.points:
            with suppress(ValueError):  # a single patch or image: no plane
                text = self.content.add(places(self.scatter.points(pane)))
                if text is not None:
                    self.points[key] = text

    def _picture(self, pixels: np.ndarray | None, side: int | None) -> str | None:
        """Add a JPEG; "" of a text, which has none; None where there is no room."""
        if pixels is None:
            return ""
        image, file = Image.fromarray(pixels), io.BytesIO()
        if side is not None:
            image.thumbnail((side, side))
        image.save(file, "JPEG", quality=88 if side is None else 75)
        return self.content.add(f"data:image/jpeg;base64,{as_text(file.getvalue())}")

    def _note(self, text: str) -> None:
        self.content.notes.append(f"{self.name}: {text}")


def elsewhere(stores: Sequence[Any]) -> str:
    """Return a sentence about the command that shows grids of any size."""
    names = " ".join(store.folder.name for store in stores if store.folder is not None) or "STORE"
    return f"mamba-attn explore {names} shows them: it reads rows, or computes them in linear time, on demand."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
