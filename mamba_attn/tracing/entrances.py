"""What enters the modules of a model during a forward pass, and through which of it everything flows to a layer."""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamba_attn.errors import TraceError
from mamba_attn.tracing.dependence import Sources, edge_of
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.running import running_modules
from mamba_attn.tracing.undisturbed import recomputing


@dataclass(frozen=True, eq=False)
class Arrival:
    """One call of a module: its name, and the tensors with gradients that it was given."""

    module: str
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def unchanged(self) -> list[Tensor]:
        """The tensors that nothing wrote over since."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return [tensor for tensor, version in pairs if tensor._version == version]


class Arrivals:
    """Every call of the modules of a model, in order; gradients start at what the model itself is given.

    Args:
        model: whose modules.
        quiet: whether the model runs for something else at the moment.
    """

    def __init__(self, model: nn.Module, quiet: Callable[[], bool]) -> None:
        self.sources = Sources()
        self.quiet = quiet
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._calls: list[Arrival] = []
        self._thread = get_ident()

    def install(self, stack: ExitStack) -> None:
        """Look at every module's calls; ``stack`` undoes it."""
        for name, module in self._model.named_modules():
            hook = partial(self._arrives, name)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)

    def _arrives(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._thread != get_ident() or recomputing() or not torch.is_grad_enabled() or self.quiet():
            return None
        around = (other for other in running_modules(sys._getframe(1)) if other is not module)
        outermost = not any(id(other) in self._names for other in around)
        if outermost:
            args, kwargs = self._start(args, kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        self._calls.append(Arrival(name, tuple(given), tuple(t._version for t in given)))
        return (args, kwargs) if outermost else None

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let gradients start at the floating-point tensors of a call; at embeddings where there are none.

        Where some require a gradient, the others are held: they are no part of what is explained.
        """
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        held = any(tensor.requires_grad for tensor in given)

        def start(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or (held and not value.requires_grad):
                return value
            if value.requires_grad:
                self.sources.tensors.append(value)
                return value
            leaf = value.detach().requires_grad_()
            self.sources.tensors.append(leaf)
            return leaf.clone()  # which the model may write over

        started: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(start, (args, kwargs))
        self.sources.words = not self.sources.tensors
        return started

    def entrance(
        self, layer: Layer, earlier: Sequence[Layer], end: Tensor, holds: Callable[[Tensor], bool]
    ) -> tuple[list[Tensor], bool]:
        """Return the tensors of tokens that enter a layer, and whether everything in ``end`` came through them.

        Those that the outermost module around the layer was given, of the modules that hold neither an earlier layer
        nor the stem. Where the residual stream does not go through that module, the last tensors before it that
        everything went through.

        Args:
            layer: the layer.
            earlier: the layers before it.
            end: what is explained.
            holds: whether a tensor holds the layer's tokens.

        Raises:
            TraceError: nothing that any module around the layer was given holds its tokens.
        """
        around = self._around(layer, earlier)
        candidates = [found for i in around if (found := list(filter(holds, self._calls[i].unchanged())))]
        before = (filter(holds, self._calls[i].unchanged()) for i in reversed(range(max(around, default=0))))
        for found in (*candidates, *map(list, before)):
            if found and not self.sources.flow_past(end, {edge_of(tensor) for tensor in found}):
                return found, True
        if candidates:
            return candidates[0], False
        given = (tensor for i in around for tensor in self._calls[i].tensors)
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given) or "nothing"
        raise TraceError(
            f"what enters {layer.name} and the modules around it ({shapes}) does not have its {layer.tokens} tokens, "
            "so relevance cannot be read there; choose other layers with layers=."
        )

    def _around(self, layer: Layer, earlier: Sequence[Layer]) -> list[int]:
        """Numbers of the calls of the modules around a layer and of its own, outermost first."""
        module, run = _module_of(layer)
        others = {name for name, _ in map(_module_of, earlier)} - {module}
        mixers = [*others, module]
        convolutions = (n for n, m in self._model.named_modules() if isinstance(m, nn.modules.conv._ConvNd))
        others |= set([name for name in convolutions if not any(_inside(name, mixer) for mixer in mixers)][:1])
        own = [i for i, call in enumerate(self._calls) if call.module == module]
        if len(own) <= run:
            return []
        around = []
        for name in ["", *(module[:end] for end, letter in enumerate(module + ".") if letter == ".")]:
            latest = [i for i, call in enumerate(self._calls[: own[run] + 1]) if call.module == name]
            if latest and not any(_inside(other, name) for other in others):
                around.append(latest[-1])
        return around


def _module_of(layer: Layer) -> tuple[str, int]:
    """The name of a layer's module, and in which of its calls it was seen, from 0."""
    if isinstance(layer, DoorLayer):
        return layer.calls[0].module, layer.calls[0].run
    name, _, number = layer.name.partition("#")
    return name, int(number) - 1 if number else 0


def _inside(name: str, outer: str) -> bool:
    return not outer or f"{name}.".startswith(f"{outer}.")
