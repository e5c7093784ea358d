"""Rules that make a network linear in its tokens, up to additive constants, without changing its values.

Every rule returns the layer's own value with the gradient of a linear map; the factors of the map are those of this
forward pass, held fixed. Below the rules: norms with a fixed denominator, and linear layers with other weights.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn.core.rules import KINDS, Rules, unruled
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.function_rules import batch_statistics, refused, straight

_TOLERANCE = 64  # of the output's precision, relative to its largest value
_PLAIN = (nn.LayerNorm.forward, nn.RMSNorm.forward)


class LinearRules(Rules):
    """Fixes ratios of activations, denominators of norms, everything in scans but u; records additive constants.

    ===========  ======================================================================================================
    activation   y = x r, r = f(x) / x fixed. Where abs(x) is below the precision's epsilon, r is taken at that epsilon
                 with the sign of x
    norm         (x - mean) / s * weight + bias, s fixed; the mean of a layer norm is linear and stays
    scan         delta, A, B, C fixed: linear in u, D u kept
    ===========  ======================================================================================================

    ``fixed`` detaches, so that softmax, sigmoids and denominators in the model's own code are factors, too.

    Args:
        model: provides the names of its modules.

    Attributes:
        constants: per additive constant, (batch,), its share in the logit; filled by the backward pass.
        batch: number of images; set it before the pass.
    """

    wants: ClassVar[frozenset[str]] = frozenset(KINDS)
    at_doors: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.constants: dict[str, Tensor] = {}
        self.batch = 1

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an activation as the product of its input and a fixed ratio."""
        with torch.no_grad():
            eps = torch.finfo(x.dtype).eps  # f(x) / x is 0 / 0 at 0, and mostly rounding error close to it
            away = torch.where(x.abs() < eps, torch.copysign(torch.full_like(x, eps), x), x)
            value = function(away.clone())  # a clone: some functions work in place, and an identity returns its input
            ratio = value / away
            y = torch.where(away == x, value, x * ratio)
        return y + (x - x.detach()) * ratio

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Normalise by a fixed denominator; a norm of an unknown formula by the rules of the functions in it."""
        run = call or module
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.training:
                return refused(run(x), batch_statistics(self.names.get(module, "a norm"), type(module).__name__))
            return self._noted(module, run(x), batch_norm_constant(module))
        with torch.no_grad():
            y = run(x)
        found = frozen_norm(module, x, y)
        if found is None:
            with unruled(False):
                return run(x)
        return self._noted(module, straight(y, found[0]), found[1])

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a linear layer; its bias is an additive constant."""
        y = call(x)
        return self._noted(module, y, added_bias(module, x, y))

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Detach everything that multiplies u."""
        return record.replace(
            source_delta=record.source_delta.detach(),
            A=record.A.detach(),
            source_B=record.source_B.detach(),
            source_C=record.source_C.detach(),
            D=None if record.D is None else record.D.detach(),
            source_gain=None if record.source_gain is None else record.source_gain.detach(),
        )

    def fixed(self, factor: Tensor) -> Tensor:
        """Detach a factor."""
        return factor.detach()

    def added(self, name: str, y: Tensor, constant: Tensor) -> Tensor:
        """Record constant * dlogit/dy of every image, during the backward pass, as the constant's share."""
        if not y.requires_grad:
            return y
        fixed, constants, batch = constant.detach(), self.constants, self.batch

        def note(gradient: Tensor) -> None:
            share = (gradient * fixed).detach()
            share = share.to(torch.promote_types(share.dtype, torch.float32))
            constants[name] = constants.get(name, 0) + share.reshape(batch, -1).sum(1)  # images first, then windows

        y.register_hook(note)
        return y.view_as(y)  # a new tensor: if y itself enters a layer, its constant belongs to that layer's input

    def require_asked(self, end: Tensor) -> None:
        """Raise UnsupportedModelError if the pass computed ``end`` by a layer that was to be asked for and was not."""

    def starts(self, tensors: Sequence[Tensor]) -> None:
        """Take the tensors that enter the first layer; their graph is there still."""

    def _noted(self, module: nn.Module, y: Tensor, constant: Tensor | None) -> Tensor:
        """Record the share of a module's bias."""
        return (
            y if constant is None else self.added(f"{self.names.get(module, type(module).__name__)}.bias", y, constant)
        )


def batch_norm_constant(module: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor | None:
    """Return what a BatchNorm in eval mode adds, over its channels: bias - mean * weight / sqrt(var + eps)."""
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        return module.bias
    constant = -mean * torch.rsqrt(var + module.eps)
    constant = constant if module.weight is None else constant * module.weight
    constant = constant if module.bias is None else constant + module.bias
    return constant.view(-1, 1, 1) if isinstance(module, nn.BatchNorm2d) else constant


def fitting(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name matches any of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def frozen_norm(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return the norm of x with its denominator detached, and its bias as a tensor that broadcasts over it.

    None if no formula reproduces its output.

    Layer norms keep their mean in the graph; RMS norms have none. A class with its own forward may normalise the last
    axis or, as LayerNorm2d, axis 1, and may swap them: the variant that reproduces its output is used.

    Args:
        module: the norm.
        x: its input.
        y: its own output.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    shape = getattr(module, "normalized_shape", None) or (() if weight is None else weight.shape)
    own = type(module).forward not in _PLAIN and len(shape) == 1 and x.ndim > 2
    for axis in (-1, 1) if own else (-1,):
        moved = x.movedim(1, -1) if axis == 1 else x
        if not shape or list(moved.shape[-len(shape) :]) != list(shape):
            continue
        for linear, first in _frames(_formula(module, moved, len(shape), weight, bias), own=own):
            if _agree(linear, y):
                return linear, bias if bias is None or not first else on_axis_1(bias, linear)
    return None


def _frames(linear: Tensor, *, own: bool) -> Iterator[tuple[Tensor, bool]]:
    """Yield the output with features last and, for a class with its own forward, on axis 1; and whether on axis 1."""
    yield linear, False
    if own:
        yield linear.movedim(-1, 1), True


def _formula(module: nn.Module, x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute the norm over the last axes, with its denominator detached."""
    over = tuple(range(-axes, 0))
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__:
        x = x - x.mean(over, keepdim=True)
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(x.detach().square().mean(over, keepdim=True) + eps)
    x = x * (scale if weight is None else scale * weight.detach())
    return x if bias is None else x + bias


def _agree(linear: Tensor, y: Tensor) -> bool:
    """Whether two outputs are the same up to rounding."""
    if linear.shape != y.shape:
        return False
    difference = (linear.detach() - y).abs().max()
    allowed = _TOLERANCE * torch.finfo(y.dtype).eps * y.abs().max()
    return not bool(difference > allowed)  # NaN is reported elsewhere, with the layer


def bare_layer(module: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the layer's function with another weight and no bias, without changing the module."""
    other = copy.copy(module)
    other.__dict__.pop("forward", None)
    other._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    forward: Callable[[Tensor], Tensor] = other.forward
    return forward


def own_weight(call: str, module: nn.Module) -> Tensor:
    """Return a layer's weight.

    Args:
        call: what needs it, for the message.
        module: the layer.

    Raises:
        UnsupportedModelError: the layer computes its weight.
    """
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{call} needs a layer's weight, and this {type(module).__name__} computes its own; leave it out of "
            "gamma_layers, or merge what computes it."
        )
    return weight.detach()


def added_bias(module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """Return what a layer's bias adds to its output, as a tensor that broadcasts over it; None without one.

    Features are last in linear layers and on axis 1 in convolutions. Foreign linear layers may use either axis; if
    the sizes are ambiguous, the bias is measured as output minus output without bias.

    Args:
        module: the layer.
        x: its input.
        y: its output.
    """
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return None
    if not isinstance(module, nn.Linear):
        return on_axis_1(bias, y)
    if type(module).forward is nn.Linear.forward or y.shape[1] != len(bias) or y.ndim < 3:
        return bias
    if y.shape[-1] != len(bias):
        return on_axis_1(bias, y)
    with torch.no_grad():
        return y.detach() - bare_layer(module, own_weight("the share of its bias", module))(x)


def on_axis_1(vector: Tensor, like: Tensor) -> Tensor:
    """Return a vector over features as a tensor that broadcasts over one that has them on axis 1."""
    return vector.view(-1, *[1] * (like.ndim - 2))
