"""Rules for the functions that a model calls outside its mixers' equations and ruled modules.

Activations, norms, products, softmax and sums with constants are met where any code calls them as functions of torch:
``F.silu``, ``x * y``, ``torch.rsqrt``. Not reached: ``torch.ops``, ``torch._C._nn``, scripted code, and what compiled
extensions do inside; whether that changed the answer shows in what the relevances sum to.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mamba_attn.core.rules import Rules, ruled_elsewhere, unruled
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.dependence import Sources
from mamba_attn.tracing.running import Names

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class FunctionRules(TorchFunctionMode):
    """Asks the rules at the functions that a model calls, on the thread that entered it.

    Args:
        model: whose functions; those that nothing of it calls stay as they are.
        rules: what to ask.
        sources: the tensors that its forward pass starts from.
        quiet: whether the model runs for something else at the moment.
    """

    def __init__(self, model: nn.Module, rules: Rules, sources: Sources, quiet: Callable[[], bool]) -> None:
        super().__init__()
        self.rules = rules
        self.sources = sources
        self.quiet = quiet
        self.last_probabilities = ""  # the last function that made probabilities of numbers
        self.names = Names(model)
        self.where = ""

    def __torch_function__(self, func: Function, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Call a function, by its rule if it has one."""
        kwargs = kwargs or {}
        # torch names the function that stands in its own's place while a door watches it
        rule = _RULES.get(func.args[0] if isinstance(func, partial) and func.args else func)
        if rule is None or not torch.is_grad_enabled() or ruled_elsewhere() or self.quiet():
            return func(*args, **kwargs)
        where = self.names.running(sys._getframe(1))
        if where is None:
            return func(*args, **kwargs)
        self.where, kwargs = where, dict(kwargs)
        args = (*args, *(kwargs.pop(name) for name in _POSITIONS if name in kwargs))
        with unruled():
            return rule(self, func, *args, **kwargs)

    def depends(self, value: Any) -> bool:
        """Whether a value depends on the model's input."""
        return value in self.sources

    def name(self, constant: Any, what: str = "constant") -> str:
        """Name of a constant that is added where the model is now."""
        return self.names.constant(constant, self.where, what)

    def added(self, y: Tensor, number: float) -> Tensor:
        """The sum of something and a number."""
        return self.rules.added(self.name(None), y, torch.as_tensor(number, dtype=y.dtype, device=y.device))

    def with_bias(self, y: Tensor, bias: Tensor | None, axes: int = 0) -> Tensor:
        """A sum with a bias of features, behind which ``axes`` axes follow."""
        if bias is None or not self.depends(y) or self.depends(bias):
            return y
        name = self.name(bias, "bias")
        return self.rules.added(name, y, bias.reshape(-1, *[1] * axes) if axes else bias)


def straight(value: Tensor, linear: Tensor) -> Tensor:
    """The numbers of ``value`` with the gradient of ``linear``."""
    return value.detach() + (linear - linear.detach()).to(value.dtype)


def refused(y: Tensor, sentence: str) -> Tensor:
    """Return y, whose gradient raises UnsupportedModelError: it lies on the way from the target to the tokens."""

    def refuse(gradient: Tensor) -> None:
        raise UnsupportedModelError(sentence)

    if y.requires_grad:
        y.register_hook(refuse)
    return y


def batch_statistics(name: str, kind: str) -> str:
    """Why a norm in training mode is refused."""
    return f"{name} ({kind}) normalises with the batch's statistics; call model.eval() first."


# What follows are the rules of single functions: rule(mode, func, *the function's own arguments).


def _activation(position: int | None, mode: FunctionRules, func: Function, x: Any, *rest: Any, **kwargs: Any) -> Any:
    """An element-wise function with f(0) = 0; ``position`` is where "inplace" stands after x."""
    if not mode.depends(x):
        return func(x, *rest, **kwargs)
    inplace = bool(kwargs.pop("inplace", False))
    if position is not None and len(rest) > position:
        inplace, rest = bool(rest[position]), (*rest[:position], *rest[position + 1 :])
    inplace = inplace or func in _IN_PLACE
    y = mode.rules.activation(lambda value: func(value, *rest, **kwargs), x)
    return x.copy_(y) if inplace else y


def _fixed(mode: FunctionRules, func: Function, *args: Any, **kwargs: Any) -> Any:
    """A factor of what follows: held fixed."""
    y = func(*args, **kwargs)
    if not isinstance(y, Tensor) or not mode.depends(y):
        return y
    if func in _PROBABILITIES:
        mode.last_probabilities = func.__name__
    return mode.rules.fixed(y)


def _power(mode: FunctionRules, func: Function, x: Any, exponent: Any, **kwargs: Any) -> Any:
    if isinstance(exponent, int | float) and exponent == int(exponent) >= 1 and mode.depends(x):
        y = func(x, exponent, **kwargs)
        return y if exponent == 1 else straight(y, x * mode.rules.fixed(x ** (exponent - 1)))
    return _fixed(mode, func, x, exponent, **kwargs)


def _square(mode: FunctionRules, func: Function, x: Any) -> Any:
    return straight(func(x), x * mode.rules.fixed(x)) if mode.depends(x) else func(x)


def _product(mode: FunctionRules, func: Function, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs or not (mode.depends(a) and mode.depends(b)):
        return func(a, b, **kwargs)
    if a is b:
        return _square(mode, torch.square, a)
    if func in _IN_PLACE:
        return a.copy_(mode.rules.product(torch.mul, a.clone(), b))
    return mode.rules.product(func, a, b)


def _einsum(mode: FunctionRules, func: Function, equation: Any, *operands: Any) -> Any:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    which = [i for i, operand in enumerate(operands) if mode.depends(operand)]
    if len(which) != 2:
        return func(equation, *operands)

    def both(a: Tensor, b: Tensor) -> Tensor:
        given = list(operands)
        given[which[0]], given[which[1]] = a, b
        y: Tensor = func(equation, *given)
        return y

    return mode.rules.product(both, operands[which[0]], operands[which[1]])


def _quotient(mode: FunctionRules, func: Function, a: Any, b: Any, **kwargs: Any) -> Any:
    if not mode.depends(b):
        return func(a, b, **kwargs)
    if not mode.depends(a):
        return _fixed(mode, func, a, b, **kwargs)
    return func(a, mode.rules.fixed(b), **kwargs)


def _reversed_quotient(mode: FunctionRules, func: Function, b: Any, a: Any) -> Any:
    """Return a / b, as ``b.__rtruediv__(a)``."""
    return _quotient(mode, lambda first, second: func(second, first), a, b)


def _sum(sign_a: int, sign_b: int, mode: FunctionRules, func: Function, a: Any, b: Any, **kwargs: Any) -> Any:
    """Return sign_a a + sign_b alpha b, one of which may be a constant."""
    alpha = kwargs.get("alpha", 1)
    first, second = mode.depends(a), mode.depends(b)
    if first == second:
        return func(a, b, **kwargs)
    constant, factor = (b, sign_b * alpha) if first else (a, sign_a)
    if not isinstance(constant, Tensor):
        y = func(a, b, **kwargs)
        return mode.added(y, constant * factor) if constant else y
    name, fixed = mode.name(constant), constant.detach() * factor  # before a sum in place writes over it
    return mode.rules.added(name, func(a, b, **kwargs), fixed)


def _joined(mode: FunctionRules, func: Function, tensors: Any, *rest: Any, **kwargs: Any) -> Any:
    y = func(tensors, *rest, **kwargs)
    parts = list(tensors) if isinstance(tensors, list | tuple) else []
    constant = [isinstance(part, Tensor) and not mode.depends(part) for part in parts]
    if all(constant) or not any(constant):
        return y
    for i, part in enumerate(parts):
        if constant[i]:
            alone = [other.detach() if other is part else torch.zeros_like(other) for other in parts]
            y = mode.rules.added(mode.name(part), y, func(alone, *rest, **kwargs))
    return y


def _linear(mode: FunctionRules, func: Function, x: Any, weight: Any, bias: Any = None, *rest: Any, **kw: Any) -> Any:
    y = func(x, weight, bias, *rest, **kw)
    return mode.with_bias(y, bias)


def _convolution(
    mode: FunctionRules, func: Function, input: Any, weight: Any, bias: Any = None, *rest: Any, **kw: Any
) -> Any:
    y = func(input, weight, bias, *rest, **kw)
    return mode.with_bias(y, bias, weight.ndim - 2)


def _matrix_sum(mode: FunctionRules, func: Function, bias: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    y = func(bias, a, b, **kwargs)
    if not mode.depends(y) or mode.depends(bias):
        return y
    return mode.rules.added(mode.name(bias), y, bias.detach() * kwargs.get("beta", 1))


def _sum_of_product(mode: FunctionRules, func: Function, x: Any, a: Any, b: Any, *, value: Any = 1, **kw: Any) -> Any:
    if kw or not (mode.depends(a) and mode.depends(b)):
        return func(x, a, b, value=value, **kw)
    return _sum(1, 1, mode, torch.add, x, mode.rules.product(torch.mul, a, b) * value)


def _normalised(mode: FunctionRules, x: Tensor, over: tuple[int, ...], eps: float, centred: bool) -> Tensor:
    """Return x over its standard deviation, or root mean square, held fixed."""
    x = x.float() if x.dtype.itemsize < 4 else x
    x = x - x.mean(over, keepdim=True) if centred else x
    return x * mode.rules.fixed(torch.rsqrt(x.square().mean(over, keepdim=True) + eps))


def scaled(mode: FunctionRules, value: Tensor, linear: Tensor, weight: Any, bias: Any, axes: int = 0) -> Tensor:
    """A norm's own value, with the gradient of its linear form times weight plus bias."""
    shape = (-1, *[1] * axes)
    if weight is not None:
        linear = linear * (weight.reshape(shape) if axes else weight)
    if bias is not None:
        linear = linear + (bias.reshape(shape) if axes else bias)
    return mode.with_bias(straight(value, linear), bias, axes)


def _layer_norm(
    mode: FunctionRules, func: Function, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *rest: Any,
) -> Any:  # fmt: skip
    with torch.no_grad():
        value = func(input, normalized_shape, weight, bias, eps, *rest)
    over = tuple(range(-len(normalized_shape), 0))
    return scaled(mode, value, _normalised(mode, input, over, eps, True), weight, bias)


def _rms_norm(
    mode: FunctionRules, func: Function, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Any:
    with torch.no_grad():
        value = func(input, normalized_shape, weight, eps)
    over = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return scaled(mode, value, _normalised(mode, input, over, eps, False), weight, None)


def _group_norm(
    mode: FunctionRules, func: Function, input: Any, num_groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *rest: Any,
) -> Any:  # fmt: skip
    with torch.no_grad():
        value = func(input, num_groups, weight, bias, eps, *rest)
    grouped = input.reshape(len(input), num_groups, -1)
    linear = _normalised(mode, grouped, (2,), eps, True).reshape(input.shape)
    return scaled(mode, value, linear, weight, bias, input.ndim - 2)


def _batch_norm(
    mode: FunctionRules, func: Function, input: Any, running_mean: Any, running_var: Any, weight: Any = None,
    bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *rest: Any,
) -> Any:  # fmt: skip
    y = func(input, running_mean, running_var, weight, bias, training, momentum, eps, *rest)
    if not mode.depends(y):
        return y
    if training or running_mean is None:
        return refused(y, batch_statistics(mode.where, "batch norm"))
    constant = -running_mean * torch.rsqrt(running_var + eps)
    constant = constant if weight is None else constant * weight
    constant = constant if bias is None else constant + bias
    return mode.rules.added(mode.name(bias, "bias"), y, constant.detach().reshape(-1, *[1] * (input.ndim - 2)))


def _instance_norm(
    mode: FunctionRules, func: Function, input: Any, running_mean: Any = None, running_var: Any = None,
    weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    *rest: Any,
) -> Any:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(mode, F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    y = func(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, *rest)
    linear = _normalised(mode, input, tuple(range(2, input.ndim)), eps, True)
    return scaled(mode, y, linear, weight, bias, input.ndim - 2)


def _unit_norm(
    mode: FunctionRules, func: Function, input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None
) -> Any:
    if out is not None:
        return func(input, p, dim, eps, out=out)
    return input / mode.rules.fixed(input.norm(p, dim, keepdim=True).clamp_min(eps).expand_as(input))


def _gated(mode: FunctionRules, func: Function, input: Any, dim: int = -1) -> Any:
    a, b = input.chunk(2, dim)
    return a * mode.rules.fixed(torch.sigmoid(b))


def _embedded(mode: FunctionRules, func: Function, *args: Any, **kwargs: Any) -> Any:
    y = func(*args, **kwargs)
    if not mode.sources.words:
        return y
    mode.sources.tensors.append(y.detach().requires_grad_())
    return mode.sources.tensors[-1].clone()


def _of_input(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that holds where a function's first argument depends on the model's input."""

    def of_input(mode: FunctionRules, func: Function, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not mode.depends(input):
            return func(input, *args, **kwargs)
        return rule(mode, func, input, *args, **kwargs)

    return of_input


def _softmax_attention(mode: FunctionRules, func: Function, query: Any, key: Any, *rest: Any, **kwargs: Any) -> Any:
    return func(mode.rules.fixed(query), mode.rules.fixed(key), *rest, **kwargs)


def _sampled(ours: FunctionRules, func: Function, input: Any, grid: Any, *rest: Any, **kwargs: Any) -> Any:
    """Sampling at places that depend on the image: linear in what is sampled. Its own ``mode`` is among the rest."""
    return func(input, ours.rules.fixed(grid), *rest, **kwargs)


def _attention_module(mode: FunctionRules, func: Function, *args: Any, **kwargs: Any) -> Any:
    """The function behind nn.MultiheadAttention, tokens first: linear in the values, its probabilities fixed."""
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    value, heads = given["value"], given["num_heads"]
    unknown = (given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v"))
    dropped = given["training"] and given["dropout_p"] > 0
    if not mode.depends(value) or value.ndim != 3 or given["add_zero_attn"] or dropped or any(unknown):
        return func(*args, **kwargs)
    with torch.no_grad():
        output = func(*args, **kwargs)
        each = {**given, "need_weights": True, "average_attn_weights": False}
        probabilities = func(**each)[1]  # (batch, heads, tokens, tokens)
    separate, bias = given["use_separate_proj_weight"], given["in_proj_bias"]
    weight = given["v_proj_weight"] if separate else given["in_proj_weight"].chunk(3)[2]
    # images first, as constants are counted by image
    values = F.linear(value.transpose(0, 1), weight, None if bias is None else bias.chunk(3)[2])
    if bias is not None:
        values = mode.rules.added(mode.name(bias, "bias"), values, bias.chunk(3)[2])
    y = torch.einsum("bhij,bjhd->bihd", mode.rules.fixed(probabilities), values.unflatten(2, (heads, -1))).flatten(2)
    y = F.linear(y, given["out_proj_weight"], given["out_proj_bias"])
    y = mode.with_bias(straight(output[0].transpose(0, 1), y), given["out_proj_bias"])
    return y.transpose(0, 1), output[1]


def _named(*names: str) -> list[Function]:
    """The functions of these names in torch, its tensors and torch.nn.functional."""
    homes = (torch, Tensor, F)
    return [getattr(home, name) for name in names for home in homes if hasattr(home, name)]


_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_POSITIONS = ("input", "tensors", "other", "mat1", "mat2", "exponent", "tensor1", "tensor2")  # may come by name
_IN_PLACE = {*_named("mul_", "relu_", "tanh_", "leaky_relu_", "elu_", "selu_", "celu_", "hardtanh_", "__imul__")}
_IN_PLACE |= {*_named("multiply_")}
_PROBABILITIES = {*_named("sigmoid", "softmax", "log_softmax", "logsigmoid")}

_RULES: dict[Function, Callable[..., Any]] = {}
_AFTER_X = {
    "silu": 0, "relu": 0, "relu6": 0, "mish": 0, "selu": 0, "hardswish": 0, "leaky_relu": 1, "elu": 1, "celu": 1,
    "hardtanh": 2, "gelu": None, "tanh": None, "softsign": None, "prelu": None, "tanhshrink": None, "relu_": None,
    "tanh_": None, "leaky_relu_": None, "elu_": None, "selu_": None, "celu_": None, "hardtanh_": None,
}  # fmt: skip
for _name, _position in _AFTER_X.items():
    _RULES |= dict.fromkeys(_named(_name), partial(_activation, _position))
_RULES |= dict.fromkeys(
    _named(
        "rsqrt", "sqrt", "reciprocal", "sigmoid", "softmax", "log_softmax", "logsigmoid", "exp", "softplus", "norm",
        "std", "var", "erf", "hardsigmoid", "logsumexp", "__rpow__",
    ),
    _fixed,
)  # fmt: skip
_RULES |= {torch.linalg.vector_norm: _fixed, torch.linalg.norm: _fixed}
_RULES |= dict.fromkeys(_named("pow", "__pow__", "float_power"), _power) | dict.fromkeys(_named("square"), _square)
_RULES |= dict.fromkeys(
    _named("mul", "multiply", "mul_", "multiply_", "__mul__", "__rmul__", "__imul__", "matmul", "bmm", "mm",
           "__matmul__", "__rmatmul__"), _product
)  # fmt: skip
_RULES |= dict.fromkeys(_named("div", "divide", "true_divide", "div_", "__truediv__", "__itruediv__"), _quotient)
_RULES |= dict.fromkeys(_named("__rtruediv__", "__rdiv__"), _reversed_quotient)
_RULES |= dict.fromkeys(_named("add", "add_", "__add__", "__iadd__", "__radd__"), partial(_sum, 1, 1))
_RULES |= dict.fromkeys(_named("sub", "subtract", "sub_", "__sub__", "__isub__"), partial(_sum, 1, -1))
_RULES |= dict.fromkeys(_named("rsub", "__rsub__"), partial(_sum, -1, 1))
_RULES |= dict.fromkeys(_named("cat", "concat", "concatenate", "stack", "hstack", "vstack"), _joined)
_RULES |= dict.fromkeys(_named("addmm", "baddbmm"), _matrix_sum) | dict.fromkeys(_named("addcmul"), _sum_of_product)
_RULES |= {torch.einsum: _einsum, F.linear: _linear}
_RULES |= dict.fromkeys(
    _named("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution
)
_RULES |= {F.embedding: _embedded, F.batch_norm: _batch_norm, F.scaled_dot_product_attention: _softmax_attention}
_RULES |= {F.multi_head_attention_forward: _attention_module, F.grid_sample: _sampled}
for _rule, _functions in (
    (_layer_norm, _named("layer_norm")), (_rms_norm, _named("rms_norm")), (_group_norm, _named("group_norm")),
    (_instance_norm, [F.instance_norm]), (_unit_norm, [F.normalize]), (_gated, [F.glu]),
):  # fmt: skip
    _RULES |= dict.fromkeys(_functions, _of_input(_rule))
