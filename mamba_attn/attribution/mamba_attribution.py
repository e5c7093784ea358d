"""Mamba-Attribution: hidden attention weighted by the gradient of a class, rolled out over the layers."""

from collections.abc import Sequence

from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.attribution import row_sums
from mamba_attn.attribution._base import Row, TokenAttribution
from mamba_attn.attribution._product import Product, Step, dense, of_one_token, roll_out
from mamba_attn.attribution._queries import Query, query_weights, single_token
from mamba_attn.attribution._targets import Target
from mamba_attn.attribution.published import base, conventions
from mamba_attn.attribution.published.conventions import Watch
from mamba_attn.attribution.published.weighted import gated_gradients, gradient_x_attention, paper, published
from mamba_attn.errors import nearest
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import ScanLayer, require

RULES = ("gradient_x_attention", "paper", "published_code")


class MambaAttribution(TokenAttribution):
    """The query's row of the product of the layers' gradient-weighted attention; depends on the class.

    With W the weighted attention of a layer and I its residual stream, the map is the query's row of the product of
    I + W over the layers, last to first, less what the residual streams alone carry, which is the query itself. The
    product is carried from layer to layer, one dense matrix at a time; stages of VMamba as in ``AttentionRollout``.

    ============================  =====================================================================================
    rule                          W
    ============================  =====================================================================================
    ``"gradient_x_attention"``    positive part of sum_c dlogit/dM_c * M_c: the gradient of every channel's matrix times
                                  that matrix, dlogit/dM_c[i, j] = dlogit/dy_c[i] u_c[j]. The positive part is taken
                                  after the sum over channels and routes, per pair of tokens
    ``"paper"``                   positive part of mean_c(dlogit/dy'_c)[i] * mean_c(M_c)[i, j], arXiv 2403.01590 eq. 24,
                                  y' the output of the scans after the mixer's gate (and VMamba's norm). The equation
                                  leaves open which axis its gradient, a number per token, weights; here it is the
                                  rows, since y'[i] is what row i gives
    ``"published_code"``          mean_c of the positive parts of M_c, divided by the largest entry of all, times s[j]:
                                  the positive part of dlogit/d(mixer output) at token j, its largest feature, scaled to
                                  0..1 over tokens. Rows of I + W divided by their sums; layers from round(15 / 24
                                  depth) on unless ``layers`` names some. The published recipe on the true matrices
    ============================  =====================================================================================

    The default departs from the paper, which multiplies a mean of gradients and a mean of matrices: here the matrix of
    every channel has its own gradient, so that W before its positive part sums to dlogit/dy * (y - D u), the share of
    the layer's attention in the logit to first order. As in the paper, nothing is normalised.

    In a model that averages over patches instead of reading a class token, both gradients dlogit/dy are multiplied by
    the number of the layer's patches: the average gives each patch that share of the gradient, and the default query,
    the mean over patches, divides by their number again.

    Args:
        model: a model that ``mamba_attn.trace`` knows.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        rule: one of the three above.
        rollout: False averages the layers' rows instead, each query's as in ``RawAttention``, in linear time;
            "gradient_x_attention" only. The positive part is then taken after the mean over the query's tokens.
        signed: no positive part; time and memory linear in tokens; "gradient_x_attention" only.
        convention: "exact"; "hidden_mamba" or "implicit_unified", the map as the code published with arXiv 2403.01590
            or 2405.16504 makes it from its class token's rows, of the late layers unless ``layers`` names some, minima
            and maxima per image. It has a rule of its own: leave ``rule`` and ``rollout`` as they are.

    Raises:
        ValueError: an unknown rule or convention, or two options that exclude each other; when called, a model without
            a class token, or a pixel or box, where the convention needs the one and has no row for the other.
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
        rule: str = "gradient_x_attention",
        rollout: bool = True,
        signed: bool = False,
        convention: str = conventions.EXACT,
    ) -> None:
        super().__init__(model, layers=layers)
        known = (conventions.EXACT, *conventions.CLASS_TOKEN)
        conventions.check_convention("MambaAttribution", convention, known, signed=signed)
        _check_rule(rule, convention, rollout=rollout, signed=signed)
        self.rule = rule
        self.rollout = rollout
        self.signed = signed
        self.convention = convention

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        if self.convention != conventions.EXACT:
            name = self.convention
            return base.explain(
                self, name, inputs, target, query,
                lambda rows, gradients, token: base.mamba_attribution(name, rows, gradients, token),
                gradients=True,
            )  # fmt: skip
        if not self.rollout:
            return self._rows(inputs, target, query)
        watch = Watch()  # holds on to activations, so only where they are needed
        rules = watch if self.rule == "paper" else None
        with self._traced(inputs, target, gradients=True, rules=rules) as (record, logit):
            layers = require("MambaAttribution", record.layers, ScanLayer)
            if self.rule == "paper":
                gradients = gated_gradients(layers, logit, watch)
            else:
                gradients = record.gradients(logit, of="output" if self.rule == "published_code" else "y")
        if self.rule == "published_code":
            layers = layers if self.layers is not None else conventions.late_layers(layers)
            return self._rolled(layers, query, lambda layer: _rows_divided(published(layer, gradients[layer.name])))
        gradients = _of_one_token(layers, gradients)
        if self.rule == "paper":
            return self._rolled(layers, query, lambda layer: dense(paper(layer, gradients[layer.name])))
        if self.signed:
            return self._rolled(layers, query, lambda layer: _signed(layer, gradients[layer.name]))
        return self._rolled(
            layers, query, lambda layer: dense(gradient_x_attention(layer, gradients[layer.name]).clamp(min=0))
        )

    def _rolled(self, layers: Sequence[ScanLayer], query: Query | None, step: Step[ScanLayer]) -> list[Row]:
        start = query_weights(layers[-1], query)
        return [(layers[0].layout, roll_out(layers, start, step))]

    def _rows(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        """Every layer's own row; for the mean over all tokens nothing but the backward pass is needed."""
        with self._traced(inputs, target, gradients=True, rules=row_sums.OwnInputs()) as (record, logit):
            layers = require("MambaAttribution", record.layers, ScanLayer)
            if query is None and all(map(row_sums.reads_all, layers)):
                outputs, inner = row_sums.gradients(layers, logit)
                rows = [row_sums.summed_rows(*each) for each in zip(layers, outputs, inner, strict=True)]
            else:
                found = _of_one_token(layers, record.gradients(logit))
                rows = [_row(layer, query, found[layer.name]) for layer in layers]
        rows = rows if self.signed else [row.clamp(min=0) for row in rows]
        return [(layer.layout, row) for layer, row in zip(layers, rows, strict=True)]


def _row(layer: ScanLayer, query: Query | None, gradient: Tensor) -> Float[Tensor, "batch tokens"]:
    """The mean of the query's rows. That the logit is finite says that the layers are; the map is looked at later."""
    token, scan = single_token(layer.layout, query), layer.scan
    if token is None:
        vector = query_weights(layer, query)
        return ops.left_product(scan, vector=vector, fold="sum", row_weight=gradient, col_weight=scan.u)
    # one row needs one token's weights: nothing is gathered for the others
    weight = gradient[:, None, :, token, None].expand(-1, scan.routes, -1, scan.length)
    return ops.attention_row(scan, row=token, fold="sum", row_weight=weight, col_weight=scan.u)


def _of_one_token(layers: Sequence[ScanLayer], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {layer.name: of_one_token(layer, gradients[layer.name]) for layer in layers}


def _rows_divided(weighted: Float[Tensor, "batch tokens tokens"]) -> tuple[Product, Tensor]:
    return dense(weighted)[0], 1 + weighted.sum(-1)


def _signed(layer: ScanLayer, gradient: Float[Tensor, "batch channels tokens"]) -> tuple[Product, float]:
    layer.require_finite()
    scan = layer.scan
    return lambda row: ops.left_product(scan, vector=row, row_weight=gradient, col_weight=scan.u, fold="sum"), 1.0


def _check_rule(rule: str, convention: str, *, rollout: bool, signed: bool) -> None:
    if rule not in RULES:
        raise ValueError(f"MambaAttribution(rule={rule!r}): no such rule. {nearest(rule, RULES)}")
    other = [f"rule={rule!r}"] if rule != RULES[0] else []
    options = [*(["rollout=False"] if not rollout else []), *(["signed=True"] if signed else [])]
    if other and options:
        raise ValueError(
            f"MambaAttribution({', '.join(other + options)}): {options[0]} is for rule='gradient_x_attention' alone."
        )
    if convention != conventions.EXACT and (other or options):
        raise ValueError(
            f"MambaAttribution(convention={convention!r}, {', '.join(other + options)}): a published convention has a "
            "rule of its own; leave these out."
        )
