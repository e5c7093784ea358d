"""mamba_ssm's chunk scans (arXiv 2405.21060, section 6) on any device, and the gated norms of its Mamba-2 mixer.

Half precision is computed in float32 and returned in its own type; float64 stays float64. ``chunk_size`` and
``state_dtype`` say how a kernel cuts its work, and change nothing here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import selective_scan
from mamba_attn.stand_ins.conv import causal_conv1d_fn

NO_LIMIT = (0.0, math.inf)


def _mamba_chunk_scan_combined_fwd(
    x: Float[Tensor, "batch length heads width"],
    dt: Float[Tensor, "batch length heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch length groups states"],
    C: Float[Tensor, "batch length groups states"],
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: object = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    state_dtype: object = None,
) -> tuple[Tensor | None, ...]:
    """(out, out before the gate or None, and the kernels' buffers, of which only the last states are filled)."""
    if seq_idx is not None or cu_seqlens is not None:
        raise NotImplementedError(
            "mamba_chunk_scan_combined(seq_idx=, cu_seqlens=): mamba_attn.cpu_stand_ins() supports whole sequences, "
            "not several in one row."
        )
    with torch.no_grad():
        y, gated, last = _scan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit)
    kept = None if z is None else y.to(x.dtype)
    return gated.to(x.dtype), kept, None, None, None, last


def _mamba_chunk_scan_combined_bwd(
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dfinal_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: object = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    dx: Tensor | None = None,
    ddt: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    dz: Tensor | None = None,
    recompute_output: object = False,
    state_dtype: object = None,
) -> tuple[Tensor | None, ...]:
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states), and the output if it is to be recomputed."""
    given = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        _, gated, last = _scan(*leaves, dt_softplus, dt_limit)  # type: ignore[arg-type, call-arg]
    ends = [gated] if dfinal_states is None else [gated, last]
    starts = [dout.to(gated.dtype)] if dfinal_states is None else [dout.to(gated.dtype), dfinal_states.to(last.dtype)]
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(ends, wanted, starts))
    into = (dx, ddt, None, dB, dC, None, dz, None, None)
    found: list[Tensor | None] = []
    for leaf, buffer in zip(leaves, into, strict=True):
        if leaf is None:
            found.append(None)
            continue
        gradient = next(gradients).to(leaf.dtype)
        found.append(gradient if buffer is None else buffer.copy_(gradient))
    return (*found, gated.detach().to(x.dtype)) if recompute_output else tuple(found)


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: object,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, heads, width) before and after the gate, and the last states (batch, heads, width, states)."""
    double = torch.float64 in (x.dtype, dt.dtype, A.dtype)
    kind = torch.float64 if double else torch.float32
    x, dt, A, B, C = (t.to(kind) for t in (x, dt, A, B, C))
    steps = dt if dt_bias is None else dt + dt_bias.to(kind)
    steps = F.softplus(steps) if dt_softplus else steps
    if dt_limit != NO_LIMIT:
        steps = steps.clamp(*dt_limit)
    heads, width = x.shape[2:]
    skip = None if D is None else (D.to(kind)[:, None] if D.ndim == 1 else D.to(kind)).expand(heads, width)
    record = ScanRecord.from_scan(
        x.flatten(2).mT[:, None],
        steps.mT[:, None],
        A[None, :, None],
        B.permute(0, 2, 3, 1)[:, None],
        C.permute(0, 2, 3, 1)[:, None],
        None if skip is None else skip.reshape(1, -1),
    )
    y = selective_scan(record).mT.unflatten(2, (heads, width))
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    total = (steps * A).cumsum(1)
    left = (total[:, -1:] - total).exp() * steps  # what a step's input still weighs at the end
    last = torch.einsum("blh,blhp,blhn->bhpn", left, x, B)
    if initial_states is not None:
        first = initial_states.to(kind)
        y = y + torch.einsum("blh,blhn,bhpn->blhp", total.exp(), C, first)
        last = last + total[:, -1].exp()[..., None, None] * first
    return y, y if z is None else y * F.silu(z.to(kind)), last


class _ChunkScan(torch.autograd.Function):
    """Like mamba_ssm's own; looks up the two functions above at every call, which lets a trace see the scan."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], *given: Tensor | None) -> Any:
        """Return the output and the last states."""
        x, dt, A, B, C, D, z, dt_bias, initial_states = given
        more = {"D": D, "z": z, "dt_bias": dt_bias, "initial_states": initial_states, **options}
        found = _mamba_chunk_scan_combined_fwd(x, dt, A, B, C, **more)  # type: ignore[arg-type]
        ctx.save_for_backward(*given, found[0] if z is None else found[1])
        ctx.options = options
        return found[0], found[5]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlast: Tensor | None) -> Any:
        """Return gradients by ``_mamba_chunk_scan_combined_bwd``."""
        x, dt, A, B, C, D, z, dt_bias, initial_states, out = ctx.saved_tensors
        more = {"D": D, "z": z, "dt_bias": dt_bias, "initial_states": initial_states, **ctx.options}
        found = _mamba_chunk_scan_combined_bwd(dout.contiguous(), x, dt, A, B, C, out, dfinal_states=dlast, **more)
        return None, *found


def mamba_chunk_scan_combined(
    x: Float[Tensor, "batch length heads width"],
    dt: Float[Tensor, "batch length heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch length groups states"],
    C: Float[Tensor, "batch length groups states"],
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: object = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: object = False,
    return_varlen_states: object = False,
    state_dtype: object = None,
) -> Any:
    """The scan of Mamba-2: one decay per head, B and C shared by groups of heads.

    Args:
        x: input of every head.
        dt: step sizes before bias, softplus and limits.
        A: decay of every head, negative.
        B: input matrix.
        C: output matrix.
        chunk_size: without effect.
        D: (heads) or (heads, width), or None.
        z: like x, or None; the output is multiplied by silu(z).
        dt_bias: (heads), or None.
        initial_states: (batch, heads, width, states), or None.
        seq_idx: refused.
        cu_seqlens: refused.
        dt_softplus: whether dt goes through softplus.
        dt_limit: least and largest step size.
        return_final_states: also return the state after the last step, (batch, heads, width, states).
        return_varlen_states: refused.
        state_dtype: without effect.

    Raises:
        NotImplementedError: several sequences in one row.
    """
    options = {"chunk_size": chunk_size, "seq_idx": seq_idx, "dt_softplus": dt_softplus, "dt_limit": tuple(dt_limit)}
    if cu_seqlens is not None or return_varlen_states:
        options["seq_idx"] = cu_seqlens if cu_seqlens is not None else True
    out, last = _ChunkScan.apply(options, x, dt, A, B, C, D, z, dt_bias, initial_states)  # type: ignore[no-untyped-call]
    return (out, last) if return_final_states else out


def mamba_split_conv1d_scan_combined(
    zxbcdt: Float[Tensor, "batch length features"],
    conv1d_weight: Float[Tensor, "channels taps"],
    conv1d_bias: Tensor | None,
    dt_bias: Float[Tensor, " heads"],
    A: Float[Tensor, " heads"],
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: object = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: object = None,
) -> Any:
    """A Mamba-2 mixer behind its input projection: convolution, scan, gate or gated norm, output projection.

    Args:
        zxbcdt: the input projection: features past the scan twice, z, x, B, C, dt.
        conv1d_weight: of the causal convolution of x, B and C.
        conv1d_bias: its bias, or None.
        dt_bias: as in ``mamba_chunk_scan_combined``, as the arguments that are not named here.
        A: decay of every head.
        D: (heads), or (heads, width).
        chunk_size: without effect.
        initial_states: states before the first step, or None.
        seq_idx: refused.
        dt_limit: least and largest step size.
        return_final_states: also return the state after the last step.
        activation: of the convolution.
        rmsnorm_weight: of the gated norm; None: a gate alone.
        rmsnorm_eps: added to the mean square.
        outproj_weight: (features, channels), or None.
        outproj_bias: its bias, or None.
        headdim: channels of a head, where D does not show them.
        ngroups: groups of B and C.
        norm_before_gate: whether the norm comes before the gate.
        state_dtype: without effect.
    """
    heads, width = D.shape if D.ndim == 2 else (len(D), int(headdim or 0))
    inner = heads * width
    states = (conv1d_weight.shape[0] - inner) // ngroups // 2
    beside = (zxbcdt.shape[-1] - 2 * inner - 2 * ngroups * states - heads) // 2
    past, z, xBC, dt = zxbcdt.split([2 * beside, inner, inner + 2 * ngroups * states, heads], -1)
    convolved = causal_conv1d_fn(xBC.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = convolved.mT.split([inner, ngroups * states, ngroups * states], -1)  # type: ignore[union-attr]
    out, last = mamba_chunk_scan_combined(
        x.unflatten(2, (heads, width)),
        dt,
        A,
        B.unflatten(2, (ngroups, states)),
        C.unflatten(2, (ngroups, states)),
        chunk_size,
        D,
        z.unflatten(2, (heads, width)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if beside:
        gate, value = past.chunk(2, -1)
        out = torch.cat([F.silu(gate) * value, out], -1)
    out = out if outproj_weight is None else F.linear(out.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (out, last) if return_final_states else out


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: object = True,
) -> Tensor:
    """Divide groups of features by their root mean square, before or after the gate silu(z)."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: object = True,
    is_rms_norm: object = False,
) -> Tensor:
    """The same with the mean taken off, or without.

    Args:
        x: (..., features).
        weight: (features).
        bias: (features), or None.
        z: like x, or None.
        eps: added to the variance.
        group_size: features of a group; None: all.
        norm_before_gate: whether the gate comes after the norm.
        is_rms_norm: whether the mean stays.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    gate = None if z is None else F.silu(z.to(kind))
    y = x.to(kind) if gate is None or norm_before_gate else x.to(kind) * gate
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    if not is_rms_norm:
        groups = groups - groups.mean(-1, keepdim=True)
    y = (groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight.to(kind)
    y = y if bias is None else y + bias.to(kind)
    found: Tensor = y if gate is None or not norm_before_gate else y * gate
    return found.to(x.dtype)


class RMSNorm(nn.Module):
    """mamba_ssm's gated norm of a Mamba-2 mixer.

    Args:
        hidden_size: features.
        eps: added to the mean square.
        group_size: features of a group; None: all.
        norm_before_gate: whether the gate comes after the norm.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Norm (..., features), with the gate silu(z)."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
