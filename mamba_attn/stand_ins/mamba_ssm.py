"""The package ``mamba_ssm`` in plain PyTorch, for machines without it: the scan's functions and the mixer.

Vision models only import the parts that its language models need; calling these raises.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamba_attn.models._layers import undecayed
from mamba_attn.models.vim_mixer import finish, project
from mamba_attn.ops import selective_scan
from mamba_attn.stand_ins.conv import Inputs, convolve
from mamba_attn.stand_ins.finder import ALWAYS, StandIn, fill

selective_scan_cuda = StandIn("selective_scan_cuda")
fill(selective_scan_cuda, ALWAYS["selective_scan_cuda"])


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: object = False,
    return_last_state: object = False,
) -> Any:
    """The selective scan (arXiv 2312.00752, algorithm 2); autograd differentiates it.

    Args:
        u: (batch, channels, length).
        delta: like u, before bias and softplus.
        A: (channels, states).
        B: (channels, states), (batch, states, length) or (batch, groups, states, length).
        C: as B.
        D: (channels), or None.
        z: like u, or None; the output is multiplied by silu(z).
        delta_bias: (channels), or None.
        delta_softplus: whether delta goes through softplus.
        return_last_state: also return the state after the last step, (batch, channels, states), without gradient.

    Raises:
        ValueError: the tensors do not fit together.
    """
    found = _Scan.apply(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))  # type: ignore[no-untyped-call]
    out, states = found
    return (out, states[:, :, -1, 1::2]) if return_last_state else out


class _Scan(torch.autograd.Function):
    """Like the package's own; looks up the extension's functions at every call, which lets a trace see the scan."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        """Return the output, after the gate if there is one, and the states."""
        out, states, *gated = selective_scan_cuda.fwd(*given)
        ctx.save_for_backward(*given[:8], states)
        ctx.softplus = given[8]
        ctx.mark_non_differentiable(states)
        return (gated[0] if gated else out).to(given[0].dtype), states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> Any:
        """Return gradients by the extension's ``bwd``."""
        *given, states = ctx.saved_tensors
        found = selective_scan_cuda.bwd(*given, dout.contiguous(), states, None, None, ctx.softplus, False)
        du, ddelta, dA, dB, dC, dD, dbias, *dz = found
        return du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias, None


selective_scan_ref = selective_scan_fn


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: object = True,
) -> Tensor:
    """Convolution, SiLU, projections, scan and gate of one direction of a Mamba mixer, before its output projection.

    Args:
        xz: (batch, 2 * channels, length), the input projection.
        conv1d_weight: (channels, 1, width).
        conv1d_bias: (channels), or None.
        x_proj_weight: (rank + 2 * states, channels).
        delta_proj_weight: (channels, rank).
        A: (channels, states).
        B: given only if it does not depend on the input.
        C: as B.
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
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    *arguments: Any,
    **options: Any,
) -> Tensor:
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
        options: the same, by name.
    """
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, *arguments, **options
    )
    return F.linear(y.mT.to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)


mamba_inner_ref = mamba_inner_fn


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: object = True,
) -> Tensor:
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
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    states: int,
    bc: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return u, z, delta before its bias, and B and C, with length last."""
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


class Mamba(nn.Module):
    """The Mamba mixer (arXiv 2312.00752, section 3.4), with the names, shapes and initial values of mamba_ssm's.

    Args:
        d_model: features of a token.
        d_state: states per channel.
        d_conv: taps of the causal convolution.
        expand: channels per feature.
        dt_rank: rank of the step-size projection; "auto" is d_model / 16, rounded up.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init: "random" or "constant" weights of that projection.
        dt_scale: factor of these weights.
        dt_init_floor: least initial step size.
        conv_bias: whether the convolution has a bias.
        bias: whether the input and output projections have one.
        use_fast_path: stored, no effect.
        layer_idx: stored, no effect.
        device: of the parameters.
        dtype: of the parameters.
        variant: arguments of mamba_ssm's forks, which are refused.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        **variant: Any,
    ) -> None:
        if variant:
            raise TypeError(
                f"Mamba(...) got {', '.join(variant)}: these belong to a fork of mamba_ssm, and mamba_ssm cannot be "
                "imported here. Put the fork on sys.path (for Vim: its folder mamba-1p1p1) before cpu_stand_ins()."
            )
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = channels = int(expand * d_model)
        self.dt_rank = rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * channels, bias=bias, **where)
        self.conv1d = nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **where
        )
        self.activation = "silu"
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(channels, rank + 2 * d_state, bias=False, **where)
        self.dt_proj = nn.Linear(rank, channels, **where)
        scale = rank**-0.5 * dt_scale
        with torch.no_grad():
            self.dt_proj.weight.fill_(scale) if dt_init == "constant" else self.dt_proj.weight.uniform_(-scale, scale)
            step = torch.empty(channels, device=device).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            step = step.clamp(min=dt_init_floor)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).repeat(channels, 1)
        self.A_log = undecayed(A.log())
        self.D = undecayed(torch.ones(channels, device=device))
        self.out_proj = nn.Linear(channels, d_model, bias=bias, **where)

    def forward(self, hidden_states: Tensor, inference_params: Any = None, **sequences: Any) -> Tensor:
        """Mix tokens: (batch, length, d_model) to the same shape.

        Raises:
            NotImplementedError: steps with a cache, or several sequences in one row.
        """
        if inference_params is not None or any(value is not None for value in sequences.values()):
            raise NotImplementedError(
                "Mamba(hidden_states, inference_params, ...): mamba_attn.cpu_stand_ins() supports whole "
                "sequences, not steps with a cache or several sequences in one row."
            )
        record = project(self, hidden_states)
        return finish(self, record, selective_scan(record))


class Block(nn.Module):
    """mamba_ssm 1's block: add the residual, normalise, mix.

    Args:
        dim: features of a token.
        mixer_cls: makes the mixer from ``dim``.
        norm_cls: makes the norm from ``dim``.
        fused_add_norm: stored, no effect.
        residual_in_fp32: return the residual in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: object = False,
        residual_in_fp32: object = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.mixer = mixer_cls(dim)
        self.norm = norm_cls(dim)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the sum before the norm, both (batch, length, dim)."""
        residual = hidden_states if residual is None else hidden_states + residual
        dtype = next(self.norm.parameters()).dtype
        normalised = self.norm(residual.to(dtype))
        residual = residual.float() if self.residual_in_fp32 else residual
        return self.mixer(normalised, inference_params=inference_params), residual


class GenerationMixin:
    """Base class of mamba_ssm's language models; cannot generate text."""

    def generate(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise: the stand-in cannot generate text."""
        _no_text("GenerationMixin.generate")


class InferenceParams:
    """Cache of mamba_ssm's language models; refused.

    Args:
        arguments: ignored.
        options: ignored.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _no_text("InferenceParams")


def load_config_hf(*arguments: Any, **options: Any) -> NoReturn:
    """Raise: language models need transformers."""
    _no_text("load_config_hf")


def load_state_dict_hf(*arguments: Any, **options: Any) -> NoReturn:
    """Raise: language models need transformers."""
    _no_text("load_state_dict_hf")


def _no_text(name: str) -> NoReturn:
    raise NotImplementedError(
        f"mamba_ssm's {name} needs the package transformers, which could not be imported when "
        "mamba_attn.cpu_stand_ins() stood in for it; it serves language models only."
    )
