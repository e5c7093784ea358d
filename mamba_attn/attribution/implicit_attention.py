"""ImplicitAttention: the attention matrix of a whole mixer, its gate, activation and convolution included."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution._base import Row, Target, TokenAttribution
from mamba_attn.attribution._implicit import PARTS, Implicit, ImplicitWatch
from mamba_attn.attribution._product import Product, dense, of_one_token, roll_out
from mamba_attn.attribution._queries import Place, Query, query_weights
from mamba_attn.attribution.published.weighted import gated_gradients
from mamba_attn.tracing.layer_names import ByLayer, LayerNames
from mamba_attn.tracing.layers import ScanLayer, require


class ImplicitAttention(TokenAttribution):
    """The query's row of the mixers' implicit attention, the unified formulation of arXiv 2405.16504.

    A mixer's channel c is linear in what its convolution receives, x, when the data-dependent factors are held fixed:

        M_c = diag(silu(z)) sum_r (alpha_r + diag(D)) diag(sigmoid(p_r)) T_r        M_c x + constant = the gated output

    (arXiv 2405.16504, with the skip D and, in the constant, the convolution's bias, which it leaves out).
    alpha_r is the hidden attention along route r, T_r the causal convolution along it, p_r its output, z the gate; in
    the token frame, times the mixer's scale (1/2 in Vim). In VMamba T is the 2-d convolution over the grid, and what
    M x + constant equals is what enters out_norm: the gate of its first generation comes after that norm and is no part
    of M.

    ==============================  ===================================================================================
    ``gradient=True``               W = sum_c dlogit/dM_c * M_c, dlogit/dM_c[i, j] = dlogit/do_c[i] x_c[j], o the gated
                                    output (VMamba: what enters out_norm); depends on the class
    ``gradient=False``              W = mean_c M_c; independent of the class
    ``rollout=True``                the query's row of the product of I + W^+ over the layers, last to first, less what
                                    the residual streams alone carry; nothing is normalised. Dense, one matrix at a time
    ``rollout=False``               the query's rows of W, their positive part, averaged over the layers, a coarse
                                    token's share spread over the area that it covers; in linear time
    ``signed=True``                 no positive part; linear in time with either
    ==============================  ===================================================================================

    The positive part is taken after the sum over channels, routes and taps; without rollout after the mean over the
    query's tokens too. With ``gradient=True`` W before its positive part sums to dlogit/do * (o - constant), the
    layer's share in the logit to first order. In a model that averages over patches the gradients are multiplied by
    their number, as in ``MambaAttribution``, whose W has alpha and u in the places of M and x.

    ``skip``, ``gate``, ``conv`` and ``activation`` leave a factor out of M (D: 0; the others: the identity), in
    ablations; x and dlogit/do stay what they are. ``convention="implicit_unified"`` of the other methods is the
    published code's map: no D, its class token's row in all rows, its own weights and scales.

    Args:
        model: Vim or VMamba.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        gradient: see above.
        rollout: see above.
        signed: see above.
        skip: keep D.
        gate: keep diag(silu(z)).
        conv: keep T.
        activation: keep diag(sigmoid(p)).

    Raises:
        UnsupportedModelError: when called, layers that are softmax attention, or mixers of another make.

    Example:
        >>> ImplicitAttention(model, gradient=False, rollout=False).attribute(images).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        gradient: bool = True,
        rollout: bool = True,
        signed: bool = False,
        skip: bool = True,
        gate: bool = True,
        conv: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__(model, layers=layers)
        self.gradient = gradient
        self.rollout = rollout
        self.signed = signed
        self.parts = dict(zip(PARTS, (skip, gate, conv, activation), strict=True))

    def rows(
        self, inputs: Tensor, query: Sequence[float] | None = None, *, pixel: Place | None = None,
        box: Place | None = None,
    ) -> ByLayer[Float[Tensor, "batch tokens"]]:  # fmt: skip
        """Return the query's signed row of mean_c M_c in every layer by the layers' names, in linear time.

        Args:
            inputs: as in ``attribute``.
            query: deprecated, as in ``attribute``.
            pixel: as in ``attribute``.
            box: as in ``attribute``.

        Raises:
            ValueError: inputs that are no batch, a pixel or box outside the image, both of them.
        """
        asked = self._asked("rows", inputs, query, pixel, box)
        with torch.no_grad():
            weighted = self._weighted(inputs, None, gradient=False)
            return ByLayer({part.layer.name: part.row(query_weights(part.layer, asked)) for part in weighted})

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        weighted = self._weighted(inputs, target, gradient=self.gradient)
        if not self.rollout:
            rows = ((part.layer, part.row(query_weights(part.layer, query))) for part in weighted)
            return [(layer.layout, row if self.signed else row.clamp(min=0)) for layer, row in rows]
        by_name = {part.layer.name: part for part in weighted}

        def step(layer: ScanLayer) -> tuple[Product, float]:
            part = by_name[layer.name]
            return (part.row, 1.0) if self.signed else dense(part.matrix().clamp(min=0))

        layers = [part.layer for part in weighted]
        return [(layers[0].layout, roll_out(layers, query_weights(layers[-1], query), step))]

    def _weighted(self, inputs: Tensor, target: Target, *, gradient: bool) -> list["_Weighted"]:
        """W of every layer."""
        watch = ImplicitWatch()
        with self._traced(inputs, target, gradients=gradient, rules=watch) as (record, logit):
            layers = require("ImplicitAttention", record.layers, ScanLayer)
            found: Mapping[str, Tensor] = gated_gradients(layers, logit, watch) if gradient else {}
            weighted = []
            for layer in layers:
                implicit = Implicit(layer, watch, **self.parts)
                if gradient:
                    rows, columns = of_one_token(layer, found[layer.name]).to(implicit.x), implicit.x
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
        """Return W."""
        return self.implicit.matrix(self.rows, self.columns)
