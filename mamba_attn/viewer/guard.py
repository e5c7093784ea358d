"""Refuses every request that our own page would not send, without a traceback."""

import ipaddress
import json
from typing import Any

import dash
from dash.exceptions import DependencyException, InvalidResourceError
from flask import Response, abort, request

LARGEST = 16 * 2**20  # bytes of a request: a lasso over a hundred thousand points
# the page runs what this process serves; WebGL figures are compiled, pictures are data: addresses
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; worker-src 'self' blob:; frame-ancestors 'none'; "
    "form-action 'none'"
)
_UPDATE = "/_dash-update-component"
_SPLIT = ("\\", "..", "\0")  # parts of a path that no file of the page contains


def guard(app: dash.Dash, host: str) -> None:
    """Refuse requests that are not for this app, and forbid its pages to load anything from elsewhere.

    Args:
        app: whose server it is.
        host: that it is bound to.
    """
    server = app.server
    server.config["MAX_CONTENT_LENGTH"] = LARGEST
    local = _loopback(host)

    @server.before_request
    def _names() -> None:
        if local and not _loopback(request.host.rpartition(":")[0] if ":" in request.host[-6:] else request.host):
            abort(403, "This explorer answers to 127.0.0.1 and localhost only.")
        if any(part in request.path for part in _SPLIT):
            abort(404)
        if request.path == _UPDATE and request.method == "POST" and not _is_call(app, _parsed(request.get_data())):
            abort(400, "This is no call of the page.")

    @server.errorhandler(InvalidResourceError)
    @server.errorhandler(DependencyException)
    def _no_such_file(_: Exception) -> tuple[str, int]:
        return "There is no such file.", 404

    @server.after_request
    def _headers(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # ValueError includes bytes that are no text
        return None


def _is_call(app: dash.Dash, body: Any) -> bool:
    """Whether JSON has the shape that dash's page sends for one of our callbacks."""
    if not isinstance(body, dict) or not isinstance(body.get("output"), str):
        return False
    known = app.callback_map.get(body["output"])
    changed = body.get("changedPropIds", [])
    if known is None or not isinstance(changed, list) or not all(isinstance(each, str) for each in changed):
        return False
    parts = [body.get(name, []) for name in ("inputs", "state")]
    if [len(part) if isinstance(part, list) else -1 for part in parts] != [
        len(known[name]) for name in ("inputs", "state")
    ]:
        return False
    outputs = body.get("outputs")
    return all(map(_is_item, parts[0] + parts[1])) and all(
        map(_is_item, outputs if isinstance(outputs, list) else [outputs])
    )


def _is_item(item: Any) -> bool:
    """Whether it names a property of one component or of several."""
    if isinstance(item, list):
        return all(isinstance(each, dict) and _is_item(each) for each in item)
    return isinstance(item, dict) and isinstance(item.get("id"), str | dict) and isinstance(item.get("property"), str)


def _loopback(name: str) -> bool:
    bare = name.strip("[]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"
