"""Attention GradCAM: the last layer's heads, each weighted by its mean gradient."""

from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.queries import Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.tracing.layers import require
from mamba_attn.tracing.softmax_layers import AttentionLayer


class AttentionGradCAM(TokenAttribution):
    """The query's row of a ViT's last attention, heads weighted by their gradients; depends on the class.

    The positive part of mean_h(w_h P_h[q]), w_h the mean of dlogit/dP_h[q] over the patches: GradCAM (arXiv 1610.02391,
    eq. 1 and 2) with the heads' probabilities as feature maps, a baseline of arXiv 2012.09838, section 4. The positive
    part is taken after the mean over heads; nothing is scaled to 0..1. Where the query has several tokens, w_h is the
    mean over their rows too, and P_h[q] the mean of their rows; the published code knows the class token alone.

    Args:
        model: a model of softmax attention that ``mamba_attn.trace`` knows.
        layers: names or patterns of the layers whose maps are averaged. Default: the last.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.

    Raises:
        UnsupportedModelError: when called, layers that are selective scans.

    Example:
        >>> AttentionGradCAM(vit).attribute(torch.randn(2, 3, 224, 224), target=[281, 207]).shape
        torch.Size([2, 1, 224, 224])
    """

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        with self._traced(inputs, target, gradients=True) as (record, logit):
            layers = require(self.called, record.layers, AttentionLayer)
            gradients = record.gradients(logit)
        chosen = layers[-1:] if self.layers is None else layers
        return [(layer.layout, _cam(layer, gradients[layer.name], query)) for layer in chosen]


def _cam(
    layer: AttentionLayer, gradient: Float[Tensor, "batch heads tokens tokens"], query: Query | None
) -> Float[Tensor, "batch tokens"]:
    chosen, patches = query_weights(layer, query)[:, None, None], layer.layout.patches.to(gradient.device)
    weight = (chosen.to(gradient) @ gradient).index_select(-1, patches).mean(-1, keepdim=True)
    rows = chosen @ layer.attention("each")
    return (weight * rows).squeeze(2).mean(1).clamp(min=0)
