"""The runtime check of annotations that pyproject.toml names: beartype, but for two kinds of hint it refuses."""

from collections.abc import Callable
from typing import Any, Self, get_args

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as everywhere in Python


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's annotations, except those that only mypy can: ``Self``, and protocols without isinstance."""
    hints = getattr(function, "__annotations__", {})
    if any(map(_is_static, hints.values())):
        function.__annotations__ = {name: Any if _is_static(hint) else hint for name, hint in hints.items()}
    checked: Callable[..., Any] = _beartype(function)
    return checked


def _is_static(hint: object) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_is_static, hint))
    protocol = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    return hint is Self or protocol or any(map(_is_static, get_args(hint)))
