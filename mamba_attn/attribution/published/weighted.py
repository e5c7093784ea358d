"""One layer's attention weighted by the gradient of a class, as each rule of MambaAttribution defines it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.attribution.published.base import token_weight
from mamba_attn.attribution.published.conventions import Watch
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError
from mamba_attn.ops import hidden_attention
from mamba_attn.tracing.layers import ScanLayer

_WORKSPACE = 2**24  # elements of one block of channels' matrices


def gradient_x_attention(
    layer: ScanLayer, gradient: Float[Tensor, "batch channels tokens"]
) -> Float[Tensor, "batch tokens tokens"]:
    """Return sum_c dlogit/dM_c * M_c, signed: dlogit/dM_c[i, j] = dlogit/dy_c[i] u_c[j].

    Its sum over all pairs is dlogit/dy * (y - D u), what the attention of this layer gives the logit to first order.

    Args:
        layer: the layer.
        gradient: dlogit/dy.
    """
    return layer.attention("sum", row_weight=gradient, col_weight=layer.scan.u)


def paper(layer: ScanLayer, gradient: Float[Tensor, "batch channels tokens"]) -> Float[Tensor, "batch tokens tokens"]:
    """Return (mean_c(gradient)[i] * mean_c(M_c)[i, j])^+ (arXiv 2403.01590, eq. 24, without its identity).

    Args:
        layer: the layer.
        gradient: of the logit with respect to the scans' output after norm and gate: before a layer norm its mean over
            channels is zero, since adding a number to all of them changes nothing.
    """
    attention = layer.attention("mean")
    return (gradient.mean(1).to(attention).unsqueeze(2) * attention).clamp(min=0)


def published(
    layer: ScanLayer, gradient: Float[Tensor, "sequences *grid features"]
) -> Float[Tensor, "batch tokens tokens"]:
    """Return mean_c(M_c^+)[i, j] / max_cij(M_c) * s[j], what published code makes of one row, for all rows.

    Args:
        layer: the layer.
        gradient: of the logit with respect to the mixer's output, of images or of their windows; see ``token_weight``
            for s.
    """
    layer.require_finite()
    mean, largest = positive_attention(layer.scan)
    weight = token_weight(layer.layout.from_windows(gradient, axis=1)).to(mean)
    return mean / torch.where(largest > 0, largest, 1)[:, None, None] * weight.unsqueeze(1)


def positive_attention(scan: ScanRecord) -> tuple[Float[Tensor, "batch tokens tokens"], Float[Tensor, " batch"]]:
    """Return the channel mean of the positive parts of M_c, routes summed before, and the largest entry of all M_c.

    One block of channels at a time; ``fold="positive"`` takes the positive part of every route instead.
    """
    shape = (scan.batch, scan.tokens, scan.tokens)
    size = max(1, _WORKSPACE // (shape[0] * shape[1] * shape[2]))
    total: Tensor | None = None
    largest: Tensor | None = None
    for part in _channel_blocks(scan, size):
        positive = hidden_attention(part, fold="each").clamp(min=0)
        top = positive.amax((1, 2, 3))
        total = positive.sum(1) if total is None else total + positive.sum(1)
        largest = top if largest is None else torch.maximum(largest, top)
    if total is None or largest is None:
        raise TraceError("a scan without channels has no attention.")
    return total / scan.channels, largest


def gated_gradients(layers: Sequence[ScanLayer], logit: Tensor, watch: Watch) -> dict[str, Tensor]:
    """Return the logit's gradient at every layer's normed and gated output, (batch, channels, tokens).

    Args:
        layers: of a pass with gradients.
        logit: a scalar.
        watch: what watched the pass.
    """
    outputs = [watch.gated.get(layer.scan, layer.y) for layer in layers]
    found = torch.autograd.grad(logit, outputs, allow_unused=True)
    gradients = {}
    for layer, output, gradient in zip(layers, outputs, found, strict=True):
        filled = torch.zeros_like(output) if gradient is None else gradient
        gradients[layer.name] = filled if filled.ndim == 3 else filled.flatten(1, -2).mT  # VMamba's: channels last
    return gradients


def _channel_blocks(scan: ScanRecord, size: int) -> list[ScanRecord]:
    """The record of some channels after the other; whole where channels share steps or groups, as in Mamba-2."""
    if scan.heads != scan.channels or scan.source_B.shape[2] != 1:
        return [scan]
    spans = (slice(start, start + size) for start in range(0, scan.channels, size))
    return [
        scan.replace(
            source_u=scan.source_u[:, :, own], source_delta=scan.source_delta[:, :, own], A=scan.A[:, own],
            D=None, gate=None,
        )
        for own in spans
    ]  # fmt: skip
