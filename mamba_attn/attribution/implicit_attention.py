"""ImplicitAttention: the attention matrix of a whole mixer, including its gate, activation and convolution."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.activation_recorder import gated_gradients
from mamba_attn.attribution.attention_rollout import Product, dense, of_one_token, roll_out_weighted
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.implicit_map import Implicit, MixerRecorder
from mamba_attn.attribution.maps import Positions
from mamba_attn.attribution.queries import Place, Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders, DoorLayer
from mamba_attn.tracing.layer_names import ByLayer, LayerNames
from mamba_attn.tracing.layers import ScanLayer, require
from mamba_attn.tracing.tracer import Trace

PARTS = ("skip", "gate", "conv", "activation")


class ImplicitAttention(TokenAttribution):
    """The query's row of the mixers' implicit attention, the unified formulation of arXiv 2405.16504.

    A mixer's channel c is linear in what its convolution receives, x, when the data-dependent factors are held fixed:

        M_c = diag(silu(z)) sum_r (alpha_r + diag(D)) diag(sigmoid(p_r)) T_r        M_c x + constant = the gated output

    (arXiv 2405.16504, plus the skip D and, in the constant, the convolution's bias, which the paper omits).
    alpha_r is the hidden attention along route r, T_r the causal convolution along it, p_r its output, z the gate; in
    the token frame, times the mixer's scale (1/2 in Vim). In VMamba T is the 2-d convolution over the grid, and what
    M x + constant equals is what enters out_norm: the gate of its first generation comes after that norm, so it is not
    part of M.

    Where no adapter knows a mixer and its scan is seen at a door, the convolution that feeds the scan is found by
    number: the one whose output, after SiLU, GELU, ReLU or nothing, is what the scan takes in, along the scan or over
    the grid. The gate is the one that goes into the scan, or the one that its output is multiplied by before anything
    else. A factor behind it, as Vim's 1/2, is not part of M there.

    ==============================  ===================================================================================
    ``gradient=True``               W = sum_c dlogit/dM_c * M_c, dlogit/dM_c[i, j] = dlogit/do_c[i] x_c[j], o the gated
                                    output (VMamba: what enters out_norm); depends on the class
    ``gradient=False``              W = mean_c M_c; independent of the class
    ``rollout=True``                the query's row of the product of I + W^+ over the layers, last to first, minus
                                    what the residual streams alone carry; nothing is normalised. Dense, one matrix at
                                    a time
    ``rollout=False``               the query's rows of W, their positive part, averaged over the layers; a coarse
                                    token's value spreads over the area that it covers. Linear time
    ``signed=True``                 no positive part; linear in time with either
    ==============================  ===================================================================================

    The positive part is taken after the sum over channels, routes and taps; without rollout after the mean over the
    query's tokens too. With ``gradient=True`` W before its positive part sums to dlogit/do * (o - constant), the
    layer's contribution to the logit to first order. In a model that averages over patches, gradients are multiplied by
    the number of patches, as in ``MambaAttribution``, whose W has alpha and u in place of M and x.

    ``skip``, ``gate``, ``conv`` and ``activation`` remove a factor from M for ablations (D: 0; the others: the
    identity); x and dlogit/do stay the same. ``convention="implicit_unified"`` of the other methods is the
    published code's map: no D, its class token's row in all rows, its own weights and scales.

    Args:
        model: Vim, VMamba, or any whose scans go through doors with a depthwise convolution before them.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        gradient: see above.
        rollout: see above.
        signed: see above.
        skip: keep D.
        gate: keep diag(silu(z)).
        conv: keep T.
        activation: keep diag(sigmoid(p)).

    Raises:
        UnsupportedModelError: when called, layers that are softmax attention, or mixers of another make; at doors,
            where no such convolution was seen.

    Example:
        >>> ImplicitAttention(model, gradient=False, rollout=False).attribute(images).shape
        torch.Size([2, 1, 224, 224])
    """

    reads_traces: ClassVar[bool] = False  # it watches the pass

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        gradient: bool = True,
        rollout: bool = True,
        signed: bool = False,
        skip: bool = True,
        gate: bool = True,
        conv: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        self.gradient = gradient
        self.rollout = rollout
        self.signed = signed
        self.parts = dict(zip(PARTS, (skip, gate, conv, activation), strict=True))

    def rows(
        self,
        inputs: Tensor,
        query: Positions = None,
        *,
        pixel: Place | None = None,
        box: Place | None = None,
    ) -> ByLayer[Float[Tensor, "batch tokens"]]:
        """Return the query's signed row of mean_c M_c in every layer by the layers' names, in linear time.

        Args:
            inputs: as in ``attribute``.
            query: as in ``attribute``.
            pixel: as in ``attribute``.
            box: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch; a pixel or box is outside the image, or both are given.
        """
        bound = self._called_with("rows", inputs)
        asked = self._asked("rows", inputs, query, pixel, box, bound._call.text)
        with torch.no_grad():
            weighted = bound._weighted(inputs, None, gradient=False)
            return ByLayer({part.layer.name: part.row(query_weights(part.layer, asked)) for part in weighted})

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        weighted = self._weighted(inputs, target, gradient=self.gradient, multiplied=self.rollout)
        if not self.rollout:
            rows = ((part.layer, part.row(query_weights(part.layer, query))) for part in weighted)
            return [(layer.layout, row if self.signed else row.clamp(min=0)) for layer, row in rows]
        by_name = {part.layer.name: part for part in weighted}

        def step(layer: ScanLayer) -> tuple[Product, float]:
            part = by_name[layer.name]
            return (part.row, 1.0) if self.signed else dense(part.matrix().clamp(min=0))

        layers = [part.layer for part in weighted]
        return [(layers[0].layout, roll_out_weighted(layers, query_weights(layers[-1], query), step))]

    def _weighted(
        self, inputs: Tensor, target: Target, *, gradient: bool, multiplied: bool = False
    ) -> list["_Weighted"]:
        """Return W of every layer, as its factors."""
        recorder = MixerRecorder()
        options = {"gradients": gradient, "multiplied": multiplied}
        with self._traced(inputs, target, rules=recorder, **options) as (record, logit):
            layers = require(self.called, record.layers, ScanLayer)
            # of layers at doors the gradient in front of the gate, where the adapters' is behind it
            found = _gradients(record, layers, logit, recorder) if gradient else {}
            weighted = []
            for layer in layers:
                implicit = Implicit(layer, recorder, called=self.called, **self.parts)
                if gradient:
                    own = of_one_token(layer, found[layer.name]).to(implicit.x)
                    rows, columns = implicit.behind_gate(own) if isinstance(layer, DoorLayer) else own, implicit.x
                else:
                    rows, columns = torch.full_like(implicit.x, 1 / layer.scan.channels), torch.ones_like(implicit.x)
                weighted.append(_Weighted(layer, implicit, rows, columns))
        return weighted


class _Weighted(NamedTuple):
    """W = sum_c rows_c[i] M_c[i, j] columns_c[j] of one layer."""

    layer: ScanLayer
    implicit: Implicit
    rows: Float[Tensor, "batch channels tokens"]
    columns: Float[Tensor, "batch channels tokens"]

    def row(self, vector: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """Return vector W, in linear time."""
        product: Tensor = self.implicit.rows(vector.unsqueeze(1).to(self.rows) * self.rows) * self.columns
        return product.sum(1)

    def matrix(self) -> Float[Tensor, "batch tokens tokens"]:
        """Return W of the layer, (batch, tokens, tokens)."""
        return self.implicit.matrix(self.rows, self.columns)


def _gradients(record: Trace, layers: list[ScanLayer], logit: Tensor, recorder: MixerRecorder) -> dict[str, Tensor]:
    """The logit's gradient at every layer's gated output, at doors at the scan's own: (batch, channels, tokens).

    Raises:
        UnsupportedModelError: a model that weighs the routes apart behind its scan.
    """
    at_doors = [layer for layer in layers if isinstance(layer, DoorLayer)]
    everywhere = record.gradients(logit) if at_doors else {}
    found = {layer.name: everywhere[layer.name] for layer in at_doors}
    for name, gradient in found.items():
        if gradient.ndim != 3:
            raise UnsupportedModelError(
                f"ImplicitAttention: the code behind the scan of {name} weighs its routes apart, and no one gradient "
                "belongs to their sum; use MambaAttribution, or gradient=False."
            )
    own = [layer for layer in layers if not isinstance(layer, DoorLayer)]
    return found | (gated_gradients(own, logit, recorder) if own else {})
