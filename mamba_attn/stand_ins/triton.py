"""A stand-in for ``triton``, and the functions of mamba_ssm's Triton kernels in plain PyTorch.

Decorators keep a kernel's name; launching one raises and says why it cannot run. The fused norms and the step of the
scan replace the functions of a real mamba_ssm that would launch one.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn.errors import BackendUnavailableError

__version__ = "3.0.0"  # some code reads it; old enough not to promise newer features


class Kernel:
    """A Triton kernel that is never compiled; ``kernel[grid](...)`` and ``kernel(...)`` raise.

    Args:
        function: the decorated Python function.
    """

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.configs: list[Any] = []
        functools.update_wrapper(self, getattr(function, "fn", function))

    def __getitem__(self, grid: Any) -> Callable[..., NoReturn]:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise and say why the kernel cannot run."""
        raise BackendUnavailableError(
            f"The Triton kernel {self.__name__!r} was launched, but cannot run on a CPU: "  # type: ignore[attr-defined]
            "mamba_attn.cpu_stand_ins() stood in for triton when this code was imported. Use the code's own PyTorch "
            "path, or import it without cpu_stand_ins() on a machine with a GPU."
        )

    run = warmup = __call__


def jit(function: Any = None, **options: Any) -> Any:
    """``triton.jit``, with or without arguments."""
    return Kernel if function is None else Kernel(function)


def autotune(configs: Any, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
    """``triton.autotune``: nothing to tune; the kernel keeps its ``configs``, which code reads."""

    def keep(function: Any) -> Kernel:
        kernel = Kernel(function)
        kernel.configs = list(configs)
        return kernel

    return keep


def set_allocator(allocator: Any) -> None:
    """``triton.set_allocator``: no kernel asks for memory."""


def heuristics(values: Any) -> Callable[[Any], Any]:
    """``triton.heuristics``: no effect."""
    return lambda function: function


class Config(SimpleNamespace):
    """``triton.Config``: stores its arguments.

    Args:
        kwargs: meta-parameters of the kernel.
        options: num_warps, num_stages, ...
    """

    def __init__(self, kwargs: dict[str, Any], num_warps: int = 4, num_stages: int = 2, **options: Any) -> None:
        super().__init__(kwargs=kwargs, num_warps=num_warps, num_stages=num_stages, **options)


def cdiv(x: int, y: int) -> int:
    """Return x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


class constexpr:  # noqa: N801 - Triton's own name
    """``triton.language.constexpr``: a value known at compile time.

    Args:
        value: the wrapped value.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class Symbol:
    """Any other name of Triton: good for annotations and for the bodies of kernels, which are never run.

    Args:
        name: its dotted name.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> "Symbol":
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__}.{name}")
        return Symbol(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise and say which names work outside kernels."""
        raise BackendUnavailableError(
            f"{self.__name__} was called outside a kernel; mamba_attn.cpu_stand_ins() replaces only triton's "
            "decorators, Config, cdiv, next_power_of_2 and constexpr."
        )

    def __repr__(self) -> str:
        return f"<stand-in of {self.__name__}>"


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
        return_dropout_mask: also return the masks of kept elements of x and x1.

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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: object = False,
    residual_in_fp32: object = False,
    is_rms_norm: object = False,
) -> Any:
    """``layer_norm_fn`` with the arguments of mamba_ssm 1.0 and 1.1, in their order."""
    options = {"eps": eps, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    return layer_norm_fn(x, weight, bias, residual, **options)  # type: ignore[arg-type]


def old_rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: object = False,
    residual_in_fp32: object = False,
    eps: float = 1e-6,
) -> Any:
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


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: object = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step: state = exp(dt A) state + dt B x, in place; y = C state + D x, times silu(z).

    Args:
        state: (batch, [heads,] channels, states), updated in place.
        x: (batch, [heads,] channels).
        dt: like x, before bias and softplus.
        A: ([heads,] channels, states).
        B: (batch, [groups,] states).
        C: as B.
        D: ([heads,] channels), or None.
        z: like x, or None.
        dt_bias: as D.
        dt_softplus: whether dt goes through softplus.
        state_batch_indices: must be None here.

    Returns:
        y, like x.

    Raises:
        NotImplementedError: indexed states.
    """
    if state_batch_indices is not None:
        raise NotImplementedError(
            "selective_state_update: state_batch_indices has no stand-in in mamba_attn.cpu_stand_ins()."
        )
    work = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    step = F.softplus(step) if dt_softplus else step
    if x.ndim == 3:  # heads share the B and C of their group
        B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], dim=1).unsqueeze(2) for t in (B, C))
    else:
        B, C = (t.reshape(len(t), 1, -1) for t in (B, C))
    B, C = B.to(work), C.to(work)
    wide, step = x.to(work), step.unsqueeze(-1)
    moved = torch.exp(step * A.to(work)) * state.to(work) + step * B * wide.unsqueeze(-1)
    state.copy_(moved)
    y = (moved * C).sum(-1)
    y = y if D is None else y + D.to(work) * wide
    return (y if z is None else y * F.silu(z.to(work))).to(x.dtype)
