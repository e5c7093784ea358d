"""What a trace means for a model while it is open: its copies are not traced, and it cannot be run without numbers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from mamba_attn.errors import TraceError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # of nn.Module; what else it keeps of hooks goes by their ids
_OURS = __name__.partition(".")[0]


class _Copies:
    """Stands in for a model's ``__deepcopy__``; counts the traces that are open."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.open = model, 0

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        """Return a copy without anything of the traces."""
        gone, own = object(), vars(self.model)
        for module in self.model.modules():
            for name in _HOOKS:
                memo.update((id(hook), gone) for hook in getattr(module, name).values() if _is_ours(hook))
        shields = {name: own.pop(name) for name in ("__deepcopy__", "__reduce_ex__")}
        try:
            made = copy.deepcopy(self.model, memo)
        finally:
            own.update(shields)
        for module in made.modules():
            for name in _HOOKS:
                hooks = getattr(module, name)
                for key in [key for key, hook in hooks.items() if hook is gone]:
                    del hooks[key]
            forward = vars(module).get("forward")
            if getattr(forward, "__func__", None) is type(module).forward:  # it stood in the traced one's place
                del module.forward
        return made


def _refuse_pickling(*_: Any) -> NoReturn:
    raise TraceError(
        "this model is being traced, so its hooks would be saved with it: save it before the with-block or after it; "
        "inside, model.state_dict() gives its weights."
    )


def _is_ours(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] == _OURS


@contextmanager
def copied_untraced(model: nn.Module) -> Iterator[None]:
    """Let copies of a model be plain while this is open; traces may be nested, or of several threads.

    Args:
        model: the one that is traced.

    Raises:
        TraceError: by ``pickle`` and ``torch.save`` of the model.
    """
    own = vars(model)
    copies = own.get("__deepcopy__")
    if copies is None:
        copies = _Copies(model)
        own.update(__deepcopy__=copies, __reduce_ex__=_refuse_pickling)
    if not isinstance(copies, _Copies):  # the model has its own way of being copied
        yield
        return
    copies.open += 1
    try:
        yield
    finally:
        copies.open -= 1
        if not copies.open:
            del own["__deepcopy__"], own["__reduce_ex__"]


def require_numbers() -> None:
    """Refuse to trace a call whose tensors hold no numbers of their own.

    Raises:
        TraceError: inside a transform of ``torch.func``, or while ``torch.export`` runs.
    """
    if torch._C._are_functorch_transforms_active():
        raise TraceError(
            "trace(...): torch.func (grad, vmap, jvp, ...) transforms this call, whose tensors a trace cannot keep. "
            "Call the model plainly inside the trace; trace.gradients(...) gives gradients."
        )
    if _exporting():
        raise TraceError("trace(...): torch.export runs the model, without numbers. Export it outside the trace.")


def _exporting() -> bool:
    """Whether ``torch.export`` runs the model."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()  # before torch 2.7
