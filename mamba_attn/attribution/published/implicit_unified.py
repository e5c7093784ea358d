"""The three maps of the code published with arXiv 2405.16504, the unified implicit attention; for Vim.

That repository publishes Mamba-Attribution alone; its raw attention and rollout here are its row in HiddenMamba's
recipes. ``ImplicitAttention`` is the same matrix without these shortcuts: with D and the bias, and every row.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.attribution.activation_recorder import ActivationRecorder
from mamba_attn.attribution.published.hidden_mamba import (
    ClassTokenAttribution,
    HiddenMambaAttentionRollout,
    HiddenMambaAttribution,
    HiddenMambaRawAttention,
    min_max,
)
from mamba_attn.tracing.layers import ScanLayer


class _UnifiedRows(ClassTokenAttribution):
    """Puts this code's rows into the recipes of HiddenMambaAttn."""

    reads_traces: ClassVar[bool] = False  # it watches the pass

    def _recorder(self) -> ActivationRecorder | None:
        return ActivationRecorder()

    def _class_row(
        self, layer: ScanLayer, token: int, recorder: ActivationRecorder | None
    ) -> Float[Tensor, "batch channels tokens"]:
        activated = [] if recorder is None else recorder.activated[layer.scan]
        return unified_row(self.model.get_submodule(layer.name), layer, token, activated)


class UnifiedRawAttention(_UnifiedRows, HiddenMambaRawAttention):
    """Per layer the unified rows scaled to 0..1 over channels and tokens, the mean over channels; their mean.

    Example:
        >>> UnifiedRawAttention(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """


class UnifiedAttentionRollout(_UnifiedRows, HiddenMambaAttentionRollout):
    """The positive part of the broadcast rollout of the unified rows' signed means over channels.

    Example:
        >>> UnifiedAttentionRollout(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """


class UnifiedMambaAttribution(_UnifiedRows, HiddenMambaAttribution):
    """The broadcast rollout of the unified rows' positive parts, channels averaged, times the tokens' weights.

    Here the product with the weights is scaled to 0..1 over tokens, not the positive parts before it.

    Example:
        >>> UnifiedMambaAttribution(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """

    def _fused(self, positive: Float[Tensor, "batch channels tokens"], weight: Float[Tensor, "batch tokens"]) -> Tensor:
        return min_max(positive.mean(1) * weight, (1,))


def unified_row(
    mixer: nn.Module, layer: ScanLayer, token: int, activated: list[Tensor]
) -> Float[Tensor, "batch channels tokens"]:
    """Return silu(z[c]) (alpha[c] sigmoid(p)) T of every channel, routes summed and not halved.

    p enters the convolution's SiLU, T holds its taps; D and the convolution's bias are left out, as published.

    Args:
        mixer: whose taps are read.
        layer: the layer.
        token: index of the class token.
        activated: inputs of the mixer's activations, one per route.

    Raises:
        ValueError: no mixer of Vim.
    """
    layer.require_finite()
    scan = layer.scan.replace(scale=1.0)
    if scan.gate is None or not all(hasattr(mixer, name) for name in ("conv1d", "conv1d_b")[: scan.routes]):
        raise ValueError(
            f"convention='implicit_unified': {layer.name} is no Vim mixer (a gate and causal convolutions before the "
            "scans, one for each), which it is made for; use convention='exact'."
        )
    total: Tensor | None = None
    for route, inner in zip(range(scan.routes), activated, strict=False):
        order = scan.read_order[route]
        row = ops.attention_row(scan.select_routes(slice(route, route + 1)), row=token, fold="each")[..., order]
        taps = mixer.get_submodule("conv1d_b" if route else "conv1d").get_parameter("weight").to(row)
        # row @ T: the transpose of a causal convolution reads ahead, so the padding is behind and the taps are flipped
        row = F.pad(row * inner.mT.to(row).sigmoid(), (0, taps.shape[-1] - 1))
        row = F.conv1d(row, taps.flip(-1), groups=taps.shape[0])
        total = torch.zeros_like(row) if total is None else total
        total = total.index_add(-1, order, row)
    if total is None:
        raise ValueError(f"convention='implicit_unified': {layer.name} has no route.")
    return total * scan.gate[..., token : token + 1]
