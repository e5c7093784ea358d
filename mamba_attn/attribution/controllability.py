"""Controllability: how strongly each token can change the scans' outputs; X-VMamba's two scores."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import nearest
from mamba_attn.ops.arguments import working_dtype
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import ScanLayer, require

SCORES = ("jacobian", "gramian")
_SMALL = 1e-8  # of the published code


class Controllability(TokenAttribution):
    """How strongly each token can change the scans' outputs: X-VMamba (arXiv 2511.12694); the same for every class.

    Per route, with a = exp(delta A), b = delta B and the letters of Mamba:

    =================  ================================================================================================
    ``"jacobian"``     J[k] = mean_c sum_n abs(b[k, n]) sum_{t >= k} abs(C[t, n]) a[k+1, n] ... a[t, n]: the summed size
                       of dy[t]/du[k], state by state, by the paper's backward recursion in linear time
    ``"gramian"``      G[k] = mean_c sum_n C[k, n]^2 b[k, n]^2 / (1 - a[k, n]^2 + 1e-8), the closed form of the
                       controllability Gramian with the step's own parameters held constant
    =================  ================================================================================================

    Routes are averaged in the token frame; each layer's scores are scaled to 0..1 over the patches of an image, and
    layers are averaged in pixels. D, the convolution, the gate and the token's content play no part. Unlike in the
    published code, coarse layers are spread over the area that their tokens cover, not resized bilinearly, and
    images of a batch are not averaged.

    Args:
        model: a model of selective scans that ``mamba_attn.trace`` supports.
        layers: names, patterns or numbers of the mixers to use. Default: all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        score: one of the above.

    Raises:
        ValueError: another score; when called, a pixel or box.
        UnsupportedModelError: when called, layers that are softmax attention.

    Example:
        >>> Controllability(model, score="gramian").attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    reads_rows: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        score: str = "jacobian",
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        if score not in SCORES:
            raise ValueError(f"Controllability(score={score!r}): no such score. {nearest(score, SCORES)}")
        self.score = score

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        with self._traced(inputs, target) as (record, _):
            layers = require(self.called, record.layers, ScanLayer)
        measure = jacobian_scores if self.score == "jacobian" else gramian_scores
        rows = []
        for layer in layers:
            layer.require_finite()
            rows.append((layer.layout, _scaled(measure(layer.scan), layer.layout)))
        return rows


def jacobian_scores(record: ScanRecord) -> Float[Tensor, "batch tokens"]:
    """Return the mean over routes of J, per token: column sums of the attention that abs(B) and abs(C) make.

    Args:
        record: of one layer.
    """
    positive = record.replace(
        source_B=record.source_B.abs(),
        source_C=record.source_C.abs(),
        source_gain=None if record.source_gain is None else record.source_gain.abs(),
        D=None,
        scale=1 / record.routes,
    )
    ones = torch.ones(record.batch, record.tokens, device=record.source_B.device, dtype=working_dtype(record))
    return ops.left_product(positive, vector=ones, fold="mean")


def gramian_scores(record: ScanRecord) -> Float[Tensor, "batch tokens"]:
    """Return the mean over routes of G, per token.

    Args:
        record: of one layer.
    """
    dtype = working_dtype(record)
    delta, gain, B, C = (each.to(dtype) for each in (record.delta, record.gain, record.B, record.C))
    A = record.A.to(dtype)
    size = record.heads // B.shape[2]  # heads that share B and C
    found = delta.new_zeros(delta.shape)
    for state in range(record.states):
        b, c = (each[:, :, :, state].repeat_interleave(size, dim=2) for each in (B, C))
        own = A[..., min(state, A.shape[-1] - 1)]  # one for all states, or one each
        found += (b * c * gain).square() / (_SMALL - torch.expm1(2 * own[..., None] * delta))
    scores, order = found.mean(2), record.read_order
    place = order.where(order >= 0, record.tokens).expand(scores.shape)
    frame = scores.new_zeros(record.batch, record.tokens + 1)
    return frame.scatter_add(1, place.flatten(1), scores.flatten(1))[:, :-1] / record.routes


def _scaled(scores: Float[Tensor, "batch tokens"], layout: TokenLayout) -> Float[Tensor, "batch tokens"]:
    """Scale to 0..1 over the patches; zeros where all are equal, as published."""
    low, high = scores[:, layout.patches.to(scores.device)].aminmax(dim=1, keepdim=True)
    span = high - low
    return torch.where(span < _SMALL, 0, (scores - low) / (span + _SMALL))
