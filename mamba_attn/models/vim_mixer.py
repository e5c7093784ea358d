"""The equations of the mixers of Mamba (arXiv 2312.00752) and Vim (arXiv 2401.09417), in one place.

``project`` and ``finish`` are called by ``VimMixer`` and, on foreign modules with the same attribute names, by the
adapters.
"""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import orders as patch_orders
from mamba_attn._types import Float, Int, Num
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models._layers import CausalConv1d, full_precision, step_projection, undecayed
from mamba_attn.ops import selective_scan

# where language models set padding to zero: before the input projection or behind it, and what is scanned
MASKED = (("input", "scanned"), ("inner", "scanned"), (), ("input",), ("inner",))


def project(
    module: nn.Module,
    x: Float[Tensor, "batch tokens features"],
    *,
    orders: Int[Tensor, "routes length"] | None = None,
    rules: Rules = PLAIN,
    layout: TokenLayout | None = None,
    real: Num[Tensor, "batch tokens"] | None = None,
    masked: Collection[str] = MASKED[0],
    normed: bool = False,
) -> ScanRecord:
    """Compute everything in a mixer of Mamba or Vim before its scans.

    Per route: u = SiLU(conv(x)), [dt, B, C] = x_proj(u), delta = softplus(dt_proj(dt)), A = -exp(A_log); the gate is
    SiLU(z) (arXiv 2401.09417, algorithm 1). Vim's second route uses the modules and parameters named ``*_b``; where
    only ``A_b_log`` has that name (its published code calls this v1), it walks u, delta, B and C of the first route
    backwards. A module without any of them, or whose ``scans`` say so, has one route: Mamba's. Some language models
    norm dt, B and C, by modules (Jamba) or without weights (Falcon Mamba, ``rms_eps``); ``normed`` does.

    Args:
        module: a mixer with Vim's attribute names; its submodules are called as modules.
        x: the mixer's input, in the token frame.
        orders: token visited at each step of each route; not for v1. Default: first to last, then last to first.
        rules: what an attribution method changes.
        layout: where the tokens sit in the image; kept in the record.
        real: 0 at padding, which is set to zero; of mixers with one route.
        masked: where, see ``MASKED``.
        normed: whether the module's norms of dt, B and C are used, and its own activation.

    Returns:
        The record, in scan order (v1: in the token frame); features of u and delta are contiguous in memory.

    Example:
        >>> record = project(VimMixer(16), torch.rand(2, 9, 16))
        >>> record.routes, record.tokens
        (2, 9)
    """
    keep = None if real is None else real[..., None].to(x.dtype)
    x = x if keep is None or "input" not in masked else x * keep
    inner, z = _part(module, "in_proj")(x).chunk(2, dim=-1)
    inner = inner if keep is None or "inner" not in masked else inner * keep
    act = getattr(module, "act", F.silu) if normed else F.silu
    keep = keep if "scanned" in masked else None
    suffixes = scans(module)
    own = suffixes if hasattr(module, "conv1d_b") else suffixes[:1]  # routes with their own convolution
    u, dt, bc = zip(
        *(
            _route(module, suffix, _along(inner, route, orders), rules, act, keep, normed=normed)
            for route, suffix in enumerate(own)
        ),
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
        gate=rules.activation(act, z).mT,
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

    Example:
        >>> from mamba_attn.ops import selective_scan
        >>> mixer, x = VimMixer(16), torch.rand(2, 9, 16)
        >>> record = project(mixer, x)
        >>> torch.allclose(finish(mixer, record, selective_scan(record)), mixer(x), atol=1e-5)
        True
    """
    if record.gate is not None:
        y = rules.gate(y, record.gate)
    output: Tensor = _part(module, "out_proj")(y.mT.to(record.source_u.dtype))
    gamma = getattr(module, "gamma", None)  # layer scale; None in every release
    return output if gamma is None else output * gamma


def _route(
    module: nn.Module,
    suffix: str,
    inner: Tensor,
    rules: Rules,
    act: Callable[[Tensor], Tensor],
    keep: Tensor | None,
    *,
    normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, delta before softplus, and B concatenated with C, each (batch, length, features)."""
    mixed = _part(module, f"conv1d{suffix}")(inner.mT)[..., : inner.shape[1]].mT
    u = rules.activation(act, mixed)
    u = u if keep is None else u * keep
    step = _part(module, f"dt_proj{suffix}")
    if not isinstance(step.weight, Tensor):
        raise UnsupportedModelError(
            f"its dt_proj is a {type(step).__name__}, quantised: trace the model as it was before, loaded without a "
            "quantization_config."
        )
    rank = step.weight.shape[1]
    low, bc = _part(module, f"x_proj{suffix}")(u).tensor_split([rank], dim=-1)
    low, bc = _normed(module, low, bc) if normed else (low, bc)
    return u, _before_softplus(step, low.contiguous()), bc  # contiguous, for a faster backward pass


def _normed(module: nn.Module, low: Tensor, bc: Tensor) -> tuple[Tensor, Tensor]:
    """Return dt, and B with C, after the norms that some language models have for each of them."""
    spellings = (("dt_layernorm",), ("b_layernorm", "B_layernorm"), ("c_layernorm", "C_layernorm"))
    found = ([getattr(module, name, None) for name in names] for names in spellings)
    norms: list[Any] = [next((norm for norm in each if norm is not None), None) for each in found]
    if not any(norms):
        eps = getattr(module, "rms_eps", None)
        if eps is None:
            return low, bc
        norms = [functools.partial(_weightless, eps)] * 3
    dt, B, C = (each if norm is None else norm(each) for norm, each in zip(norms, (low, *bc.chunk(2, -1)), strict=True))
    return dt, torch.cat([B, C], -1)


def _weightless(eps: float, x: Tensor) -> Tensor:
    wide = full_precision(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


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
    """A Mamba mixer: one input projection, and a scan each way with its own parameters.

    Args:
        features: size of a token.
        d_state: states per channel.
        d_conv: taps of the causal convolution.
        expand: channels per feature.
        dt_rank: rank of the step-size projection. Default: features / 16, rounded up.
        if_divide_out: halve the sum of the two directions.
        both_ways: whether there is a scan from the last token to the first; without it the mixer is Mamba's own.

    Example:
        >>> VimMixer(16)(torch.rand(2, 9, 16)).shape
        torch.Size([2, 9, 16])
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
        both_ways: bool = True,
    ) -> None:
        super().__init__()
        channels = expand * features
        rank = dt_rank or math.ceil(features / 16)
        self.if_divide_out = if_divide_out
        self.in_proj = nn.Linear(features, 2 * channels, bias=False)
        for suffix in ("", "_b") if both_ways else ("",):
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
