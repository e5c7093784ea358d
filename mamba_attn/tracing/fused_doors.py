"""Doors of what stands around scans in fused code: the causal convolution's SiLU, norms with their residual stream.

Their functions are patched where a module holds them by name, and only while a trace with rules is open. A backward
pass of the convolution is known by the input that its forward was seen with.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn.core.rules import Rules, ruled_elsewhere, unruled
from mamba_attn.tracing.doors import Door, Handler, Watch, opened, watching
from mamba_attn.tracing.function_rules import refused, straight

_ORDER = ("residual", "x1", "weight1", "bias1", "eps", "dropout_p", "rowscale", "prenorm", "residual_in_fp32")
CONVOLUTION_FORWARDS = ("causal_conv1d_fwd", "causal_conv1d_fwd_function")
_UNKNOWN = ("x1", "weight1", "bias1", "rowscale")  # of a fused norm


def fused_doors() -> Iterator[tuple[ModuleType, dict[str, Handler]]]:
    """Every loaded module that holds one of the functions, with what is to stand in their place."""
    return holders_of(_HANDLERS)


def holders_of(handlers: Mapping[str, Handler]) -> Iterator[tuple[ModuleType, dict[str, Handler]]]:
    """Every loaded module that holds functions of some names, with what is to stand in their place.

    Args:
        handlers: by name.
    """
    holders = {id(module): module for module in list(sys.modules.values()) if issubclass(type(module), ModuleType)}
    # the extension lives on in the modules that imported it, as stand-ins do
    held = [vars(module).get("causal_conv1d_cuda") for module in holders.values()]
    holders |= {id(module): module for module in held if isinstance(module, ModuleType)}
    for holder in holders.values():
        names = vars(holder)
        found = {name: handler for name, handler in handlers.items() if _is_function(names.get(name))}
        if found:
            yield holder, found


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _convolved(name: str, door: Door, *args: Any, **kwargs: Any) -> Any:
    """The forward of the convolution: remembered, since its backward brings nothing else of it."""
    for watch, module in watching(sys._getframe(1)):
        if watch.rules is not None and args:
            watch.convolved[_key(args[0])] = (args[0], watch.names[id(module)])
    return door.own[name](*args, **kwargs)


def _key(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), tuple(x.shape), x.stride()


def _convolution_backward(name: str, door: Door, x: Tensor, weight: Any, bias: Any, dout: Tensor, *rest: Any) -> Any:
    """Its backward; the SiLU at its end, the last of the arguments, by its rule."""
    own = door.own[name]
    known = [(watch, watch.convolved[_key(x)][1]) for watch in opened() if _key(x) in watch.convolved]
    rules = next((watch.rules for watch, _ in reversed(known) if watch.rules is not None), None)
    if rules is None or ruled_elsewhere():  # one of these functions calls another
        return own(x, weight, bias, dout, *rest)
    watch, module = known[-1]
    silu = bool(rest[-1])
    with torch.no_grad():
        wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        ends = None if bias is None else bias.to(wide)
        c = F.conv1d(x.to(wide), weight[:, None].to(wide), ends, padding=weight.shape[1] - 1, groups=x.shape[1])
        c = c[..., : x.shape[-1]]
    if silu:
        with torch.enable_grad(), unruled():
            leaf = c.requires_grad_()
            (dc,) = torch.autograd.grad(rules.activation(F.silu, leaf), leaf, dout.to(wide))
    else:
        dc = dout
    if bias is not None:
        _note(rules, watch.name_of.constant(bias, module, "bias"), dc, bias.to(wide)[:, None])
    with unruled():
        return own(x, weight, bias, dc.to(dout.dtype).contiguous(), *rest[:-1], False)


def _note(rules: Rules, name: str, gradient: Tensor, constant: Tensor) -> None:
    """Show a constant and its gradient to the rules, outside the graph that it belongs to."""
    with torch.enable_grad(), unruled():
        leaf = torch.zeros_like(gradient, requires_grad=True)
        torch.autograd.grad(rules.added(name, leaf.view_as(leaf), constant.detach()), leaf, gradient)


def _norm(name: str, door: Door, *args: Any, **kwargs: Any) -> Any:
    """A fused norm: its own value; the gradient that of a fixed denominator."""
    own = door.own[name]
    found = [(watch, module) for watch, module in watching(sys._getframe(1)) if watch.rules is not None]
    if not found or not torch.is_grad_enabled() or ruled_elsewhere():
        return own(*args, **kwargs)
    watch, module = found[-1]
    with unruled():
        return _ruled_norm(own, watch, watch.names[id(module)], "rms" in name, args, kwargs)


def _ruled_norm(own: Callable[..., Any], watch: Watch, module: str, rms: bool, args: Any, kwargs: Any) -> Any:
    rules: Any = watch.rules
    bound = inspect.signature(own).bind(*args, **kwargs)
    bound.apply_defaults()
    rest = dict(zip(_ORDER, bound.arguments.get("arguments", ()), strict=False))  # of a function that hands them on
    given = {"eps": 1e-6, **bound.arguments, **rest, **bound.arguments.get("options", {})}
    x, weight, bias, residual = given["x"], given["weight"], given.get("bias"), given.get("residual")
    output = own(*args, **kwargs)
    several = isinstance(output, tuple)
    value = output[0] if several else output
    total = x if residual is None else x.to(torch.promote_types(x.dtype, residual.dtype)) + residual
    m = total.float() if total.dtype.itemsize < 4 else total
    m = m if given.get("is_rms_norm", rms) else m - m.mean(-1, keepdim=True)
    y = m * rules.fixed(torch.rsqrt(m.square().mean(-1, keepdim=True) + given["eps"])) * weight.detach()
    y = y if bias is None else y + bias.detach()
    precision = torch.finfo(value.dtype).eps if value.dtype.itemsize < 4 else 1e-5
    if any(given.get(key) is not None for key in _UNKNOWN) or not bool(
        (y - value).abs().max() <= 64 * precision * value.abs().max()
    ):
        sentence = f"{module}: its fused norm is neither a layer norm nor an RMS norm of the sum of x and residual"
        return (refused(value, sentence), *output[1:]) if several else refused(value, sentence)
    first = straight(value, y)
    if bias is not None:
        first = rules.added(watch.name_of.constant(bias, module, "bias"), first, bias)
    return (first, straight(output[1], total), *output[2:]) if several else first


def _biased(name: str, door: Door, *args: Any, **kwargs: Any) -> Any:
    """A whole mixer in one function, whose last projection has a bias."""
    own = door.own[name]
    y = own(*args, **kwargs)
    found = [(watch, module) for watch, module in watching(sys._getframe(1)) if watch.rules is not None]
    fused = isinstance(getattr(y, "grad_fn", None), torch.autograd.function.BackwardCFunction)  # else functions say it
    bias = (
        None if not found or not fused else inspect.signature(own).bind(*args, **kwargs).arguments.get("out_proj_bias")
    )
    if bias is None or not torch.is_grad_enabled():
        return y
    watch, module = found[-1]
    rules: Any = watch.rules
    with unruled():
        return rules.added(watch.name_of.constant(bias, watch.names[id(module)], "bias"), y, bias)


_HANDLERS: dict[str, Handler] = {
    name: partial(handler, name)
    for handler, names in (
        (_convolved, CONVOLUTION_FORWARDS),
        (_convolution_backward, ("causal_conv1d_bwd", "causal_conv1d_bwd_function")),
        (_norm, ("layer_norm_fn", "rms_norm_fn")),
        (_biased, ("mamba_inner_fn", "bimamba_inner_fn")),
    )
    for name in names
}
