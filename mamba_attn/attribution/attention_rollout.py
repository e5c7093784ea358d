"""Attention rollout: the product of all layers' attention, residual streams included."""

from collections.abc import Sequence

from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution._base import Row, TokenAttribution
from mamba_attn.attribution._queries import Query, query_weights
from mamba_attn.attribution._stages import to_finer
from mamba_attn.attribution._targets import Target
from mamba_attn.attribution.published import base, conventions, vmamba_analysis
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import Layer


class AttentionRollout(TokenAttribution):
    """The query's row of the product of all layers' attention (arXiv 2005.00928, eq. 1); independent of the class.

    Default: the positive part of each layer's matrix, channels averaged and routes summed before (in a ViT: heads
    averaged), plus the identity for the residual stream, its rows divided by their sums. The query's row of the product
    is carried from the last layer to the first, one dense matrix at a time; it sums to 1.

    Between stages of VMamba a downsampling layer acts by its averaging matrix: a token takes the mean of the block of
    tokens that it covers. The global pool acts by the mean over tokens, which is the default query there.

    Args:
        model: a model that ``mamba_attn.trace`` knows.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        signed: no positive part and no normalisation, I + attention as it is; time and memory linear in tokens.
        convention: "exact"; "hidden_mamba" or "implicit_unified", the class token's row as the code published with
            arXiv 2403.01590 or 2405.16504 computes it, put into all rows of the matrices of the late layers, which are
            not made positive (the second repository publishes no rollout: its row, the first one's recipe);
            "vmamba_analysis" or "vmamba_analysis_dt", VMamba's rollout of its own map over the blocks of one stage,
            without or with the steps delta. Published defaults for the layers hold unless ``layers`` names some.

    Raises:
        ValueError: an unknown convention, or one that the model is not made for; a published one with
            ``signed=True``, or, where it knows the class token's row alone, with a pixel or box.

    Example:
        >>> AttentionRollout(model, signed=True).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        signed: bool = False,
        convention: str = conventions.EXACT,
    ) -> None:
        super().__init__(model, layers=layers)
        conventions.check_convention("AttentionRollout", convention, conventions.ALL, signed=signed)
        self.signed = signed
        self.convention = convention

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        if self.convention in conventions.CLASS_TOKEN:
            return base.explain(
                self, self.convention, inputs, target, query,
                lambda rows, _, token: base.attention_rollout(rows, token),
            )  # fmt: skip
        if self.convention in conventions.ANALYSIS:
            return vmamba_analysis.attention_rollout(self, self.convention, inputs, target, query)
        with self._traced(inputs, target) as (record, _):
            layers = record.layers
        start = query_weights(layers[-1], query)
        row = roll_out(layers, start, signed=self.signed)
        return [(layers[0].layout, row)]


def roll_out(
    layers: Sequence[Layer],
    row: Float[Tensor, "batch last_tokens"],
    *,
    signed: bool = False,
) -> Float[Tensor, "batch first_tokens"]:
    """Return ``row`` times the product of the layers' matrices, from the last layer to the first.

    Args:
        layers: in execution order.
        row: over the tokens of the last layer.
        signed: I + attention instead of the normalised positive part.
    """
    for index in reversed(range(len(layers))):
        layer = layers[index]
        row = layer.left_product(row) if signed else _normalised_product(layer, row)
        if index > 0:
            row = to_finer(row, layers[index - 1].layout, layer.layout)
    return row


def _normalised_product(layer: Layer, row: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Row @ (I + A+), rows of the matrix divided by their sums, which are at least 1."""
    positive = layer.attention("mean").clamp(min=0)
    weighted = row / (1 + positive.sum(-1))
    return weighted + (weighted.unsqueeze(1) @ positive).squeeze(1)
