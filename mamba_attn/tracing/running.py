"""Which module of a model is running, and what a model's modules and parameters are called."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from types import FrameType

import torch
from torch import Tensor, nn

_CALLS = {nn.Module._call_impl.__code__}


def running_modules(frame: FrameType | None) -> Iterator[nn.Module]:
    """The modules whose calls this frame stands in, innermost first."""
    while frame is not None:
        if frame.f_code in _CALLS:
            yield frame.f_locals["self"]
        frame = frame.f_back


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, as ``named_modules`` has them, in half of its time: every trace asks."""
    found: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in found:
            continue
        found[module] = name
        if module._modules:
            before = f"{name}." if name else ""
            children = [(before + key, child) for key, child in module._modules.items() if child is not None]
            waiting += reversed(children)
    return {name: module for module, name in found.items()}


class Names:
    """The names of a model's modules and parameters.

    Args:
        model: the model.
        modules: its modules by name, where they are known.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> None:
        named = modules_of(model) if modules is None else modules
        self.modules = dict(zip(map(id, named.values()), named, strict=True))
        self._model = model

    @cached_property
    def _parameters(self) -> dict[int, str]:
        return {
            parameter.data_ptr(): name
            for name, parameter in self._model.named_parameters()
            if parameter.layout == torch.strided and parameter.numel()
        }

    def running(self, frame: FrameType | None) -> str | None:
        """Name of the innermost module of the model whose call this frame stands in."""
        names = (self.modules.get(id(module)) for module in running_modules(frame))
        return next((name for name in names if name is not None), None)

    def constant(self, constant: object, where: str, what: str = "constant") -> str:
        """Name of a constant: the parameter that it is a view of, or ``what`` in the module ``where``."""
        known = self._parameters.get(constant.data_ptr()) if isinstance(constant, Tensor) else None
        return known or f"{where}.{what}".removeprefix(".")
