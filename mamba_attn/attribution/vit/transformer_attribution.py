"""TransformerAttribution: attention probabilities weighted by the gradient of a class, rolled out over layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mamba_attn.attribution.attention_rollout import Product, dense, of_one_token, roll_out_weighted
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.queries import Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.attribution.vit import block_relevance
from mamba_attn.errors import UnsupportedModelError, nearest
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import require
from mamba_attn.tracing.softmax_layers import AttentionLayer

VARIANTS = ("gradient_x_attention", "lrp")
_LRP_START = 1  # the published evaluation skips the first block


class TransformerAttribution(TokenAttribution):
    """The query's row of the product of a ViT's gradient-weighted attention; depends on the class.

    I + W are multiplied over the layers, last to first, without normalising rows, and the query's row of the product is
    read, minus the part carried by the residual streams alone (the query itself).

    ============================  =====================================================================================
    variant                       W
    ============================  =====================================================================================
    ``"gradient_x_attention"``    mean over heads of the positive part of dlogit/dP_h * P_h, P_h the probabilities of a
                                  head (arXiv 2103.15679, eq. 5 and 6)
    ``"lrp"``                     mean over heads of the positive part of dlogit/dP_h * R(P_h) (arXiv 2012.09838,
                                  section 3): R is the relevance of the probabilities, propagated from 1 at the target
                                  through timm's ViT with alpha = 1, beta = 0
    ============================  =====================================================================================

    The positive part is taken per head, before the mean; ``MambaAttribution``, the counterpart of the first variant,
    takes it after the sum over channels. In a model without a class token the gradients, and the relevances, are
    multiplied by the number of patches, as there; the published code only supports models with a class token. If the
    target is a function of the output, relevance starts from its gradient; for a class, from 1 at that class.

    Args:
        model: a model of softmax attention that ``mamba_attn.trace`` supports; for "lrp" a ViT or DeiT of timm.
        layers: names, patterns or numbers of the layers to use; the others act as the identity. Default: all from
            ``start_layer`` on.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        variant: one of the two above.
        start_layer: number of the first layer that is used. Default: 0; for "lrp" 1, as published evaluations.

    Raises:
        ValueError: an unknown variant, or both ``layers`` and ``start_layer``; when called, a ``start_layer`` that does
            not exist.
        UnsupportedModelError: when called, layers that are selective scans; for "lrp", a model with parts that have
            no known rule, or whose forward differs from running its parts in order.

    Example:
        >>> TransformerAttribution(vit).attribute(torch.randn(2, 3, 224, 224), target=[281, 207]).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        variant: str = "gradient_x_attention",
        start_layer: int | None = None,
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        if variant not in VARIANTS:
            raise ValueError(
                f"TransformerAttribution(variant={variant!r}): no such variant. {nearest(variant, VARIANTS)}"
            )
        if layers is not None and start_layer is not None:
            raise ValueError(
                f"TransformerAttribution(layers=..., start_layer={start_layer}): both choose layers; leave one out."
            )
        self.variant = variant
        self.start_layer = start_layer

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        with self._traced(inputs, target, gradients=True, multiplied=True) as (record, logit):
            layers = require(self.called, record.layers, AttentionLayer)
            gradients = record.gradients(logit)
        layers = self._chosen(layers)
        lrp = self.variant == "lrp"
        factors = self._relevances(inputs, target, layers) if lrp else [layer.attention("each") for layer in layers]
        weighted = {
            layer.name: (of_one_token(layer, gradients[layer.name]) * factor).clamp(min=0).mean(1)
            for layer, factor in zip(layers, factors, strict=True)
        }

        def step(layer: AttentionLayer) -> tuple[Product, float]:
            return dense(weighted[layer.name])

        row = roll_out_weighted(layers, query_weights(layers[-1], query), step)
        return [(layers[0].layout, row)]

    def _chosen(self, layers: list[AttentionLayer]) -> list[AttentionLayer]:
        if self.layers is not None:
            return layers
        start = self.start_layer
        if start is None:
            start = min(_LRP_START, len(layers) - 1) if self.variant == "lrp" else 0
        if not 0 <= start < len(layers):
            raise ValueError(
                f"TransformerAttribution(start_layer={start}): the model has the layers 0..{len(layers) - 1}."
            )
        return layers[start:]

    @torch.inference_mode(False)  # relevance starts from a gradient
    @torch.no_grad()
    def _relevances(self, images: Tensor, target: Target, layers: Sequence[AttentionLayer]) -> list[Tensor]:
        """Return R(P_h) of every layer, scaled as for a head that reads one token."""
        call = "TransformerAttribution(variant='lrp')"
        block_relevance.require_known(call, self.model)
        blocks = list(self.model.get_submodule("blocks").children())
        kept, tokens = block_relevance.run(self.model, images)
        logits = block_relevance.logits_of(self.model, tokens)
        with torch.enable_grad():
            logits.requires_grad_()
            value = self._values(logits, target, len(images)).sum()
            (start,) = torch.autograd.grad(value, logits)
        relevance = block_relevance.from_logits(self.model, start, tokens)
        wanted = {id(self.model.get_submodule(layer.name)): layer for layer in layers}
        found: dict[str, Tensor] = {}
        for block, values in zip(reversed(blocks), reversed(kept), strict=True):
            relevance, own = block_relevance.through_block(block, relevance, values)
            layer = wanted.get(id(block.get_submodule("attn")))
            if layer is None:
                continue
            _require_same(call, layer, values.probabilities)
            found[layer.name] = of_one_token(layer, own)
            if len(found) == len(wanted):
                break
        return [found[layer.name] for layer in layers]


def _require_same(call: str, layer: AttentionLayer, probabilities: Tensor) -> None:
    """Refuse a model whose own forward differs from running its parts in order."""
    difference = float((layer.record.probabilities - probabilities).abs().max())
    if not difference < 1e-3:
        raise UnsupportedModelError(
            f"{call}: {layer.name} attends differently (by {difference:.2g}) than the model's parts do when run in "
            "order: something else changes its tokens, as dropout in training mode does; call model.eval(), or use "
            "variant='gradient_x_attention'."
        )
