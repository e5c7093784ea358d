"""A server for one person, bound before its address is printed."""

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from mamba_attn.viewer.server import Explorer


class Bound:
    """A server that is bound and not yet running.

    Args:
        app: to serve.
        listening: its socket.
    """

    def __init__(self, app: "Explorer", listening: socket.socket) -> None:
        self.port = int(listening.getsockname()[1])
        self._socket = listening
        settings = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        self._server = uvicorn.Server(settings)

    def serve_forever(self) -> None:
        """Serve until Ctrl+C, or ``shutdown`` from another thread."""
        self._server.run(sockets=[self._socket])

    def shutdown(self) -> None:
        """Stop ``serve_forever``."""
        self._server.should_exit = True


@contextmanager
def bound(app: "Explorer", host: str, port: int) -> Iterator[Bound]:
    """Yield a server that is bound and not yet running; ``serve_forever`` runs it.

    Args:
        app: to serve.
        host: address; a loopback address is reached from this machine only.
        port: 0 for any that is free.

    Raises:
        OSError: the port is in use, or the address cannot be bound; a sentence.
    """
    with _socket(host, port) as listening:
        try:
            yield Bound(app, listening)
        finally:
            app.close()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log says more than that Ctrl+C ended a request."""
    cancelled = record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError
    return not cancelled and "graceful shutdown" not in record.getMessage()


def _socket(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port={port}: on {host} this port is in use, perhaps by another explorer; choose another, or "
                "port=0 for any free one."
            ) from error
        raise OSError(f"host={host!r} port={port}: this address cannot be bound ({error}); choose another.") from error
