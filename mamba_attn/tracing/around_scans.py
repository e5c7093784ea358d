"""What stands around scans that are seen at their doors: convolutions and products, shown to rules that only look."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mamba_attn.core.rules import Rules
from mamba_attn.tracing.doors import Door, Handler, watching
from mamba_attn.tracing.fused_doors import CONVOLUTION_FORWARDS, holders_of

_CONVOLUTIONS = (F.conv1d, F.conv2d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)


class AroundScans(TorchFunctionMode):
    """Shows rules the depthwise convolutions and the products of two tensors of one size that a model computes.

    Args:
        rules: what to show them.
        quiet: whether the model runs for something else at the moment.
    """

    def __init__(self, rules: Rules, quiet: Callable[[], bool]) -> None:
        super().__init__()
        self.rules = rules
        self.quiet = quiet

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, and show what it was called with."""
        out = func(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS and not self.quiet():
            given = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            x, weight = given.pop("input"), given.pop("weight")
            if weight.shape[1] == 1 and given.get("groups", 1) == x.shape[-weight.ndim + 1] == len(weight):
                self.rules.convolved(x, weight, **given)
        elif func in _PRODUCTS and _of_one_size(args) and not self.quiet():
            self.rules.multiplied(*args)
        return out


def _of_one_size(factors: tuple[Any, ...]) -> bool:
    return all(isinstance(t, Tensor) for t in factors) and len({t.numel() for t in factors}) == 1


def convolution_doors() -> Iterator[tuple[ModuleType, dict[str, Handler]]]:
    """Every loaded module that holds the compiled causal convolution, with what shows it to rules."""
    return holders_of({name: partial(_convolved, name) for name in CONVOLUTION_FORWARDS})


def _convolved(name: str, door: Door, *args: Any, **kwargs: Any) -> Any:
    """The compiled causal convolution: x (batch, channels, length), weight (channels, taps), bias, its states."""
    found = door.own[name](*args, **kwargs)
    for watch, _ in watching(sys._getframe(1)):
        if watch.rules is not None and watch.rules.observes and len(args) > 3 and not _outside(args[3:]):
            x, weight, bias = args[:3]
            watch.rules.convolved(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    return found


def _outside(rest: tuple[Any, ...]) -> bool:
    """Whether several sequences stand in one row, or states come from outside."""
    return any(isinstance(value, Tensor) for value in rest)
