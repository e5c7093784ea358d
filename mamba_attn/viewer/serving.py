"""A threaded server for one person, bound before its address is printed; no debugger, no reloader."""

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from werkzeug.serving import BaseWSGIServer, make_server

if TYPE_CHECKING:
    import dash


@contextmanager
def bound(app: "dash.Dash", host: str, port: int) -> Iterator[BaseWSGIServer]:
    """Yield a server that is bound and not yet running; ``serve_forever`` runs it.

    Args:
        app: to serve.
        host: address; a loopback address is reached from this machine only.
        port: 0 for any that is free.

    Raises:
        OSError: the port is in use, or the address cannot be bound; a sentence.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a log line per request would only be noise
    with _socket(host, port) as listening:
        server = make_server(host, port, app.server, threaded=True, fd=listening.fileno())
        try:
            yield server
        finally:
            server.server_close()


def _socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError) as error:
        raise OSError(f"host={host!r}: no such address ({error}).") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port={port}: on {host} this port is in use, perhaps by another explorer; choose another, or "
                "port=0 for any free one."
            ) from error
        raise OSError(
            f"host={host!r} port={port}: this address cannot be bound ({error.strerror}); choose another."
        ) from error
    return listening
