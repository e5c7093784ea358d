"""The explorer's server: the page, and what it asks for: maps, points, pictures, reductions, the page as a file."""

import base64
import io
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mamba_attn.viewer.errors import FAILURES, sentence
from mamba_attn.viewer.guard import Guard, body_of
from mamba_attn.viewer.page import described, entry, page
from mamba_attn.viewer.points import Scatter
from mamba_attn.viewer.reductions import Jobs
from mamba_attn.viewer.source import Source, enlarged, patches_of, tokens_of
from mamba_attn.viewer.state import Pane, unpacked

QUERIES = 600  # maps of one request
ADDED = 64  # photos that a page may add
_SMALL = 64  # pixels of a thumbnail
_PIXELS, _LONG = 50_000_000, 20  # of a photo; its longer side as a multiple of the other
_NOTES = (
    "This page is served by mamba-attn explore on your own machine; it loads nothing from elsewhere.",
    "Maps and points come from the store. What it does not hold is computed by the model when you ask for it.",
)


class Explorer:
    """The ASGI app that shows some stores.

    Args:
        stores: ``AttentionStore`` objects, at least one.
        host: address it will be bound to. On a loopback address, requests for any other name are refused.

    Raises:
        ValueError: no store, or one without images.
    """

    def __init__(self, stores: Sequence[Any], *, host: str = "127.0.0.1") -> None:
        self.sources = [Source(store) for store in stores]
        if not self.sources or not all(source.images and source.layers for source in self.sources):
            raise ValueError(
                "explore: the store has no images to show, or counts them in the statistics alone; collect some with "
                "mamba-attn collect."
            )
        self._scatters = [Scatter(source) for source in self.sources]
        self._jobs = Jobs()
        routes = [
            Route("/", self._page),
            *(
                Route(f"/api/{function.__name__.strip('_')}", self._answer(function), methods=["POST"])
                for function in (self._maps, self._points, self._neighbours, self._has, self._photo)
            ),
            Route("/api/jobs/{number:int}", self._job, methods=["GET", "DELETE"]),
            Route("/api/picture", self._picture),
            Route("/api/file", self._file),
        ]
        self._app = Guard(Starlette(routes=routes), host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self._app(scope, receive, send)

    def prepare(self) -> None:
        """Compute the slow layouts in the background, before they are asked for."""
        for scatter in self._scatters:
            self._jobs.ahead(scatter)

    def close(self) -> None:
        """Stop what still runs."""
        self._jobs.close()

    def _page(self, _: Request) -> Response:
        stores = [described(source) for source in self.sources]
        return HTMLResponse(page({"live": True, "stores": stores}, _NOTES), headers={"x-frame-options": "DENY"})

    def _answer(self, function: Callable[[bytes, Request], Any]) -> Callable[[Request], Any]:
        """A handler: a malformed body gets 400; failures of store, model or machine become {"error"}."""

        async def answer(request: Request) -> Response:
            body = await body_of(request)
            try:
                return JSONResponse(await run_in_threadpool(function, body, request))
            except FAILURES as error:
                return JSONResponse({"error": sentence(error)})
            except (ValueError, RecursionError) as error:  # ValueError includes JSON's, and bytes that are no text
                raise HTTPException(400, f"This is no request of the page: {error}") from error

        return answer

    def _pane(self, given: Any) -> Pane:
        pane = Pane.parsed(given)
        self._in(pane.store, self.sources, "store")
        self._in(pane.layer, self.sources[pane.store].layers, "layer")
        self._in(pane.image, self.sources[pane.store].images, "image")
        return pane

    @staticmethod
    def _in(number: int, of: Sequence[Any], what: str) -> None:
        if not 0 <= number < len(of):
            raise ValueError(f"{what}={number}: there are {len(of)}.")

    def _maps(self, body: bytes, _: Request) -> list[dict[str, str]]:
        """Maps of a list of panes, each with its selected "cells", in the page's order of patches."""
        given = json.loads(body)
        queries = given.get("queries") if isinstance(given, dict) else None
        if not isinstance(queries, list) or len(queries) > QUERIES:
            raise ValueError(f"queries is a list of at most {QUERIES}.")
        panes = [(self._pane(query), unpacked(query.get("cells", ""))) for query in queries]
        found = []
        for pane, cells in panes:
            source = self.sources[pane.store]
            layout = source.layer(pane).layout
            try:
                values = source.read(pane, tokens_of(layout, cells))[patches_of(layout)]
            except FAILURES as error:
                found.append({"error": sentence(error)})
            else:
                found.append({"map": _text(values)})
        return found

    def _points(self, body: bytes, _: Request) -> dict[str, Any]:
        """Points of a pane; a "job" that is computing them, if that takes long."""
        pane = self._pane(json.loads(body))
        scatter = self._scatters[pane.store]
        if scatter.count(pane) < 3:
            return {"error": "There are too few points for a plane."}
        self._jobs.settle()
        if scatter.known(pane) is None and pane.method != "pca":
            return {"job": self._jobs.start(scatter, pane)}
        return {"xy": _text(scatter.points(pane))}

    def _neighbours(self, body: bytes, _: Request) -> dict[str, Any]:
        """The points of a pane that are most alike to one "point"."""
        given = json.loads(body)
        pane, point = self._pane(given), given.get("point")
        if not isinstance(point, int):
            raise ValueError("point is a whole number.")  # noqa: TRY004 - of parsed text
        return {"numbers": self._scatters[pane.store].neighbours(pane, point)}

    def _has(self, body: bytes, _: Request) -> dict[str, Any]:
        """Which layers have a gate and a D; the model is run on the pane's image."""
        pane = self._pane(json.loads(body))
        source = self.sources[pane.store]
        return {"layers": source.live.has(source.image(pane))}

    def _job(self, request: Request) -> Response:
        job = self._jobs.get(request.path_params["number"])
        if job is None:
            raise HTTPException(404, "There is no such job.")
        if request.method == "DELETE":
            job.cancel()
        return JSONResponse(job.described())

    def _picture(self, request: Request) -> Response:
        """What the model saw of an image; with "small", a thumbnail."""
        pane, small = self._asked(request), "small" in request.query_params
        source = self.sources[pane.store]
        pixels = source.pixels(pane) if small else source.picture(pane)
        if pixels is None:
            raise HTTPException(404, "A text has no picture.")
        picture, file, kind = Image.fromarray(pixels), io.BytesIO(), "jpeg" if small else "png"
        if small:
            picture.thumbnail((_SMALL, _SMALL))
        picture.save(file, kind)
        return Response(file.getvalue(), media_type=f"image/{kind}")

    def _asked(self, request: Request) -> Pane:
        """The store and the image that an address names."""
        numbers = {name: request.query_params.get(name, "0") for name in ("store", "image")}
        if not all(text.isascii() and text.isdigit() and len(text) < 8 for text in numbers.values()):
            raise HTTPException(400, "Store and image are numbers.")
        try:
            return self._pane({name: int(text) for name, text in numbers.items()})
        except ValueError as error:
            raise HTTPException(404, str(error)) from error

    def _photo(self, body: bytes, request: Request) -> dict[str, Any]:
        """Run the model on a photo; it joins the images of a store."""
        source = self.sources[self._asked(request).store]
        if len(source.images) - source.featured >= ADDED:
            return {"error": f"{ADDED} photos have been added; start the explorer again for more."}
        return _added(source, body, request.query_params.get("name", ""))

    def _file(self, request: Request) -> Response:
        """The page as a file that needs no server."""
        from mamba_attn.viewer.report.content import make  # here, because the server starts faster without it

        pane, start = self._asked(request), request.query_params.get("state", "")[:20_000]
        first = (pane.store, pane.image)
        try:
            text, _ = make(self.sources, ("pca",), 4, 8.0, "mamba-attn explore", first=first, start=start)
        except FAILURES as error:
            raise HTTPException(409, f"The page cannot be made: {sentence(error)}") from error
        return HTMLResponse(text)


def _added(source: Source, body: bytes, name: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body)) as picture:
                if picture.width * picture.height > _PIXELS or max(picture.size) > _LONG * min(picture.size):
                    return {"error": f"A photo has at most {_PIXELS:,} pixels, and is no narrow strip."}
                photo = picture.convert("RGB")
                pixels, larger = source.store.transform.pixels(photo), None
                with suppress(ValueError):  # of a function
                    larger = enlarged(source.store.transform, photo)
    except (UnidentifiedImageError, Image.DecompressionBombWarning, OSError, ValueError, SyntaxError):
        return {"error": "This file is no photo that can be read: drop a JPEG, PNG or WebP."}
    number = source.add(pixels, name[:100] or "photo", larger)
    return {"image": number, "entry": entry(source.images[number])}


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")
