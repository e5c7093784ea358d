"""What a trace installs on a user's model, and takes off again: forwards of mixers, and hooks.

``tracer`` says what is traced and owns the ExitStack; ``module_rules`` patches the norms, activations and linear layers
around the mixers. Nothing else touches a user's model.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock, get_ident
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mamba_attn.core.rules import PLAIN, Rules, unruled
from mamba_attn.errors import TraceError
from mamba_attn.ops import hidden_attention, selective_scan
from mamba_attn.tracing.adapters import AnyAdapter, AttentionAdapter, LayoutSource, Seen
from mamba_attn.tracing.layers import AttentionLayer, Layer, ScanLayer


@dataclass(frozen=True, eq=False)
class Interest:
    """One trace's interest in one mixer.

    Args:
        name: the mixer's name in the model.
        store: takes the layer of a call.
        seen: what the forward pass has shown so far.
        adapter: the mixer's.
        attention: a fold whose matrix is computed during the pass, or None.
        rules: what changes in the forward, or None.
        thread: whose calls are traced.
    """

    name: str
    store: Callable[[Layer], None]
    seen: Seen
    adapter: AnyAdapter
    attention: str | None
    rules: Rules | None
    thread: int


class PatchedForward(ABC):
    """Stands in a module's ``forward`` while anybody traces it; calls of other threads go to the original."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = module.forward
        self.__wrapped__ = module.forward  # adapters read which function that is
        self.own = "forward" in module.__dict__  # SS2D of VMamba sets its forward on the instance
        self.interests: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model made inside a trace gets its plain forward, bound to the copy."""
        function = getattr(self.original, "__func__", None)
        return self.original if function is None else MethodType(function, copy.deepcopy(self.module, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer in the forward's place, for the traces that this thread has open."""
        again = recomputing()
        interests = [interest for interest in tuple(self.interests) if again or interest.thread == get_ident()]
        return self.run(interests, again, *args, **kwargs) if interests else self.original(*args, **kwargs)

    @abstractmethod
    def run(self, interests: list[Any], again: bool, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward as its traces want it; ``again`` when checkpointing repeats it."""


class _RoutedForward(PatchedForward):
    """A mixer's forward, through ``mamba_attn.ops``."""

    @unruled()
    def run(self, interests: list[Interest], again: bool, /, *args: Any, **kwargs: Any) -> Any:
        store = [] if again else interests
        adapter, seen = interests[-1].adapter, interests[-1].seen
        rules = next((interest.rules for interest in reversed(interests) if interest.rules is not None), PLAIN)
        if isinstance(adapter, AttentionAdapter):
            record = rules.attention(adapter.project(self.module, *args, rules=rules, seen=seen, **kwargs))
            _start_gradients(record.probabilities)
            output = adapter.finish(self.module, record, record.probabilities, rules)
            for interest in store:
                interest.store(AttentionLayer(interest.name, record, output=output))
            return output
        scan = rules.scan(adapter.project(self.module, *args, rules=rules, seen=seen, **kwargs))
        wanted = dict.fromkeys(interest.attention for interest in interests if interest.attention)
        folds = {fold: selective_scan(scan, attention=fold) for fold in wanted}
        y = next(iter(folds.values()))[0] if folds else selective_scan(scan)
        _start_gradients(y)
        output = adapter.finish(self.module, scan, y, rules)
        for interest in store:
            ready = (interest.attention, folds[interest.attention][1]) if interest.attention else None
            interest.store(ScanLayer(interest.name, scan, y=y, output=output, attention=ready))
        return output


def recomputing() -> bool:
    """Whether gradient checkpointing repeats a forward inside a backward pass, in whatever thread that runs."""
    return torch._C._current_graph_task_id() != -1


def _start_gradients(variable: Tensor) -> None:
    """In a frozen model, let gradients with respect to a layer's variable start at it."""
    if torch.is_grad_enabled() and not variable.requires_grad:
        variable.requires_grad_()


_install = Lock()


@contextmanager
def patched(module: nn.Module, interest: Any, kind: type[PatchedForward] = _RoutedForward) -> Iterator[None]:
    """Install a forward on the instance, by default one that runs a mixer through ``mamba_attn.ops``.

    Undone when the last interest in it ends.
    """
    with _install:
        found = module.__dict__.get("forward")
        forward = found if isinstance(found, kind) else kind(module)
        module.__dict__["forward"] = forward
        forward.interests.append(interest)
    try:
        yield
    finally:
        with _install:
            forward.interests.remove(interest)
            # a forward that somebody put around ours stays
            if not forward.interests and module.__dict__.get("forward") is forward:
                if forward.own:
                    module.__dict__["forward"] = forward.original
                else:
                    del module.__dict__["forward"]


@contextmanager
def observed(module: nn.Module, interest: Interest) -> Iterator[None]:
    """Install a hook that recomputes the record of a call, which runs untouched, from its input."""
    handle = module.register_forward_hook(partial(_observe, interest), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _observe(interest: Interest, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    again = recomputing()
    if interest.thread != get_ident() and not again:
        return
    store = _forget if again else interest.store  # checkpointing wants the same computations again, nobody else does
    adapter = interest.adapter
    finish: Callable[[Tensor], Tensor]
    if isinstance(adapter, AttentionAdapter):
        record = adapter.project(module, *args, rules=PLAIN, seen=interest.seen, **kwargs)
        finish = partial(adapter.finish, module, record.map_tensors(Tensor.detach), rules=PLAIN)
        store(AttentionLayer(interest.name, record, output=output, tail=_repeatable(interest.name, module, finish)))
        return
    scan = adapter.project(module, *args, rules=PLAIN, seen=interest.seen, **kwargs)
    finish = partial(adapter.finish, module, scan.map_tensors(Tensor.detach), rules=PLAIN)
    ready = (interest.attention, hidden_attention(scan, fold=interest.attention)) if interest.attention else None
    tail = _repeatable(interest.name, module, finish)
    store(ScanLayer(interest.name, scan, output=output, tail=tail, attention=ready))


def _forget(layer: Layer) -> None:
    """Store nothing."""


def _repeatable(name: str, module: nn.Module, finish: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``finish``, unless it would draw other random numbers than the model's own forward did."""
    if not any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in module.modules()):
        return finish

    def refuse(variable: Tensor) -> Tensor:
        raise TraceError(
            f"{name}: gradients() cannot repeat active dropout in mode='observe'; use mode='route', or model.eval()."
        )

    return refuse


def watch_layout(stack: ExitStack, model: nn.Module, sources: Iterable[LayoutSource], seen: Seen) -> None:
    """Learn the image size from the first convolution's input, and the token frame from the patch embedding."""
    thread = get_ident()

    def image(module: nn.Conv2d, args: tuple[Any, ...]) -> None:
        if thread == get_ident() and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            seen.batch, seen.image_size = args[0].shape[0], (args[0].shape[2], args[0].shape[3])
            seen.padded_stem = module.padding == tuple((size - 1) / 2 for size in module.kernel_size)

    def device(module: nn.Module, args: tuple[Any, ...]) -> None:
        weight = next(module.parameters(), None)
        given = next((value for value in args if isinstance(value, Tensor)), None)
        if weight is None or given is None or thread != get_ident() or given.device == weight.device:
            return
        raise ValueError(
            f"the model is on {weight.device} and its input on {given.device}: move one, e.g. "
            f"images.to({str(weight.device)!r})."
        )

    stack.callback(model.register_forward_pre_hook(device, prepend=True).remove)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None:
        stack.callback(first.register_forward_pre_hook(image).remove)
    given = seen.layout is not None

    def look(source: LayoutSource, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if thread != get_ident():
            return
        if source.inside:  # kept for each: gradient checkpointing runs a block again, but not what stands around it
            layout = source.read(seen, args, output)
            seen.frames.update(dict.fromkeys(module.modules(), layout) if layout is not None else {})
        elif not given:
            seen.layout = source.read(seen, args, output)

    for source in sources:
        install = source.module.register_forward_pre_hook if source.before else source.module.register_forward_hook
        stack.callback(install(partial(look, source)).remove)
