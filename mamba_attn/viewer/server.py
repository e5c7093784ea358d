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
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mamba_attn.viewer.errors import FAILURES, sentence
from mamba_attn.viewer.guard import Guard, Refused, body_of, refuse
from mamba_attn.viewer.page import described, page
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
            raise ValueError("explore: the store has no images to show; collect some with mamba-attn collect.")
        self._scatters = [Scatter(source) for source in self.sources]
        self._jobs = Jobs()
        routes = [
            Route("/", self._page),
            Route("/api/maps", self._answer(self._maps), methods=["POST"]),
            Route("/api/points", self._answer(self._points), methods=["POST"]),
            Route("/api/neighbours", self._answer(self._neighbours), methods=["POST"]),
            Route("/api/has", self._answer(self._has), methods=["POST"]),
            Route("/api/jobs/{number:int}", self._job, methods=["GET", "DELETE"]),
            Route("/api/picture", self._picture),
            Route("/api/photo", self._photo, methods=["POST"]),
            Route("/api/file", self._file),
        ]
        app = Starlette(routes=routes, exception_handlers={Refused: refuse})
        self._app = Guard(app, host)

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

    def _answer(self, function: Callable[[Any], Any]) -> Callable[[Request], Any]:
        """A handler of JSON: what is malformed gets 400; failures of store, model or machine become {"error"}."""

        async def answer(request: Request) -> Response:
            body = await body_of(request)
            try:
                given = json.loads(body)
                return JSONResponse(await run_in_threadpool(function, given))
            except FAILURES as error:
                return JSONResponse({"error": sentence(error)})
            except (ValueError, RecursionError) as error:  # ValueError includes JSON's, and bytes that are no text
                raise Refused(400, f"This is no request of the page: {error}") from error

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

    def _maps(self, given: Any) -> list[dict[str, str]]:
        """Maps of a list of panes, each with its selected "cells", in the page's order of patches."""
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

    def _points(self, given: Any) -> dict[str, Any]:
        """Points of a pane; a "job" that is computing them, if that takes long."""
        pane = self._pane(given)
        scatter = self._scatters[pane.store]
        if scatter.count(pane) < 3:
            return {"error": "There are too few points for a plane."}
        self._jobs.settle()
        known = scatter.known(pane)
        if known is None and pane.method != "pca":
            return {"job": self._jobs.start(scatter, pane)}
        return {"xy": _text((known or scatter.points(pane)).xy)}

    def _neighbours(self, given: Any) -> dict[str, Any]:
        """The points of a pane that are most alike to one "point"."""
        pane, point = self._pane(given), given.get("point")
        if not isinstance(point, int):
            raise ValueError("point is a whole number.")  # noqa: TRY004 - of parsed text
        return {"numbers": self._scatters[pane.store].neighbours(pane, point)}

    def _has(self, given: Any) -> dict[str, Any]:
        """Which layers have a gate and a D; the model is run on the pane's image."""
        pane = self._pane(given)
        source = self.sources[pane.store]
        return {"layers": source.live.has(source.image(pane))}

    def _job(self, request: Request) -> Response:
        job = self._jobs.get(request.path_params["number"])
        if job is None:
            raise Refused(404, "There is no such job.")
        if request.method == "DELETE":
            job.cancel()
        return JSONResponse(job.described())

    def _picture(self, request: Request) -> Response:
        """What the model saw of an image; with "small", a thumbnail."""
        pane = self._asked(request)
        source = self.sources[pane.store]
        pixels = source.pixels(pane) if "small" in request.query_params else source.picture(pane)
        if pixels is None:
            raise Refused(404, "A text has no picture.")
        picture, file = Image.fromarray(pixels), io.BytesIO()
        kind = "jpeg" if "small" in request.query_params else "png"
        if kind == "jpeg":
            picture.thumbnail((_SMALL, _SMALL))
        picture.save(file, kind)
        return Response(file.getvalue(), media_type=f"image/{kind}")

    def _asked(self, request: Request) -> Pane:
        """The store and the image that an address names."""
        numbers = {name: request.query_params.get(name, "0") for name in ("store", "image")}
        if not all(text.isascii() and text.isdigit() and len(text) < 8 for text in numbers.values()):
            raise Refused(400, "Store and image are numbers.")
        try:
            return self._pane({name: int(text) for name, text in numbers.items()})
        except ValueError as error:
            raise Refused(404, str(error)) from error

    async def _photo(self, request: Request) -> Response:
        """Run the model on a photo; it joins the images of a store."""
        pane, body = self._asked(request), await body_of(request)
        source = self.sources[pane.store]
        if len(source.images) - len(source.store.images) >= ADDED:
            return JSONResponse({"error": f"{ADDED} photos have been added; start the explorer again for more."})
        try:
            return JSONResponse(await run_in_threadpool(_added, source, body, request.query_params.get("name", "")))
        except FAILURES as error:
            return JSONResponse({"error": sentence(error)})

    def _file(self, request: Request) -> Response:
        """The page as a file that needs no server."""
        from mamba_attn.viewer.report.content import make  # here, because the server starts faster without it

        pane, stores = self._asked(request), [source.store for source in self.sources]
        start = request.query_params.get("state", "")[:20_000]
        wanted = (pane.store, pane.image)
        try:
            text, _ = make(
                stores, ("pca",), 4, 8.0, "mamba-attn explore", sources=self.sources, first=wanted, start=start
            )
        except FAILURES as error:
            raise Refused(409, f"The page cannot be made: {sentence(error)}") from error
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
    image = source.images[number]
    return {"image": number, "entry": [image.key, None, image.predicted, None, False]}


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")
