"""Rules that leave a network linear in its tokens, up to additive constants, with the values of its forward.

Every rule returns the layer's own value and the gradient of a linear map with that value; the maps' factors are those
of this forward pass, held fixed.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn.attribution.lrp.frozen_norms import frozen_norm
from mamba_attn.attribution.lrp.functional_layers import added_bias
from mamba_attn.core.rules import KINDS, Rules
from mamba_attn.core.scan_record import ScanRecord


class LinearRules(Rules):
    """Activations by their ratio, norms by their denominator, scans by everything but u; additive constants are noted.

    ===========  ======================================================================================================
    activation   y = x r, r = f(x) / x fixed. Where abs(x) is below the precision's epsilon, r is taken at that epsilon
                 with the sign of x
    norm         (x - mean) / s * weight + bias, s fixed; the mean of a layer norm is linear and stays
    scan         delta, A, B, C fixed: linear in u, D u kept
    ===========  ======================================================================================================

    Args:
        model: whose modules get names.

    Attributes:
        entered: per layer, what entered it and the modules around it, outermost first.
        constants: per additive constant, (batch,), its share in the logit; filled by the backward pass.
        batch: number of images; to be set before the pass.
    """

    wants: ClassVar[frozenset[str]] = frozenset(KINDS)

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.entered: dict[str, list[Tensor]] = {}
        self.constants: dict[str, Tensor] = {}
        self.batch = 1

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an activation as the product of its input and a fixed ratio."""
        with torch.no_grad():
            eps = torch.finfo(x.dtype).eps
            away = torch.where(x.abs() < eps, torch.copysign(torch.full_like(x, eps), x), x)
            value = function(away.clone())  # which some change in place, and an identity returns
            ratio = value / away
            y = torch.where(away == x, value, x * ratio)
        return y + (x - x.detach()) * ratio

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Normalise by a fixed denominator."""
        run = call or module
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._noted(module, run(x), batch_norm_constant(module))
        with torch.no_grad():
            y = run(x)
        linear, constant = frozen_norm(module, x, y)
        return self._noted(module, same_value(y, linear), constant)

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a linear layer; its bias is an additive constant."""
        y = call(x)
        return self._noted(module, y, added_bias(module, x, y))

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Fix what multiplies u."""
        return record.replace(
            source_delta=record.source_delta.detach(), A=record.A.detach(), source_B=record.source_B.detach(),
            source_C=record.source_C.detach(), D=None if record.D is None else record.D.detach(),
        )  # fmt: skip

    def enter(self, layer: str, x: Tensor) -> None:
        """Keep what entered."""
        self.entered.setdefault(layer, []).append(x)

    def _noted(self, module: nn.Module, y: Tensor, constant: Tensor | None, suffix: str = "bias") -> Tensor:
        """Note, in the backward pass, constant * dlogit/dy of every image as the constant's share."""
        if constant is None or not y.requires_grad:
            return y
        name, fixed = f"{self.names.get(module, type(module).__name__)}.{suffix}", constant.detach()
        constants, batch = (
            self.constants,
            self.batch,
        )  # the hook must not hold on to what entered: that would be a circle

        def note(gradient: Tensor) -> None:
            share = (gradient * fixed).detach()
            share = share.to(torch.promote_types(share.dtype, torch.float32))
            constants[name] = constants.get(name, 0) + share.reshape(batch, -1).sum(1)  # images first, then windows

        y.register_hook(note)
        return y.view_as(y)  # where this very tensor enters a layer, its constant is part of what entered


def same_value(y: Tensor, linear: Tensor) -> Tensor:
    """Return the values of ``y`` with the gradient of ``linear``, exactly."""
    return y.detach() + (linear - linear.detach()).to(y.dtype)


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
    """Whether a name fits one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
