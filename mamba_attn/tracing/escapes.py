"""Where relevance is lost: what leaves every module of a model against what enters it, in a pass with rules."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamba_attn.tracing.doors import measuring
from mamba_attn.tracing.undisturbed import recomputing


class Meter:
    """The relevance, tensor times gradient, that went through every module.

    Args:
        model: whose modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lost: dict[str, float] = {}  # what left minus what entered, in the order in which modules end
        self._thread = get_ident()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Look at every module's calls inside the block; the backward pass may come later."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                enter, leave = partial(self._enters, name), partial(self._leaves, name)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield

    def _enters(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._watches():
            return None

        def own(value: Any) -> Any:
            if not _counts(value):
                return value
            view = value.view_as(value)  # whose gradient is this module's alone
            self._note(name, view, -1.0)
            return view

        return pytree.tree_map(own, (args, kwargs))

    def _leaves(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._watches():
            self._lost.setdefault(name, 0.0)
            for value in pytree.tree_leaves(output):
                if _counts(value):
                    self._note(name, value, 1.0)

    def _watches(self) -> bool:
        """Whether this is the pass with rules, and neither a part of it again nor a pass that measures orders."""
        return self._thread == get_ident() and not recomputing() and not measuring()

    def _note(self, name: str, tensor: Tensor, sign: float) -> None:
        value, lost = tensor.detach(), self._lost

        def add(gradient: Tensor) -> None:
            lost[name] = lost.get(name, 0.0) + sign * float((value.double() * gradient.double()).sum())

        tensor.register_hook(add)

    def leaks(self, constants: Mapping[str, Tensor], tolerance: float) -> list[str]:
        """Names and types of the modules that lose or make more relevance than the tolerance, and no part of them does.

        Args:
            constants: the shares of constants, by names that begin with the module's.
            tolerance: in units of the target.
        """
        total = {name: lost - _inside(name, constants) for name, lost in self._lost.items()}
        own = dict(total)
        for name in total:
            around = [name[:end] for end in range(len(name)) if name[end] == "."]
            outer = next((other for other in reversed(["", *around]) if other in own and other != name), None)
            if outer is not None:
                own[outer] -= total[name]
        modules = dict(self._model.named_modules())
        leaking = [name for name, lost in own.items() if abs(lost) > tolerance]
        return [f"{name or 'the model itself'} ({type(modules[name]).__name__})" for name in leaking]


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point() and torch.is_grad_enabled()


def _inside(name: str, constants: Mapping[str, Tensor]) -> float:
    return sum(
        float(share.double().sum()) for key, share in constants.items() if not name or key.startswith(f"{name}.")
    )
