"""Selects the layers, matrices, points and pictures of a store that go into a frozen page."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mamba_attn.viewer.page import cells_of, described
from mamba_attn.viewer.points import Scatter
from mamba_attn.viewer.report.budget import Content, ReportError
from mamba_attn.viewer.report.quantised import as_text, places
from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import Pane

CELLS = 32 * 32  # of the largest grid that is shown
PICTURES = 400  # images with a thumbnail on the page
_SMALL = 56  # pixels of it
_OF_IMAGES = "matrices of images"
_LEFT_OUT = 3  # layers that are named
MEAN, SPREAD = "mean", "spread"


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
        self.source, self.scatter_of = source, Scatter(source)
        if not self.source.images:
            raise ReportError(f"{store.folder}: the store has no images to show.")
        self.shown = [n for n, layer in enumerate(self.source.layers) if np.prod(layer.layout.grid) <= CELLS]
        self.matrices: dict[int, dict[str, int]] = {number: {} for number in self.shown}
        self.scatter: dict[str, str] = {}
        self.kept: list[int] = []
        self.photos: dict[int, str] = {}
        self.small: list[str] = []
        self.wanted: dict[str, tuple[int, list[int]]] = {}  # by kind: matrices, and bytes of each that is left out
        self._too_large: float = np.inf  # side of the smallest matrix that did not fit
        large = [layer for n, layer in enumerate(self.source.layers) if n not in self.matrices]
        if large:
            grids = ", ".join("x".join(map(str, layer.layout.grid)) for layer in large[:_LEFT_OUT])
            content.notes.append(
                f"{self.name}: {_count(len(large), 'layer')} of more than {CELLS:,} patches ({grids}"
                f"{', ...' if len(large) > _LEFT_OUT else ''}) {'is' if len(large) == 1 else 'are'} left out. "
                f"{elsewhere([store])}"
            )

    def means(self) -> None:
        """Add every layer's mean, summed over routes."""
        for number in list(self.shown):
            if not self._matrix(number, MEAN, "sum"):
                at = self.shown.index(number)
                if not at:
                    raise ReportError(
                        f"size={self.content.limit / 1e6:g}: the mean of {self.source.layers[number].name} does not "
                        "fit; choose a larger size."
                    )
                self._too_much("later layers")
                self.shown = self.shown[:at]
                return

    def points(self) -> None:
        """Add points of the stages, and of the layers' patches."""
        for number in self.shown:
            for method in self.methods:
                self._point(
                    f"stage{self.source.layers[number].stage}/{method}",
                    Pane(layer=number, mode="blocks", method=method),
                )
                for direction in ("row", "column"):
                    self._point(
                        f"{number}/sum/{direction}/{method}", Pane(layer=number, direction=direction, method=method)
                    )

    def pictures(self, count: int) -> None:
        """Add the images whose matrices follow, or the first one, as the model saw them, and thumbnails of many.

        Args:
            count: how many of the images kept in full.
        """
        images = self.source.images
        kept = [number for number, image in enumerate(images) if image.kept and number != self.first][:count]
        self.kept = kept if self.first is None else [self.first, *kept][: max(count, 1)]
        beyond = sum(image.kept for n, image in enumerate(images) if n not in self.kept)
        if beyond:
            self.content.notes.append(
                f"{self.name}: {beyond} of {beyond + len(self.kept)} images kept in full are not on this page; "
                f"images={beyond + len(self.kept)} adds them."
            )
        for number in self.kept or [0]:
            photo = self._picture(number, None)
            if photo is not None:
                self.photos[number] = photo
        for number in range(min(len(images), PICTURES)):
            small = self._picture(number, _SMALL)
            if small is None:
                break
            self.small.append(small)

    def _picture(self, number: int, side: int | None) -> str | None:
        """Add an image; "" of a text, which has none; None where there is no room."""
        pane = Pane(image=number)
        pixels = self.source.picture(pane) if side is None else self.source.pixels(pane)
        return "" if pixels is None else self.content.add(_jpeg(pixels, side))

    def first_image(self) -> None:
        """Add the first image's matrices of the routes' sum."""
        for number in self.shown if self.kept else ():
            self._fits(_OF_IMAGES, number, self.kept[0], "sum")

    def rest(self) -> Iterator[int]:
        """Add means of routes and matrices of the other images, small grids first, one at each turn."""
        wanted: list[tuple[int, str | int, str | int]] = [(n, MEAN, route) for n, route in self._routes()]
        wanted += [(n, image, "sum") for image in self.kept[1:] for n in self.shown]
        wanted += [(n, SPREAD, "sum") for n in self.shown if len(self.source.store.images) > 1]
        wanted += [(n, image, route) for image in self.kept for n, route in self._routes()]
        for number, image, route in sorted(wanted, key=lambda each: self.source.layers[each[0]].tokens):
            what = {MEAN: "means of routes", SPREAD: "maps of how much images differ"}.get(str(image), _OF_IMAGES)
            if not self._fits(what, number, image, route):
                continue
            for direction in ("row", "column") if image == MEAN else ():
                self._point(
                    f"{number}/{route}/{direction}/{self.methods[0]}",
                    Pane(layer=number, route=int(route), direction=direction, method=self.methods[0]),
                )
            yield number

    def note_what_is_left_out(self) -> None:
        """Add a note on what did not fit, and on the size that would hold everything."""
        missing = [f"{len(lost)} of {count} {what}" for what, (count, lost) in self.wanted.items() if lost]
        if not missing:
            return
        bytes_more = sum(sum(lost) for _, lost in self.wanted.values())
        enough = -int(-1.02 * (self.content.size + bytes_more) // 1e6)
        whole = sum(all(f"{image}/sum" in self.matrices[n] for n in self.shown) for image in self.kept)
        images = f" ({whole} of {_count(len(self.kept), 'image')} can be shown in every block)" if self.kept else ""
        fewer = ", showing fewer images leaves room" if len(self.kept) > 1 else ""
        self.content.notes.append(
            f"{self.name}: {' and '.join(missing)} are left out to stay within size={self.content.limit / 1e6:g}"
            f"{images}; size={enough} holds all{fewer}; mamba-attn explore shows them without a page."
        )

    def described(self) -> dict[str, Any]:
        """Return the store for the page's script, as JSON values."""
        found = described(self.source, self.shown)
        for layer in found["layers"]:
            layer["matrices"] = self.matrices[layer["number"]]
        return {**found, "points": self.scatter, "photos": self.photos, "small": self.small}

    def _routes(self) -> Iterator[tuple[int, int]]:
        for number in self.shown:
            layer = self.source.layers[number]
            if layer.routes > 1 and self.source.store.index.routes == "each":
                yield from ((number, route) for route in range(layer.routes))

    def _matrix(self, number: int, what: str | int, route: str | int) -> bool:
        if what == SPREAD:
            matrix = self.source.spread(Pane(layer=number))
        else:
            matrix = self.source.matrix(number, None if what == MEAN else int(what), route)
        cells = cells_of(self.source.layers[number].layout)
        added = self.content.add_matrix(matrix[np.ix_(cells, cells)])
        if added is not None:
            self.matrices[number][f"{what}/{route}"] = added
        return added is not None

    def _fits(self, what: str, number: int, image: str | int, route: str | int) -> bool:
        """Add a matrix, or count it as left out; once one does not fit, none of its size is tried again."""
        count, lost = self.wanted.get(what, (0, []))
        self.wanted[what] = count + 1, lost
        tokens = self.source.layers[number].tokens
        known = image in (MEAN, SPREAD) or image in self.photos
        if known and tokens < self._too_large and self._matrix(number, image, route):
            return True
        self._too_large = min(self._too_large, tokens) if known else self._too_large
        held = self.matrices[number]
        alike = held.get(f"{MEAN}/{route}", held[f"{MEAN}/sum"])  # stands in for it, as its text is about as long
        lost.append(len(self.content.matrices[alike]))
        return False

    def _point(self, key: str, pane: Pane) -> None:
        if key not in self.scatter:
            try:
                points = self.content.add(places(self.scatter_of.points(pane).xy))
            except ValueError:
                return  # a single patch or image: no plane
            if points is not None:
                self.scatter[key] = points

    def _too_much(self, what: str) -> None:
        self.content.notes.append(
            f"{self.name}: {what} are left out, in part or all, to stay within the page's size; mamba-attn explore "
            "shows them."
        )


def elsewhere(stores: Sequence[Any]) -> str:
    """Return a sentence about the command that shows grids of any size."""
    names = " ".join(store.folder.name for store in stores if store.folder is not None) or "STORE"
    return f"mamba-attn explore {names} shows them: it reads rows, or computes them in linear time, on demand."


def _jpeg(pixels: np.ndarray, side: int | None) -> str:
    image, file = Image.fromarray(pixels), io.BytesIO()
    if side is not None:
        image.thumbnail((side, side))
    image.save(file, "JPEG", quality=88 if side is None else 75)
    return f"data:image/jpeg;base64,{as_text(file.getvalue())}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
