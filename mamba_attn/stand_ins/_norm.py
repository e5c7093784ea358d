"""What the fused residual, dropout and norm kernel of mamba_ssm does, in plain PyTorch; autograd differentiates it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: object = False,
    residual_in_fp32: object = False,
    is_rms_norm: object = False,
    return_dropout_mask: object = False,
) -> Any:
    """norm(residual + dropout(rowscale * x) + dropout(x1)) * weight + bias, over the last axis.

    Sums and norms are taken in float32 or better; the result has the type of x.

    Args:
        x: (..., features).
        weight: (features).
        bias: (features), or None.
        residual: like x, or None.
        x1: a second summand, like x.
        weight1: (features), for a second norm of the same sum.
        bias1: (features), or None.
        eps: added to the variance, or to the mean square.
        dropout_p: probability of dropping an element of x and of x1.
        rowscale: (...), multiplies whole rows of x.
        prenorm: also return the sum that was normalised.
        residual_in_fp32: that sum in float32 or better, if there is no residual whose type decides.
        is_rms_norm: divide by the root mean square, and subtract no mean.
        return_dropout_mask: also return what was kept of x and of x1.

    Returns:
        The norm; with weight1 the second norm after it, with prenorm the sum after these, then the masks.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    total = x.to(work) if rowscale is None else x.to(work) * rowscale.to(work)[..., None]
    total, mask = _dropped(total, dropout_p)
    mask1 = None
    if x1 is not None:
        second, mask1 = _dropped(x1.to(work), dropout_p)
        total = total + second
    kind = x.dtype
    if residual is not None:
        total, kind = total + residual.to(work), residual.dtype
    elif residual_in_fp32:
        kind = work
    results: list[Tensor | None] = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        results.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        results.append(total.to(kind))
    if return_dropout_mask:
        results += [mask, mask1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, **options: Any) -> Any:
    """``layer_norm_fn`` with the root mean square; the arguments are the same but for ``is_rms_norm``."""
    names = ("residual", "x1", "weight1", "bias1", "eps", "dropout_p", "rowscale", "prenorm", "residual_in_fp32")
    options.update(zip((*names, "return_dropout_mask"), arguments, strict=False))
    return layer_norm_fn(x, weight, bias, **options, is_rms_norm=True)


def old_layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-6,
    prenorm: object = False, residual_in_fp32: object = False, is_rms_norm: object = False,
) -> Any:  # fmt: skip
    """``layer_norm_fn`` with the arguments of mamba_ssm 1.0 and 1.1, in their order."""
    options = {"eps": eps, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    return layer_norm_fn(x, weight, bias, residual, **options)  # type: ignore[arg-type]


def old_rms_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, prenorm: object = False,
    residual_in_fp32: object = False, eps: float = 1e-6,
) -> Any:  # fmt: skip
    """``rms_norm_fn`` with the arguments of mamba_ssm 1.0 and 1.1, in their order."""
    return old_layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with the residual and the dropout of ``layer_norm_fn``.

    Args:
        hidden_size: size of the last axis.
        eps: added to the mean square.
        dropout_p: probability of dropping an element of the input while training.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: object = False, residual_in_fp32: object = False
    ) -> Any:
        """Add the residual and normalise; with ``prenorm`` also return the sum."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _dropped(x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    if probability == 0:
        return x, None
    mask = torch.rand_like(x) > probability
    return x * mask / (1 - probability), mask


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: object) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias
