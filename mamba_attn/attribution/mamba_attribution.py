"""Mamba-Attribution: hidden attention weighted by the gradient of a class, rolled out over the layers."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.attribution.attention_rollout import Product, dense, of_one_token, roll_out_weighted
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.queries import Query, query_weights, single_token
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError
from mamba_attn.ops.arguments import at_tokens, to_tokens
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders, DoorLayer
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import ScanLayer, require


class MambaAttribution(TokenAttribution):
    """The query's row of the product of the layers' gradient-weighted attention; depends on the class.

    With W the weighted attention of a layer and I its residual stream, the map is the query's row of the product of
    I + W over the layers, last to first, minus the part carried by the residual streams alone (the query itself). The
    product is carried from layer to layer, one dense matrix at a time; stages of VMamba as in ``AttentionRollout``.

    W is the positive part of sum_c dlogit/dM_c * M_c: the gradient of every channel's matrix times that matrix,
    dlogit/dM_c[i, j] = dlogit/dy_c[i] u_c[j]. The positive part is taken after the sum over channels and routes, per
    pair of tokens.

    ``rule="paper"`` and ``rule="published_code"`` take W as arXiv 2403.01590 (eq. 24) and its code do, on the true
    matrices: ``mamba_attn.attribution.published.Equation24`` and ``PublishedRecipe`` say how. They, and a published
    ``convention``, are other methods, which know none of the options below but ``layers``.

    This departs from the paper, which multiplies a mean of gradients and a mean of matrices: here the matrix of
    every channel has its own gradient, so that W before its positive part sums to dlogit/dy * (y - D u), the share of
    the layer's attention in the logit to first order. As in the paper, nothing is normalised.

    In a model that averages over patches instead of reading a class token, the gradient dlogit/dy is multiplied by
    the number of the layer's patches: the average gives each patch that share of the gradient, and the default query,
    the mean over patches, divides by their number again.

    Args:
        model: a model that ``mamba_attn.trace`` knows.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        rule: "gradient_x_attention", "paper" or "published_code", see above. The last uses the late layers unless
            ``layers`` names some.
        rollout: False averages the layers' rows instead, each query's as in ``RawAttention``, in linear time. The
            positive part is then taken after the mean over the query's tokens.
        signed: no positive part; time and memory linear in tokens.
        convention: "exact", or published code whose map to return instead: "hidden_mamba" or "implicit_unified", see
            ``mamba_attn.attribution.published``. These use their late layers unless ``layers`` is given.

    Raises:
        ValueError: an unknown rule or convention, or other options together with one. When called: a model without the
            class token that the convention needs, or a pixel or box for which it has no row.
        UnsupportedModelError: when called, layers that are softmax attention.

    Example:
        >>> MambaAttribution(model).attribute(torch.randn(2, 3, 224, 224), target=[281, 207]).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        rule: str = "gradient_x_attention",
        rollout: bool = True,
        signed: bool = False,
        convention: str = "exact",
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        self.rule = rule
        self.rollout = rollout
        self.signed = signed
        self.convention = convention
        self._other = self._published(MambaAttribution, "convention") or self._published(MambaAttribution, "rule")

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        if self._other is not None:
            return self._at_this_call(self._other)._explain(inputs, target, query)
        if not self.rollout:
            return self._rows(inputs, target, query)
        with self._traced(inputs, target, gradients=True, multiplied=True) as (record, logit):
            layers = require(self.called, record.layers, ScanLayer)
            gradients = _of_one_token(layers, record.gradients(logit))

        def step(layer: ScanLayer) -> tuple[Product, float]:
            gradient = gradients[layer.name]
            if self.signed:
                return _signed(layer, gradient)
            return dense(gradient_x_attention(layer, gradient).clamp(min=0))

        return [(layers[0].layout, roll_out_weighted(layers, query_weights(layers[-1], query), step))]

    def _rows(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        """Return every layer's own row; the mean over all tokens needs nothing but the backward pass."""
        rules = None if self._call.trace is not None else OwnInputs()
        with self._traced(inputs, target, gradients=True, rules=rules) as (record, logit):
            layers = require(self.called, record.layers, ScanLayer)
            at_doors = any(isinstance(layer, DoorLayer) for layer in layers)  # whose u is in no graph
            if rules is not None and query is None and not at_doors and all(map(reads_all, layers)):
                outputs, inner = own_gradients(layers, logit)
                rows = [summed_rows(*each) for each in zip(layers, outputs, inner, strict=True)]
            else:
                found = _of_one_token(layers, record.gradients(logit))
                rows = [_row(layer, query, found[layer.name]) for layer in layers]
        rows = rows if self.signed else [row.clamp(min=0) for row in rows]
        return [(layer.layout, row) for layer, row in zip(layers, rows, strict=True)]


def _row(layer: ScanLayer, query: Query | None, gradient: Tensor) -> Float[Tensor, "batch tokens"]:
    """Return the mean of the query's rows. A finite logit implies finite layers; the map itself is checked later."""
    token, scan = single_token(layer.layout, query), layer.scan
    if token is None:
        vector = query_weights(layer, query)
        return ops.left_product(scan, vector=vector, fold="sum", row_weight=gradient, col_weight=scan.u)
    # a single row needs only one token's weights, so nothing is gathered for the others
    weight = gradient[:, None, :, token, None].expand(-1, scan.routes, -1, scan.length)
    return ops.attention_row(scan, row=token, fold="sum", row_weight=weight, col_weight=scan.u)


def _of_one_token(layers: Sequence[ScanLayer], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {layer.name: of_one_token(layer, gradients[layer.name]) for layer in layers}


def _signed(layer: ScanLayer, gradient: Float[Tensor, "batch channels tokens"]) -> tuple[Product, float]:
    layer.require_finite()
    scan = layer.scan
    return lambda row: ops.left_product(scan, vector=row, row_weight=gradient, col_weight=scan.u, fold="sum"), 1.0


def gradient_x_attention(
    layer: ScanLayer, gradient: Float[Tensor, "batch channels tokens"]
) -> Float[Tensor, "batch tokens tokens"]:
    """Return sum_c dlogit/dM_c * M_c, signed: dlogit/dM_c[i, j] = dlogit/dy_c[i] u_c[j].

    Its sum over all pairs is dlogit/dy * (y - D u), the contribution of this layer's attention to the logit to first
    order.

    Args:
        layer: the layer.
        gradient: dlogit/dy.
    """
    return layer.attention("sum", row_weight=gradient, col_weight=layer.scan.u)


# The mean of all rows comes for free with the backward pass. Summed over its rows, the weighted attention of a layer is
# u times M^T dlogit/dy, which is the gradient of the logit with respect to u through the scan alone, minus the part of
# the skip D. So no scan runs again.


class OwnInputs(Rules):
    """Gives every scan its own view of u, without changing values; delta, B and C depend on the original u."""

    at_doors: ClassVar[bool] = True  # where it changes nothing

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Replace u by a view, whose gradient is then that of the scan alone."""
        u = record.source_u  # delta, B and C come from this very tensor, so its own gradient would include theirs
        if torch.is_grad_enabled() and not u.requires_grad:  # a frozen model
            u = u.detach().requires_grad_()
        return record.replace(
            source_u=u.view_as(u)
        )  # a separate autograd node, which receives only this scan's gradient


def reads_all(layer: ScanLayer) -> bool:
    """Whether the default query of a layer is the mean over all its tokens."""
    return len(layer.layout.patches) == layer.tokens


def own_gradients(layers: list[ScanLayer], logit: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return dlogit/dy of every layer, and dlogit/du of its scan alone.

    Args:
        layers: of a pass with ``OwnInputs``.
        logit: a scalar.

    Raises:
        TraceError: the scalar does not depend on this forward pass.
    """
    tensors = [*(layer.y for layer in layers), *(layer.scan.source_u for layer in layers)]
    if not logit.requires_grad:
        raise TraceError(
            "gradients: the value to explain does not depend on this forward pass; take it from its output."
        )
    found = torch.autograd.grad(logit, tensors, allow_unused=True)
    filled = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(tensors, found, strict=True)
    ]
    return filled[: len(layers)], filled[len(layers) :]


def summed_rows(
    layer: ScanLayer, gradient: Float[Tensor, "batch channels tokens"], own: Tensor
) -> Float[Tensor, "batch tokens"]:
    """Return sum_i sum_c dlogit/dy_c[i] M_c[i, j] u_c[j] for every token j.

    Args:
        layer: the layer.
        gradient: dlogit/dy.
        own: dlogit/du of its scan alone, in u's shape.
    """
    scan = layer.scan
    u, own, gradient = (x.detach().to(layer.dtype) for x in (scan.source_u, own, gradient))
    D = None if scan.D is None else scan.D.detach().to(layer.dtype) * scan.scale
    if D is not None and D.ndim == 3:  # of tokens: no route's own
        skipped = (gradient * D * scan.token_u.detach()).sum(1)
        return summed_rows(ScanLayer(layer.name, scan.replace(D=None)), gradient, own) - skipped
    if scan.source_frame == "tokens" and u.shape[1] == 1 and _everywhere_alike(scan):
        direct = own if D is None else own - (gradient * D.sum(0).unsqueeze(1)).unsqueeze(1)
        return (u * direct).sum((1, 2))
    total = torch.zeros(layer.batch, layer.tokens, dtype=layer.dtype, device=layer.device)
    if scan.source_frame == "tokens":
        total = total + (u * own).sum((1, 2))
    for route in range(scan.routes):
        reads, writes = (order[..., route, None, :] for order in (scan.read_order, scan.write_order))
        source = u[:, min(route, u.shape[1] - 1)]
        source = at_tokens(source, reads) if scan.source_frame == "tokens" else source
        values = torch.zeros_like(source) if scan.source_frame == "tokens" else own[:, route]
        values = values if D is None else values - at_tokens(gradient, writes) * D[route].unsqueeze(1)
        total = total + to_tokens((source * values).sum(1), reads[..., 0, :], layer.tokens)
    return total


def _everywhere_alike(scan: ScanRecord) -> bool:
    """Whether every route visits every token, and reads where it writes."""
    everywhere = scan.length == scan.tokens and not any(scan.lacking)
    return everywhere and torch.equal(scan.read_order, scan.write_order)
