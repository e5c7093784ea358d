"""Refuses every request that our own page would not send."""

import asyncio
import ipaddress

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 16 * 2**20  # bytes of a request: a photo, or a lasso over a hundred thousand points
_PATIENCE = 20.0  # seconds for a request's body


class Guard:
    """Answers only requests for this app's own name and origin, and forbids its answers to be used elsewhere.

    A web page could otherwise reach the app through a name of its own (DNS rebinding), or post to it.

    Args:
        app: behind it.
        host: that the app is bound to; if it is no loopback address, every name is answered.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._local = app, _loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._local and not _loopback(_name(host)):
            refusal = PlainTextResponse("This explorer answers to 127.0.0.1 and localhost only.", 403)
            return await refusal(scope, receive, send)
        if origin is not None and origin != f"{scope.get('scheme', 'http')}://{host}":
            return await PlainTextResponse("Requests of other pages are refused.", 403)(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                                       (b"cross-origin-resource-policy", b"same-origin"),
                                       (b"cache-control", b"no-store")]  # fmt: skip
            await send(message)

        await self._app(scope, receive, with_headers)


async def body_of(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        HTTPException: it is too long, or comes too slowly.
    """
    found = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE):
            async for part in request.stream():
                found += part
                if len(found) > LARGEST:
                    raise HTTPException(413, f"A request has at most {LARGEST:,} bytes.")
    except TimeoutError as error:
        raise HTTPException(408, "The request came too slowly.") from error
    return bytes(found)


def _name(host: str) -> str:
    """A Host header without its port."""
    return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _loopback(name: str) -> bool:
    bare = name.strip("[]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"
