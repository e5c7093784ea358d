"""Checks the options of our models before they are built: one rule per option name."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from mamba_attn.errors import nearest
from mamba_attn.orders import ORDERS

Given = ParamSpec("Given")
Built = TypeVar("Built")
Rule = Callable[[Any], Exception | None]  # a value -> what is wrong with it

CLASS_TOKENS = ("middle", "first", None)
GENERATIONS = ("v0", "v05_noz")
SECONDS = ("transpose", "mirror")
_FEW = 3  # choices listed in a message
_INSTEAD = {  # of timm's options
    "pretrained": "Give create weights='official', 'demo' or a file.",
    "features_only": "num_classes=0 gives a model without a classifier, which returns features.",
}


def checked(build: Callable[Given, Built]) -> Callable[Given, Built]:
    """Decorate a model's builder to check its options, all keywords, before it runs.

    Where the builder takes any keyword, it must call ``check_known`` itself.
    """
    call, known = build.__qualname__.removesuffix(".__init__"), parameters(build)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(build).parameters.values())

    @functools.wraps(build)
    def checking(*args: Given.args, **options: Given.kwargs) -> Built:
        if not takes_any:
            check_known(call, options, known)
        for name, value in options.items():
            check_option(call, name, value)
        return build(*args, **options)

    return checking


def check_option(call: str, name: str, value: Any) -> None:
    """Refuse a value that is not possible for an option.

    Args:
        call: what is called, for the message.
        name: of the option; one without a rule may have any value.
        value: as given.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range.
    """
    rule = _RULES.get(f"{call}.{name}") or _RULES.get(
        name
    )  # timm's ViT has options of the same names with other values
    error = rule(value) if rule is not None else None
    if error is not None:
        raise type(error)(f"{call}({name}={value!r}): {error}")


def check_known(call: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Refuse options that a builder does not take.

    Args:
        call: what is called, for the message.
        options: names that were given.
        known: names of all options.

    Raises:
        TypeError: see above.
    """
    for name in options:
        if name not in known:
            instead = _INSTEAD.get(name) or nearest(name, known)
            raise TypeError(f"{call}({name}=...): there is no such option. {instead}")


def parameters(build: Callable[..., Any]) -> list[str]:
    """Return the names of a builder's options."""
    taken = inspect.signature(build).parameters.values()
    return [each.name for each in taken if each.name != "self" and each.kind is not each.VAR_KEYWORD]


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of an ``image_size``."""
    height, width = (size, size) if isinstance(size, Integral) else size  # type: ignore[misc]
    return int(height), int(width)


def _rule(expected: str, typed: Callable[[Any], bool], allowed: Callable[[Any], bool]) -> Rule:
    def rule(value: Any) -> Exception | None:
        if not typed(value):
            return TypeError(f"expected {expected}, got {type(value).__name__}.")
        return None if allowed(value) else ValueError(f"expected {expected}.")

    return rule


def _choice(what: str, choices: Sequence[str | None]) -> Rule:
    *others, last = map(repr, choices)

    def rule(value: Any) -> Exception | None:
        if (value is None or isinstance(value, str)) and value in choices:
            return None
        names = [choice for choice in choices if choice is not None]
        few = f"expected {', '.join(others)} or {last}."
        return ValueError(few if len(choices) <= _FEW else f"no such {what}. {nearest(str(value), names)}")

    return rule


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_whole(value: Any) -> bool:
    return isinstance(value, Sequence) and all(map(_is_whole, value))


def _whole(least: int) -> Rule:
    return _rule(f"a whole number of at least {least}", _is_whole, lambda value: value >= least)


def _stages(value: Sequence[int]) -> bool:
    return len(value) > 0 and min(value) >= 1


_STRIDE = _rule(
    "a whole number of at least 1, or None for patch_size",
    lambda v: v is None or _is_whole(v),
    lambda v: v is None or v >= 1,
)
_RULES: dict[str, Rule] = {
    "image_size": _rule("a side or (height, width) in pixels, whole numbers of at least 1",
                        lambda v: _is_whole(v) or _are_whole(v),
                        lambda v: v >= 1 if _is_whole(v) else len(v) == 2 and min(v) >= 1),
    "depths": _rule("the number of blocks of each stage, whole numbers of at least 1", _are_whole, _stages),
    "dims": _rule("a whole number of at least 1, or one per stage", lambda v: _is_whole(v) or _are_whole(v),
                  lambda v: v >= 1 if _is_whole(v) else _stages(v)),
    **dict.fromkeys(("patch_size", "embed_dim", "depth", "d_state", "d_conv", "expand", "num_heads"), _whole(1)),
    "vocabulary": _whole(1),
    **dict.fromkeys(("num_classes", "reg_tokens"), _whole(0)),
    "stride": _STRIDE,
    "drop_path": _rule("a number from 0 to below 1", _is_number, lambda v: 0 <= v < 1),
    "ssm_ratio": _rule("a finite number above 0", _is_number, lambda v: 0 < v < float("inf")),
    "mlp_ratio": _rule("a finite number of at least 0", _is_number, lambda v: 0 <= v < float("inf")),
    "VisionMamba.class_token": _choice("class token", CLASS_TOKENS),
    "order": _choice("order", list(ORDERS)),
    "generation": _choice("generation", GENERATIONS),
    "second": _choice("view", SECONDS),
}  # fmt: skip
