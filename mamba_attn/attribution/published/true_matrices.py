"""Two recipes of arXiv 2403.01590, its eq. 24 and its code, on the true matrices and for every row.

``MambaAttribution`` takes the exact sum over channels by default; its ``rule="paper"`` and ``rule="published_code"``
stand for these two.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.attribution.activation_recorder import ActivationRecorder, gated_gradients
from mamba_attn.attribution.attention_rollout import Product, dense, of_one_token, roll_out_weighted
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.published.hidden_mamba import late_layers, token_weight
from mamba_attn.attribution.queries import Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError
from mamba_attn.ops import hidden_attention
from mamba_attn.tracing.layers import ScanLayer, require

_WORKSPACE = 2**24  # elements of one block of channels' matrices


class Equation24(TokenAttribution):
    """The query's row of the product of I + W, W the positive part of mean_c(dlogit/dy'_c)[i] * mean_c(M_c)[i, j].

    y' is the output of the scans after the mixer's gate (and VMamba's norm); arXiv 2403.01590, eq. 24. The equation
    leaves open which axis its gradient, a number per token, weights; here it is the rows, since y'[i] is what row i
    gives.

    Args:
        model: a model of selective scans.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        layout: as in ``mamba_attn.trace``.
        orders: as in ``mamba_attn.trace``.

    Example:
        >>> Equation24(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """

    reads_traces: ClassVar[bool] = False  # it watches the pass

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        recorder = ActivationRecorder()
        with self._traced(inputs, target, gradients=True, rules=recorder, multiplied=True) as (record, logit):
            layers = require(self.called, record.layers, ScanLayer)
            gradients = gated_gradients(layers, logit, recorder)

        def step(layer: ScanLayer) -> tuple[Product, float]:
            # before a layer norm the gradient's mean over channels would be zero: adding a number to all of them
            # changes nothing; hence the gradient behind norm and gate
            weight = of_one_token(layer, gradients[layer.name]).mean(1)
            attention = layer.attention("mean")
            return dense((weight.to(attention).unsqueeze(2) * attention).clamp(min=0))

        return [(layers[0].layout, roll_out_weighted(layers, query_weights(layers[-1], query), step))]


class PublishedRecipe(TokenAttribution):
    """The query's row of the product of I + W, its rows divided by their sums.

    W is mean_c of the positive parts of M_c, divided by the largest entry of all, times s[j]: what ``token_weight``
    gives for token j. The published recipe makes it of one row, here it is made of the true matrices.

    Args:
        model: a model of selective scans.
        layers: names, patterns or numbers of the mixers to use. Default: the late ones, see ``late_layers``.
        layout: as in ``mamba_attn.trace``.
        orders: as in ``mamba_attn.trace``.

    Example:
        >>> PublishedRecipe(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        with self._traced(inputs, target, gradients=True, multiplied=True) as (record, logit):
            layers = require(self.called, record.layers, ScanLayer)
            gradients = record.gradients(logit, of="output")
        layers = layers if self.layers is not None else late_layers(layers)

        def step(layer: ScanLayer) -> tuple[Product, Tensor]:
            layer.require_finite()
            mean, largest = positive_attention(layer.scan)
            # mixers that work on windows return those, one after the other
            weight = token_weight(layer.layout.from_windows(gradients[layer.name], axis=1)).to(mean)
            weighted = mean / torch.where(largest > 0, largest, 1)[:, None, None] * weight.unsqueeze(1)
            return dense(weighted)[0], 1 + weighted.sum(-1)

        return [(layers[0].layout, roll_out_weighted(layers, query_weights(layers[-1], query), step))]


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


def _channel_blocks(scan: ScanRecord, size: int) -> list[ScanRecord]:
    """The record of some channels after the other; whole where channels share steps or groups, as in Mamba-2."""
    if scan.heads != scan.channels or scan.source_B.shape[2] != 1:
        return [scan]
    spans = (slice(start, start + size) for start in range(0, scan.channels, size))
    return [
        scan.replace(
            source_u=scan.source_u[:, :, own],
            source_delta=scan.source_delta[:, :, own],
            A=scan.A[:, own],
            source_gain=None if scan.source_gain is None else scan.source_gain[:, :, own],
            D=None,
            gate=None,
        )
        for own in spans
    ]
