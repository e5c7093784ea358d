"""Transformer-Attribution: attention probabilities weighted by the gradient of a class, rolled out over the layers."""

from torch import Tensor

from mamba_attn.attention_layer import AttentionLayer
from mamba_attn.attribution._base import Row, TokenAttribution
from mamba_attn.attribution._product import Product, dense, of_one_token, roll_out
from mamba_attn.attribution._queries import Query, query_weights
from mamba_attn.attribution._targets import Target
from mamba_attn.layers import require


class TransformerAttribution(TokenAttribution):
    """The query's row of the product of a ViT's gradient-weighted attention; depends on the class.

    Per layer W = mean over heads of the positive part of dlogit/dP_h * P_h, P_h the probabilities of a head
    (arXiv 2103.15679, eq. 5); I + W are multiplied over the layers, last to first (eq. 6), and the query's row of the
    product is read, less what the residual streams alone carry, which is the query itself. The positive part is taken
    per head, before the mean; ``MambaAttribution``, its counterpart, takes it after the sum over channels. In a model
    without a class token the gradients are multiplied by the number of patches, as there.

    Args:
        model: a model of softmax attention that ``mamba_attn.trace`` knows.
        layers: names or patterns of the layers to use; the others act as the identity. Default: all.

    Raises:
        UnsupportedModelError: when called, layers that are selective scans.

    Example:
        >>> TransformerAttribution(vit).attribute(torch.randn(2, 3, 224, 224), target=[281, 207]).shape
        torch.Size([2, 1, 224, 224])
    """

    def _explain(self, inputs: Tensor, target: Target, query: Query) -> list[Row]:
        with self._traced(inputs, target, gradients=True) as (record, logit):
            layers = require("TransformerAttribution", record.layers, AttentionLayer)
            gradients = record.gradients(logit)

        def step(layer: AttentionLayer) -> tuple[Product, float]:
            gradient = of_one_token(layer, gradients[layer.name])
            return dense((gradient * layer.attention("each")).clamp(min=0).mean(1))

        row = roll_out(layers, query_weights(layers[-1], query), step)
        return [(layers[0].layout, row)]
