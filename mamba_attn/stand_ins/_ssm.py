"""The functions of ``mamba_ssm.ops.selective_scan_interface`` in plain PyTorch, for machines without mamba_ssm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_attn.stand_ins import _served
from mamba_attn.stand_ins._conv import Inputs, convolve
from mamba_attn.stand_ins._modules import StandIn, fill

selective_scan_cuda = StandIn("selective_scan_cuda")
fill(selective_scan_cuda, _served.ALWAYS["selective_scan_cuda"])


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: object = False, return_last_state: object = False,
) -> Any:  # fmt: skip
    """The selective scan (arXiv 2312.00752, algorithm 2); autograd differentiates it.

    Args:
        u: (batch, channels, length).
        delta: like u, before bias and softplus.
        A: (channels, states), real.
        B: (channels, states), (batch, states, length) or (batch, groups, states, length).
        C: as B.
        D: (channels), or None.
        z: like u, or None; the output is multiplied by silu(z).
        delta_bias: (channels), or None.
        delta_softplus: whether delta goes through softplus.
        return_last_state: also return the state after the last step, (batch, channels, states), without gradient.

    Raises:
        ValueError: complex A, or tensors that do not fit together.
    """
    found = _Scan.apply(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))  # type: ignore[no-untyped-call]
    out, states = found
    return (out, states[:, :, -1, 1::2]) if return_last_state else out


class _Scan(torch.autograd.Function):
    """As the package's own: the extension's functions are looked up at every call, so that a trace sees the scan."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        """The output, after the gate where there is one, and the states."""
        out, states, *gated = selective_scan_cuda.fwd(*given)
        ctx.save_for_backward(*given[:8], states)
        ctx.softplus = given[8]
        ctx.mark_non_differentiable(states)
        return (gated[0] if gated else out).to(given[0].dtype), states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> Any:
        """Gradients by the extension's ``bwd``."""
        *given, states = ctx.saved_tensors
        found = selective_scan_cuda.bwd(*given, dout.contiguous(), states, None, None, ctx.softplus, False)
        du, ddelta, dA, dB, dC, dD, dbias, *dz = found
        return du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias, None


selective_scan_ref = selective_scan_fn


def mamba_inner_fn_no_out_proj(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    A: Tensor, B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None,
    delta_softplus: object = True,
) -> Tensor:  # fmt: skip
    """Convolution, SiLU, projections, scan and gate of one direction of a Mamba mixer, before its output projection.

    Args:
        xz: (batch, 2 * channels, length), the input projection.
        conv1d_weight: (channels, 1, width).
        conv1d_bias: (channels), or None.
        x_proj_weight: (rank + 2 * states, channels).
        delta_proj_weight: (channels, rank).
        A: (channels, states).
        B: given only where it does not depend on the input.
        C: likewise.
        D: (channels), or None.
        delta_bias: (channels), or None.
        B_proj_bias: (states), or None.
        C_proj_bias: (states), or None.
        delta_softplus: whether delta goes through softplus.
    """
    biases = (B_proj_bias, C_proj_bias)
    u, z, delta, (B, C) = _projected(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A.shape[-1], (B, C), biases
    )
    result: Tensor = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return result


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, *arguments: Any, **options: Any,
) -> Tensor:  # fmt: skip
    """``mamba_inner_fn_no_out_proj``, then the output projection: (batch, length, features).

    Args:
        xz: (batch, 2 * channels, length).
        conv1d_weight: (channels, 1, width).
        conv1d_bias: (channels), or None.
        x_proj_weight: (rank + 2 * states, channels).
        delta_proj_weight: (channels, rank).
        out_proj_weight: (features, channels).
        out_proj_bias: (features), or None.
        A: (channels, states).
        arguments: B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus.
        options: the same by name.
    """
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, *arguments, **options
    )
    return F.linear(y.mT.to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)


mamba_inner_ref = mamba_inner_fn


def bimamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, A_b: Tensor, B: Tensor | None = None,
    C: Tensor | None = None, D: Tensor | None = None, delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None, delta_softplus: object = True,
) -> Tensor:  # fmt: skip
    """Vim's first bidirectional mixer: both directions share everything but A (``A_b``: last to first)."""
    biases = (B_proj_bias, C_proj_bias)
    u, z, delta, (B, C) = _projected(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A.shape[-1], (B, C), biases
    )
    y: Tensor = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    u, delta, z = (t.flip(-1) for t in (u, delta, z))
    B, C = (t.flip(-1) if t.ndim > 2 else t for t in (B, C))
    y = y + selective_scan_fn(u, delta, A_b, B, C, D, z, delta_bias, delta_softplus).flip(-1)
    return F.linear(y.mT.to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)


bimamba_inner_ref = bimamba_inner_fn


def _projected(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    states: int, bc: tuple[Tensor | None, Tensor | None], biases: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """u, z, delta before its bias, and B and C, with length last."""
    x, z = xz.chunk(2, dim=1)
    u = convolve(Inputs(x, conv1d_weight.squeeze(1), conv1d_bias), None, silu=True)[0].to(x.dtype)
    low = F.linear(u.mT, x_proj_weight)
    rank = delta_proj_weight.shape[1]
    delta = F.linear(low[..., :rank], delta_proj_weight).mT
    found = []
    for given, bias, part in zip(bc, biases, (low[..., rank : rank + states], low[..., -states:]), strict=True):
        if given is None:
            given = (part if bias is None else part + bias.to(part.dtype)).mT
        found.append(given)
    return u, z, delta, found
