"""trace(model): the only place that touches a user's model.

Everything it installs is owned by one ExitStack and by one entry of the context manager: nothing is left on the model
after normal exit, an exception, a failure half way through, nesting, or another thread's use of the same model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mamba_attn.adapters import AnyAdapter, AttentionAdapter, Seen, find_mixers, require_supported
from mamba_attn.attention_layer import AttentionLayer
from mamba_attn.errors import TraceError, UnknownLayerError, nearest
from mamba_attn.layers import Layer, ScanLayer
from mamba_attn.layout import TokenLayout
from mamba_attn.ops import selective_scan
from mamba_attn.ops._arguments import FOLDS
from mamba_attn.rules import PLAIN, Rules

_MODES = ("route", "observe")
_GRADIENTS = ("y", "output")


class Trace(Mapping[str, Layer]):
    """The layers of one forward pass, by name, in execution order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._layers: dict[str, Layer] = {}
        self._repeated: set[str] = set()

    def __getitem__(self, name: str) -> Layer:
        if name not in self._names:
            raise UnknownLayerError(f"no traced layer is called {name!r}. {nearest(name, self._names)}")
        if name not in self._layers:
            raise TraceError(f"{name} has not run: call the model inside the with-block first, then read the trace.")
        if name in self._repeated:
            raise TraceError(f"{name} ran twice inside one trace(): use one trace per forward pass.")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def layers(self) -> list[Layer]:
        """The layers in execution order."""
        return [self[name] for name in self]

    def gradients(self, scalar: Tensor, of: str = "y") -> dict[str, Tensor]:
        """Return the gradient of a scalar with respect to every layer's ``variable``, or ``output``.

        The graph is kept, so several targets can be asked for. Nothing accumulates in ``.grad``.

        Args:
            scalar: computed from this forward pass, e.g. ``logits[:, 7].sum()``.
            of: "y", the layers' ``variable``: y (batch, channels, tokens) of scans, the probabilities (batch, heads,
                tokens, tokens) of attention; or "output", what the mixer returned, in the mixer's own shape.

        Raises:
            TraceError: the forward pass ran without gradients, or the scalar does not depend on it; dropout was active
                in mode "observe"; a mixer that returned no tensor.
            ValueError: another ``of``.
        """
        if of not in _GRADIENTS:
            raise ValueError(f"gradients(of={of!r}): expected one of {_GRADIENTS}.")
        layers = self.layers
        direct = [layer.variable if of == "y" and layer._tail is None else layer.output for layer in layers]
        attached = [tensor for tensor in direct if tensor.requires_grad]
        if len(attached) < len(layers) or not scalar.requires_grad:
            raise TraceError("gradients(): the forward pass ran without gradients; call the model outside no_grad().")
        found = torch.autograd.grad(scalar, attached, retain_graph=True, allow_unused=True)
        result = {}
        for layer, tensor, gradient in zip(layers, attached, found, strict=True):
            filled = torch.zeros_like(tensor) if gradient is None else gradient
            result[layer.name] = filled if of == "output" or layer._tail is None else _through_tail(layer, filled)
        return result

    def _store(self, layer: Layer) -> None:
        if layer.name in self._layers:
            self._repeated.add(layer.name)
        self._layers[layer.name] = layer


@contextmanager
def trace(
    model: nn.Module,
    *,
    layers: Iterable[str] | None = None,
    mode: str = "route",
    attention: str | None = None,
    layout: TokenLayout | None = None,
    rules: Rules | None = None,
    adapters: Iterable[AnyAdapter] | None = None,
) -> Iterator[Trace]:
    """Record the selective scans, and the softmax attention, of the next forward pass of a model.

    Args:
        model: a model with mixers of a known family, as it is; it is neither switched to eval nor changed.
        layers: names or patterns (``"layers.1?.mixer"``) of mixers. Default: all.
        mode: "route" runs the mixers' equations through ``mamba_attn.ops``, and softmax attention through its explicit
            probabilities, submodules called as modules; "observe" leaves the model's own forward untouched and
            recomputes the record from each mixer's input.
        attention: a fold whose matrix is computed during the pass; None computes matrices when asked.
        layout: the token frame, where it cannot be read from the model.
        rules: what an attribution method changes in the forward (mode "route").
        adapters: asked before the known ones.

    Yields:
        A Trace: a mapping from names to layers, filled by the forward pass. Records keep the autograd graph when the
        pass ran with gradients.

    Raises:
        UnsupportedModelError: nothing to trace, or a variant that is refused.
        UnknownLayerError: a name or pattern that fits no mixer.
        ValueError: an unknown mode or fold, rules in mode "observe".

    Example:
        >>> with trace(model) as record:
        ...     logits = model(images)
        >>> record["layers.6.mixer"].attention().shape
        torch.Size([2, 197, 197])
    """
    if mode not in _MODES:
        raise ValueError(f"trace(mode={mode!r}): expected one of {_MODES}.")
    if attention is not None and attention not in FOLDS:
        raise ValueError(f"trace(attention={attention!r}): expected one of {FOLDS}.")
    if rules is not None and mode == "observe":
        raise ValueError("trace(rules=..., mode='observe'): rules change the forward; use mode='route'.")
    mixers = _select(find_mixers(model, adapters), layers)
    for name, (module, adapter) in mixers.items():
        require_supported(name, module, adapter)
    record = Trace(list(mixers))
    seen = Seen(layout=layout)
    with ExitStack() as stack:
        _watch_layout(stack, model, {adapter for _, adapter in mixers.values()}, seen)
        for name, (module, adapter) in mixers.items():
            use = _Use(name, record, seen, adapter, attention, rules, get_ident())
            if mode == "route":
                stack.enter_context(_routed(module, use))
            else:
                handle = module.register_forward_hook(partial(_observe, use), with_kwargs=True)
                stack.callback(handle.remove)
        yield record


@dataclass(frozen=True, eq=False)
class _Use:
    """One trace's interest in one mixer."""

    name: str
    record: Trace
    seen: Seen
    adapter: AnyAdapter
    attention: str | None
    rules: Rules | None
    thread: int


class _RoutedForward:
    """Stands in a mixer's ``forward`` while anybody traces it; calls of other threads go to the original."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = module.forward
        self.own = "forward" in module.__dict__  # SS2D of VMamba sets its forward on the instance
        self.uses: list[_Use] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        uses = [use for use in self.uses if use.thread == get_ident()]
        if not uses:
            return self.original(*args, **kwargs)
        adapter, seen = uses[-1].adapter, uses[-1].seen
        rules = next((use.rules for use in reversed(uses) if use.rules is not None), PLAIN)
        if isinstance(adapter, AttentionAdapter):
            record = adapter.project(self.module, *args, rules=rules, seen=seen, **kwargs)
            _start_gradients(record.probabilities)
            output = adapter.finish(self.module, record, record.probabilities, rules)
            for use in uses:
                use.record._store(AttentionLayer(use.name, record, output=output))
            return output
        scan = rules.scan(adapter.project(self.module, *args, rules=rules, seen=seen, **kwargs))
        folds = {use.attention: selective_scan(scan, attention=use.attention) for use in uses if use.attention}
        y = next(iter(folds.values()))[0] if folds else selective_scan(scan)
        if not isinstance(y, Tensor):
            raise TypeError(f"{uses[-1].name}: the scan returned {type(y).__name__}.")
        _start_gradients(y)
        output = adapter.finish(self.module, scan, y, rules)
        for use in uses:
            ready = (use.attention, folds[use.attention][1]) if use.attention else None
            use.record._store(ScanLayer(use.name, scan, y=y, output=output, attention=ready))
        return output


def _start_gradients(variable: Tensor) -> None:
    """In a frozen model, let gradients with respect to a layer's variable start at it."""
    if torch.is_grad_enabled() and not variable.requires_grad:
        variable.requires_grad_()


_install = Lock()


@contextmanager
def _routed(module: nn.Module, use: _Use) -> Iterator[None]:
    with _install:
        forward = module.__dict__.get("forward")
        if not isinstance(forward, _RoutedForward):
            forward = _RoutedForward(module)
            module.__dict__["forward"] = forward
        forward.uses.append(use)
    try:
        yield
    finally:
        with _install:
            forward.uses.remove(use)
            if not forward.uses:
                if forward.own:
                    module.__dict__["forward"] = forward.original
                else:
                    del module.__dict__["forward"]


def _observe(use: _Use, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if use.thread != get_ident():
        return
    adapter = use.adapter
    finish: Callable[[Tensor], Tensor]
    if isinstance(adapter, AttentionAdapter):
        record = adapter.project(module, *args, rules=PLAIN, seen=use.seen, **kwargs)
        finish = partial(adapter.finish, module, record.map_tensors(Tensor.detach), rules=PLAIN)
        use.record._store(AttentionLayer(use.name, record, output=output, tail=_repeatable(use.name, module, finish)))
        return
    scan = adapter.project(module, *args, rules=PLAIN, seen=use.seen, **kwargs)
    finish = partial(adapter.finish, module, scan.map_tensors(Tensor.detach), rules=PLAIN)
    layer = ScanLayer(use.name, scan, output=output, tail=_repeatable(use.name, module, finish))
    if use.attention:
        layer._ready[use.attention] = layer.attention(use.attention)
    use.record._store(layer)


def _repeatable(name: str, module: nn.Module, finish: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``finish``, unless it would draw other random numbers than the model's own forward did."""
    if not any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in module.modules()):
        return finish

    def refuse(variable: Tensor) -> Tensor:
        raise TraceError(
            f"{name}: gradients() cannot repeat active dropout in mode='observe'; use mode='route', or model.eval()."
        )

    return refuse


def _through_tail(layer: Layer, gradient: Tensor) -> Tensor:
    """The gradient with respect to the layer's variable, from the one at the mixer's output."""
    if layer._tail is None:
        raise TraceError(f"{layer.name}: no recomputed tail.")
    with torch.enable_grad():
        variable = layer.variable.detach().requires_grad_()
        (result,) = torch.autograd.grad(layer._tail(variable), variable, gradient)
    return result


def _watch_layout(stack: ExitStack, model: nn.Module, adapters: set[AnyAdapter], seen: Seen) -> None:
    """Learn the image size from the first convolution's input, and the token frame from the patch embedding."""
    thread = get_ident()

    def image(module: nn.Module, args: tuple[Any, ...]) -> None:
        if thread == get_ident() and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            seen.image_size = (args[0].shape[2], args[0].shape[3])

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
    if seen.layout is not None:
        return
    for adapter in adapters:
        source = adapter.layout_source(model)
        if source is not None:

            def read(module: nn.Module, args: tuple[Any, ...], output: Any, read: Any = source.read) -> None:
                if thread == get_ident():
                    seen.layout = read(args, output)

            stack.callback(source.module.register_forward_hook(read).remove)


def _select(
    mixers: dict[str, tuple[nn.Module, AnyAdapter]], patterns: Iterable[str] | None
) -> dict[str, tuple[nn.Module, AnyAdapter]]:
    if patterns is None:
        return mixers
    if isinstance(patterns, str):
        raise TypeError(f"trace(layers={patterns!r}): expected a list of names or patterns, e.g. [{patterns!r}].")
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in mixers if fnmatchcase(name, pattern)}
        if not fitting:
            raise UnknownLayerError(f"trace(layers=...): {pattern!r} fits no layer. {nearest(pattern, mixers)}")
        chosen |= fitting
    return {name: mixer for name, mixer in mixers.items() if name in chosen}
