"""Run a part of a user's model once more: modes, buffers, random numbers and hooks are as before."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def undisturbed(module: nn.Module, *, hooks: bool = False) -> Iterator[None]:
    """Put a module in eval mode, to be called inside the block; afterwards everything is as before.

    Args:
        module: a model or a part of one.
        hooks: whether its hooks, the user's own among them, see the calls.
    """
    modules = list(module.modules())
    modes = [(each, each.training) for each in modules]
    buffers = [
        (each, name, value, None if value is None else value.clone())
        for each in modules
        for name, value in each._buffers.items()
    ]
    kept = [] if hooks else [(each, name, vars(each)[name]) for each in modules for name in _HOOKS if vars(each)[name]]
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            module.eval()
            for each, name, _ in kept:
                vars(each)[name] = OrderedDict()
            yield
        finally:
            for each, name, value in kept:
                vars(each)[name] = value
            for each, mode in modes:
                each.training = mode
            for each, name, value, copy in buffers:
                each._buffers[name] = value
                if value is not None and copy is not None and not torch.equal(value, copy):
                    value.copy_(copy)
