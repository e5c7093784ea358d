"""The equations of the mixers of Mamba (arXiv 2312.00752) and Vim (arXiv 2401.09417), in one place.

``project`` and ``finish`` are called by ``VimMixer`` and, on foreign modules with the same attribute names, by the
adapters.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import orders as patch_orders
from mamba_attn._types import Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models._layers import CausalConv1d, full_precision, step_projection, undecayed
from mamba_attn.ops import selective_scan


def project(
    module: nn.Module,
    x: Float[Tensor, "batch tokens features"],
    *,
    orders: Int[Tensor, "routes length"] | None = None,
    rules: Rules = PLAIN,
    layout: TokenLayout | None = None,
) -> ScanRecord:
    """Compute everything in a mixer of Mamba or Vim before its scans.

    Per route: u = SiLU(conv(x)), [dt, B, C] = x_proj(u), delta = softplus(dt_proj(dt)), A = -exp(A_log); the gate is
    SiLU(z) (arXiv 2401.09417, algorithm 1). Vim's second route uses the modules and parameters named ``*_b``; where
    only ``A_b_log`` has that name (its published code calls this v1), it walks u, delta, B and C of the first route
    backwards. A module without any of them, or whose ``scans`` say so, has one route: Mamba's.

    Args:
        module: a mixer with Vim's attribute names; its submodules are called as modules.
        x: the mixer's input, in the token frame.
        orders: token visited at each step of each route; not for v1. Default: first to last, then last to first.
        rules: what an attribution method changes.
        layout: where the tokens sit in the image; kept in the record.

    Returns:
        The record, in scan order (v1: in the token frame); features of u and delta are contiguous in memory.
    """
    inner, z = _part(module, "in_proj")(x).chunk(2, dim=-1)
    suffixes = scans(module)
    own = suffixes if hasattr(module, "conv1d_b") else suffixes[:1]  # routes with their own convolution
    u, dt, bc = zip(
        *(_route(module, suffix, _along(inner, route, orders), rules) for route, suffix in enumerate(own)),
        strict=True,
    )
    B, C = torch.stack(bc, 1).mT.unsqueeze(2).chunk(2, dim=3)
    if orders is None:
        orders = _there_and_back(x.shape[1], len(suffixes), x.device)
    skips = [full_precision(_part(module, f"D{suffix}")) for suffix in own]
    return ScanRecord(
        source_u=torch.stack(u, 1).mT,
        source_delta=F.softplus(full_precision(torch.stack(dt, 1))).mT,
        A=torch.stack([-torch.exp(full_precision(_part(module, f"A{suffix}_log"))) for suffix in suffixes]),
        source_B=B,
        source_C=C,
        D=torch.stack(skips if len(own) == len(suffixes) else skips * len(suffixes)),
        gate=rules.activation(F.silu, z).mT,
        read_order=orders,
        write_order=orders,
        tokens=x.shape[1],
        scale=0.5 if len(own) == 2 and _divides(module) else 1.0,
        source_frame="scan" if len(own) == len(suffixes) else "tokens",
        layout=layout,
    )


def scans(module: nn.Module) -> tuple[str, ...]:
    """Return the parameter suffix of each scan that runs: "" forwards, "_b" backwards.

    Vim's published mixers run the forward scan alone where ``use_fast_path`` is False.

    Args:
        module: a mixer of Mamba or Vim.
    """
    return ("", "_b") if hasattr(module, "A_b_log") and getattr(module, "use_fast_path", True) else ("",)


def finish(
    module: nn.Module, record: ScanRecord, y: Float[Tensor, "batch channels tokens"], rules: Rules = PLAIN
) -> Float[Tensor, "batch tokens features"]:
    """Compute everything in a mixer of Mamba or Vim after its scans: the gate and the output projection.

    Args:
        module: the mixer that ``record`` came from.
        record: what ``project`` returned.
        y: output of the scans, routes summed in the token frame and scaled.
        rules: what an attribution method changes.
    """
    if record.gate is not None:
        y = rules.gate(y, record.gate)
    output: Tensor = _part(module, "out_proj")(y.mT.to(record.source_u.dtype))
    gamma = getattr(module, "gamma", None)  # layer scale; None in every release
    return output if gamma is None else output * gamma


def _route(module: nn.Module, suffix: str, inner: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, delta before softplus, and B concatenated with C, each (batch, length, features)."""
    mixed = _part(module, f"conv1d{suffix}")(inner.mT)[..., : inner.shape[1]].mT
    u = rules.activation(F.silu, mixed)
    step = _part(module, f"dt_proj{suffix}")
    rank = step.weight.shape[1]
    low, bc = _part(module, f"x_proj{suffix}")(u).tensor_split([rank], dim=-1)
    return u, _before_softplus(step, low.contiguous()), bc  # contiguous, for a faster backward pass


def _before_softplus(step: nn.Linear, low: Tensor) -> Tensor:
    """Return dt_proj(low); in half precision, add the bias in float32, as Mamba's kernels do."""
    half = low.dtype in (torch.float16, torch.bfloat16)
    plain = type(step).forward is nn.Linear.forward and not step._forward_hooks and not step._forward_pre_hooks
    if half and plain and step.bias is not None:
        return F.linear(low, step.weight) + full_precision(step.bias)
    output: Tensor = step(low)
    return output


def _part(module: nn.Module, name: str) -> Any:
    """Return a submodule or parameter by name, untyped: the module may be foreign."""
    return getattr(module, name)


@functools.lru_cache(maxsize=64)
def _there_and_back(tokens: int, routes: int, device: torch.device) -> Int[Tensor, "routes length"]:
    """Return the default orders, cached."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used while training
        return patch_orders.both_ways(torch.arange(tokens, device=device))[:routes]


def _along(inner: Tensor, route: int, orders: Tensor | None) -> Tensor:
    """Return tokens in the order of a route."""
    if orders is not None:
        return inner.index_select(1, orders[route])
    return inner.flip(1) if route else inner


def _divides(module: nn.Module) -> bool:
    """Whether the summed directions are halved; two spellings are in use, and ``biscan`` (Mamba-Reg) always does."""
    spellings = ("biscan", "if_divide_out", "if_devide_out")
    return any(bool(getattr(module, name, False)) for name in spellings)


class VimMixer(nn.Module):
    """A bidirectional Mamba mixer: one input projection, two scans with their own parameters.

    Args:
        features: size of a token.
        d_state: states per channel.
        d_conv: taps of the causal convolution.
        expand: channels per feature.
        dt_rank: rank of the step-size projection. Default: features / 16, rounded up.
        if_divide_out: halve the sum of the two directions.
    """

    def __init__(
        self,
        features: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        if_divide_out: bool = True,
    ) -> None:
        super().__init__()
        channels = expand * features
        rank = dt_rank or math.ceil(features / 16)
        self.if_divide_out = if_divide_out
        self.in_proj = nn.Linear(features, 2 * channels, bias=False)
        for suffix in ("", "_b"):
            self.register_parameter(
                f"A{suffix}_log", undecayed(torch.arange(1.0, d_state + 1).log().repeat(channels, 1))
            )
            self.register_parameter(f"D{suffix}", undecayed(torch.ones(channels)))
            self.add_module(f"conv1d{suffix}", CausalConv1d(channels, d_conv))
            self.add_module(f"x_proj{suffix}", nn.Linear(channels, rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", step_projection(rank, channels))
        self.out_proj = nn.Linear(channels, features, bias=False)

    def forward(
        self, x: Float[Tensor, "batch tokens features"], orders: Int[Tensor, "routes length"] | None = None
    ) -> Float[Tensor, "batch tokens features"]:
        """Mix tokens; ``orders`` as in ``project``."""
        record = project(self, x, orders=orders)
        return finish(self, record, selective_scan(record))
