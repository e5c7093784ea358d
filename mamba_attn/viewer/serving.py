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


@contextmanager
def bound(app: "Explorer", host: str, port: int) -> Iterator[tuple[uvicorn.Server, socket.socket]]:
    """Yield a server and the socket it is bound to; ``server.run(sockets=[listening])`` serves until Ctrl+C.

    From another thread, ``server.should_exit = True`` ends it.

    Args:
        app: to serve.
        host: address; a loopback address is reached from this machine only.
        port: 0 for any that is free.

    Raises:
        OSError: the port is in use, or the address cannot be bound; a sentence.
    """
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
    with _socket(host, port) as listening:
        try:
            yield uvicorn.Server(settings), listening
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
