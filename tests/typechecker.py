"""The runtime check of annotations that pyproject.toml names: beartype, and jaxtyping where a shape is annotated.

jaxtyping's own check binds the arguments of every call by Python's ``inspect``: over a suite that is most of its time.
Only functions whose annotations name axes need it, since an axis has one size in all arguments of a call. Functions
defined inside another are left to mypy: the check of each would be compiled in every call of the outer one.
"""

import inspect
from collections.abc import Callable
from typing import Any, Self, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

# an int is a float, as everywhere in Python; a wrong type is the error that code raises and catches for one
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_with_axes = jaxtyping.jaxtyped


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's annotations, except those that only mypy can: ``Self``, and protocols without isinstance."""
    hints = getattr(function, "__annotations__", {})
    if any(map(_is_static, hints.values())):
        function.__annotations__ = {name: Any if _is_static(hint) else hint for name, hint in hints.items()}
    checked: Callable[..., Any] = _beartype(function)
    return checked


def _jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Stand in for ``jaxtyping.jaxtyped``, which jaxtyping's import hook puts on every function and class."""

    def decorate(decorated: Any) -> Any:
        if not inspect.isfunction(decorated) or any(map(_names_axes, decorated.__annotations__.values())):
            return _with_axes(decorated, typechecker=typechecker)
        return decorated if "<locals>" in decorated.__qualname__ else check(decorated)

    return decorate


jaxtyping.jaxtyped = _jaxtyped


def _names_axes(hint: object) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_names_axes, hint))
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or isinstance(hint, str) or any(map(_names_axes, get_args(hint)))


def _is_static(hint: object) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_is_static, hint))
    protocol = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    return hint is Self or protocol or any(map(_is_static, get_args(hint)))
