"""Transformer-Attribution: attention probabilities weighted by the gradient of a class, rolled out over the layers."""

from torch import Tensor

from mamba_attn.attention_layer import require_attention
from mamba_attn.attribution._base import Row, Target, TokenAttribution
from mamba_attn.attribution._product import dense, roll_out
from mamba_attn.attribution._queries import Query, query_weights
from mamba_attn.attribution._stages import downsamplings


class TransformerAttribution(TokenAttribution):
    """The query's row of the product of a ViT's gradient-weighted attention; depends on the class.

    Per layer W = mean over heads of the positive part of dlogit/dP_h * P_h, P_h the probabilities of a head
    (arXiv 2103.15679, eq. 5); I + W are multiplied over the layers, last to first (eq. 6), and the query's row of the
    product is read, less what the residual streams alone carry, which is the query itself. The positive part is taken
    per head, before the mean; ``MambaAttribution``, its counterpart, takes it after the sum over channels.

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
        record, logit = self._run(inputs, target, gradients=True)
        layers = require_attention("TransformerAttribution", record.layers)
        gradients = record.gradients(logit)
        row = roll_out(
            layers, query_weights(layers[-1], query), downsamplings(self.model, layers),
            lambda layer: dense((gradients[layer.name] * layer.attention("each")).clamp(min=0).mean(1)),
        )  # fmt: skip
        return [(layers[0].layout, row)]
