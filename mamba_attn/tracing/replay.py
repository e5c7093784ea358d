"""Calling a model again as it was called, and leaving it as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamba_attn.errors import TraceError
from mamba_attn.tracing.undisturbed import undisturbed


@dataclass
class Replay:
    """How a model was called, so that it can be called that way again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: list[tuple[str, torch.dtype]] = field(default_factory=list)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Replay":
        """Copies of the tensors: a model may write over what it is given."""
        found = cls(args, kwargs).changed(Tensor.clone)
        devices = {"cpu", *(value.device.type for value in found.tensors)}
        found.autocast = [(d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)]
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [value for value in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(value, Tensor)]

    @property
    def batch(self) -> int | None:
        """Number of images, where every tensor's first axis is as long."""
        sizes = {value.shape[0] if value.ndim else 0 for value in self.tensors}
        return sizes.pop() if len(sizes) == 1 else None

    def changed(self, function: Callable[[Tensor], Tensor]) -> "Replay":
        """With every tensor changed, outside all graphs."""
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = pytree.tree_map(
                lambda value: function(value.detach()) if isinstance(value, Tensor) else value, (self.args, self.kwargs)
            )
        return Replay(args, kwargs, self.autocast)

    @property
    def key(self) -> tuple[Any, ...]:
        """What orders may depend on, of the arguments: shapes, types and everything that is no tensor."""
        return tuple(
            (tuple(value.shape), value.dtype, str(value.device)) if isinstance(value, Tensor) else repr(value)
            for value in pytree.tree_leaves((self.args, self.kwargs))
        )


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """In eval mode and with frozen parameters inside, since only where gradients go matters; as before after it."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise TraceError(
            "the order of the scans' tokens is measured by gradients, and the model was built in inference mode: "
            "build it outside torch.inference_mode(), or pass orders= to trace()."
        )
    with undisturbed(model, hooks=True):
        # read here, where no other thread has them changed for the same purpose
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
