"""Doors of softmax attention: torch's own functions, wherever a module holds them, watched for the length of a trace.

``scaled_dot_product_attention`` is the door; ``nn.MultiheadAttention`` has three ways around it (weights that are asked
for, its fast path and that of a whole encoder layer), and transformers has one (``eager_attention_forward``, a function
in each model's file): each a door of its own. A door calls the function with what it was given and returns what that
returned; queries, keys and values are kept, and the matrix is computed when it is first asked for.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from threading import Lock, local
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.doors import Watch, watching
from mamba_attn.tracing.reachable import Loaded, loaded_modules
from mamba_attn.tracing.softmax_calls import SoftmaxCall, SoftmaxInputs
from mamba_attn.tracing.undisturbed import recomputing

_MHA = signature(F.multi_head_attention_forward)
EAGER = "eager_attention_forward"
CROSS = "reads tokens of another sequence"
NESTED = "takes sequences of several lengths as one nested tensor"


@contextmanager
def open_softmax_doors(loaded: Loaded | None = None) -> Iterator[None]:
    """Let the watches that ``open_doors`` let in see attention, too; torch's functions are put back after the last.

    Args:
        loaded: the loaded modules, where they were just looked at.
    """
    global _opened
    with _lock:
        _opened += 1
        if _opened == 1:
            _replace(loaded or loaded_modules())
    try:
        yield
    finally:
        with _lock:
            _opened -= 1
            if _opened == 0:
                for names, name, ours, own in _replaced:
                    if names.get(name) is ours:  # what somebody put around ours stays
                        names[name] = own
                _replaced.clear()


def _replace(loaded: Loaded) -> None:
    """Put doors in the places of functions in all loaded modules, under their own names."""
    global _holders
    wanted = [*(own.__name__ for own in _DOORS), EAGER]
    if loaded.number != _holders[0]:
        # torch looks into its own modules for what a TorchFunctionMode is shown
        outside = [vars(module) for module in loaded.modules if not module.__name__.startswith("torch._C")]
        _holders = loaded.number, [(names, name) for names in outside for name in wanted if name in names]
    ours = {id(own): partial(seen, own) for own, seen in _DOORS.items()}
    for names, name in _holders[1]:
        own = names.get(name)
        if name == EAGER and isinstance(own, FunctionType):
            ours.setdefault(id(own), partial(_eager, own))
        if id(own) in ours:
            names[name] = ours[id(own)]
            _replaced.append((names, name, ours[id(own)], own))


_lock = Lock()
_opened = 0
_holders: tuple[int, list[tuple[dict[str, Any], str]]] = -1, []  # number of what was loaded, and held
_replaced: list[tuple[dict[str, Any], str, Any, Any]] = []
_inside = local()  # whether torch's own attention function runs, which a mode may make call itself again


def _attention(own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """``scaled_dot_product_attention``, seen by the traces that it concerns."""
    caught = getattr(_inside, "caught", None)
    if caught is not None:  # torch's module is asked for its inputs
        caught.append(_given(*args, **kwargs))
        return own(*args, **kwargs)
    places = [] if recomputing() else watching(sys._getframe(1))
    out = own(*args, **kwargs)
    if not places:
        return out
    if any(isinstance(t, Tensor) and t.is_nested for t in (*args[:3], *kwargs.values())):
        for watch, module in places:
            watch.crosses[watch.names[id(module)]] = NESTED
        return out
    inputs, dropout = _given(*args, **kwargs)
    for watch, module in places:
        call = _begin(watch, watch.names[id(module)], inputs)
        if call is None:
            continue
        call.dropout = dropout
        if watch.cut:
            out = _cut(watch, call, out, args, kwargs)
        else:
            call.edges, call.back = [_edge(out)], _through_values
        _keep(watch, call)
    return out


def _given(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[SoftmaxInputs, float]:
    """The inputs in four axes, and the dropout, from the arguments of ``scaled_dot_product_attention``."""
    rows, length, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    mask = attn_mask
    if mask is not None and len(rows) != 2:
        mask = _four(mask.expand(*rows, length, keys))
    query, key, value = (_four(t.detach()) for t in (query, key, value))
    return SoftmaxInputs(query, key, value, mask, is_causal, scale), float(dropout_p)


def _four(t: Tensor) -> Tensor:
    """(rows, length, width) and (rows, groups, ..., length, width) in four axes."""
    if t.ndim > 4:
        return t.flatten(1, -3)
    return t.unsqueeze(-3) if t.ndim == 3 else t[None, None] if t.ndim == 2 else t


def _begin(watch: Watch, name: str, inputs: SoftmaxInputs) -> SoftmaxCall | None:
    """A call to be kept, or None for attention to other tokens, which the watch notes."""
    query, key = inputs.query, inputs.key
    if watch.ruled:
        raise UnsupportedModelError(
            f"{name}: no adapter recognises this attention, and at its door the rules of this method are not known; "
            "use a method without rules (RawAttention, AttentionRollout), or write an adapter "
            "(mamba_attn.register_adapter)."
        )
    if key.shape[0] != query.shape[0] or key.shape[-2] != query.shape[-2]:
        watch.crosses[name] = CROSS
        return None
    tensors = [t for t in inputs[:4] if t is not None]
    rows, groups, length = query.shape[:3]
    return SoftmaxCall(name, _number(watch, name), rows, groups, length, groups > 1, tensors, lambda: inputs)


def _number(watch: Watch, name: str) -> int:
    return -1 - sum(call.module == name and call.run < 0 for call in watch.calls)


def _keep(watch: Watch, call: SoftmaxCall) -> None:
    watch.calls.append(call)
    if watch.attention is not None:
        call.inputs()


def _edge(out: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(out) if out is not None and out.requires_grad else None


def _through_values(inputs: SoftmaxInputs, found: list[Tensor | None]) -> Tensor:
    """The gradient at the probabilities of the one at probabilities @ value."""
    values = inputs.values
    return _four(torch.cat([t for t in found if t is not None])).to(values) @ values.mT


class _Catch(torch.autograd.Function):
    """The value of attention; of its gradient a note is taken, and none passes."""

    @staticmethod
    def forward(ctx: Any, call: SoftmaxCall, out: Tensor, source: Tensor) -> Tensor:
        """Return the output."""
        ctx.call, ctx.like = call, (source.shape, source.dtype, source.device)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        """Keep the gradient."""
        ctx.call.dout = _four(dout).mT.flatten(1, 2)
        shape, dtype, device = ctx.like
        return None, None, torch.zeros(shape, dtype=dtype, device=device)


def _cut(watch: Watch, call: SoftmaxCall, out: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    query, key, value = ([*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs)])[:3]
    call.sources, call.at = (query, key, value), len(watch.tensors)
    source = next((t for t in call.sources if t.requires_grad), None)
    return out if source is None else _Catch.apply(call, out.detach(), source)  # type: ignore[no-untyped-call]


def _module_function(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``multi_head_attention_forward``, where the weights are asked for: these do not go through the other door."""
    if getattr(_inside, "module", False):
        return own(*args, **kwargs)
    call = _MHA.bind(*args, **kwargs)
    call.apply_defaults()
    places = watching(sys._getframe(1)) if call.arguments["need_weights"] and not recomputing() else []
    _inside.module = True
    try:
        if any(watch.cut for watch, _ in places):
            with torch.no_grad():
                _, weights = own(*args, **kwargs)
            plain = {**call.arguments, "need_weights": False}
            return own(**plain)[0], weights
        found = own(*args, **kwargs)
    finally:
        _inside.module = False
    for watch, module in places:
        _keep_module(watch, watch.names[id(module)], own, call.arguments, found)
    return found


def _keep_module(
    watch: Watch, name: str, own: Callable[..., Any], given: Mapping[str, Any], found: tuple[Tensor, Tensor | None]
) -> None:
    """Keep a call of torch's module whose probabilities went another way than through the door."""
    arguments: dict[str, Any] = {
        key: value.detach() if isinstance(value, Tensor) else value for key, value in given.items()
    }
    query, key = arguments["query"], arguments["key"]
    length, heads = query.shape[0], arguments["num_heads"]
    rows = query.shape[1] if query.ndim == 3 else 1
    more = arguments["bias_k"] is not None or arguments["add_zero_attn"] or arguments["static_k"] is not None
    if watch.ruled or more or key.shape[:2] != query.shape[:2]:
        shapes = [torch.empty(rows, heads, size, 0) for size in (length, key.shape[0] + bool(more))]
        _begin(watch, name, SoftmaxInputs(shapes[0], shapes[1], shapes[1]))
        return
    plain = {**arguments, "need_weights": False, "training": False}
    call = SoftmaxCall(
        name,
        _number(watch, name),
        rows,
        heads,
        length,
        True,
        [value for value in arguments.values() if isinstance(value, Tensor)],
        partial(_caught, partial(own, **plain)),
        arguments["dropout_p"] if arguments["training"] else 0.0,
        [_edge(found[0]), _edge(found[1])],
        partial(_through_module, arguments["out_proj_weight"]),
    )
    _keep(watch, call)


def _caught(function: Callable[[], Any]) -> SoftmaxInputs:
    """What torch's module hands to ``scaled_dot_product_attention``."""
    caught: list[tuple[SoftmaxInputs, float]] = []
    _inside.caught = caught
    _inside.module = True
    try:
        with open_softmax_doors():  # the trace may be over
            function()
    finally:
        _inside.caught, _inside.module = None, False
    return caught[0][0]._replace(safe=False)


def _through_module(weight: Tensor, inputs: SoftmaxInputs, found: list[Tensor | None]) -> Tensor:
    """The gradient at the probabilities, of those at the module's output and at the weights that it returned."""
    output, weights = found
    rows, groups, length = inputs.query.shape[:3]
    total = inputs.values.new_zeros(rows, groups, length, length)
    if output is not None:
        heads = (output.to(weight) @ weight).reshape(length, rows, groups, -1).permute(1, 2, 0, 3)
        total = total + heads.to(total) @ inputs.values.mT
    if weights is not None:
        averaged = weights.shape[-3:] != (groups, length, length) or weights.ndim == 3 - (rows == 1)
        weights = weights.reshape(rows, -1, length, length)
        total = total + (weights.to(total) / groups if averaged else weights.to(total))
    return total


def _eager(
    own: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``eager_attention_forward``, which returns (batch, length, heads, width) and the probabilities."""
    places = [] if recomputing() else watching(sys._getframe(1))
    found = own(module, query, key, value, *args, **kwargs)
    for watch, running in places:
        given = SoftmaxInputs(query, key, value)
        call = _begin(watch, watch.names[id(running)], given)
        if call is None:
            continue
        call.dropout = float(kwargs.get("dropout") or 0.0)
        plain = {**kwargs, "dropout": 0.0} if "dropout" in kwargs else kwargs
        call.make = partial(_asked_again, partial(own, module), (query, key, value), args, plain)
        out = found[0].transpose(1, 2)
        if watch.cut:
            out = _cut(watch, call, out, (query, key, value), {}).transpose(1, 2)
            found = (out, *found[1:])
        else:
            call.edges, call.back = [_edge(found[0])], _through_heads_last
        _keep(watch, call)
    return found


def _asked_again(
    function: Callable[..., Any], given: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SoftmaxInputs:
    query, key, value = (t.detach() for t in given)
    return SoftmaxInputs(query, key, value, ready=function(query, key, value, *args, **kwargs)[1])


def _through_heads_last(inputs: SoftmaxInputs, found: list[Tensor | None]) -> Tensor:
    """The gradient at the probabilities, of that at the output with heads behind tokens."""
    return _through_values(inputs, [None if t is None else t.transpose(1, 2) for t in found])


def _fast(own: Callable[..., Any], *args: Any) -> Any:
    """``nn.MultiheadAttention``'s path without gradients: query, key and value are one tensor."""
    found = own(*args)
    places = watching(sys._getframe(1))
    for watch, module in places if not recomputing() else []:
        _keep_fast(watch, watch.names[id(module)], args[0], args[4], args[5:7], args[9], args[12])
    return found


def _fast_layer(own: Callable[..., Any], *args: Any) -> Any:
    """``nn.TransformerEncoderLayer``'s path without gradients, attention and all."""
    found = own(*args)
    places = watching(sys._getframe(1))
    for watch, module in places if not recomputing() else []:
        name = watch.names[id(module)]
        norm = (args[10], args[11], args[9]) if args[8] else None
        name = f"{name}.self_attn" if name else "self_attn"
        _keep_fast(watch, name, args[0], args[2], args[3:5], args[18], args[19], norm)
    return found


def _keep_fast(
    watch: Watch,
    name: str,
    x: Tensor,
    heads: int,
    weights: tuple[Tensor, Tensor],
    mask: Tensor | None,
    kind: int | None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Keep a call of a fast path, from what enters it, the weights of its input projection and a norm before it."""
    if x.is_nested:
        watch.crosses[name] = NESTED
        return
    if watch.ruled:
        _begin(watch, name, SoftmaxInputs(x, x, x))
    x, weight, bias = x.detach(), weights[0].detach(), weights[1].detach()
    length = x.shape[1]

    def make() -> SoftmaxInputs:
        normed = x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)
        joint = F.linear(normed, weight, bias).unflatten(-1, (3, heads, -1))
        query, key, value = (t.transpose(1, 2) for t in joint.unbind(2))
        hidden = None if mask is None else mask.to(torch.bool)
        if hidden is not None:  # True where nothing is read
            hidden = ~(hidden[:, None, None] if kind == 1 else hidden)
        return SoftmaxInputs(query, key, value, hidden)

    given = [t for t in (x, weight, bias, mask) if t is not None]
    _keep(watch, SoftmaxCall(name, _number(watch, name), x.shape[0], heads, length, True, given, make))


_DOORS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _module_function,
    torch._native_multi_head_attention: _fast,
    torch._transformer_encoder_layer_fwd: _fast_layer,
}
