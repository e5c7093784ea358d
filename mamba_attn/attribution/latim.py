"""LaTIM: how much of a token's vector each other token makes, layer by layer, multiplied over the layers."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn._types import Float, Int
from mamba_attn.attribution.attention_rollout import roll_out
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.interactions import InteractionRecorder, Interactions
from mamba_attn.attribution.queries import Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.errors import nearest
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import ByLayer, LayerNames
from mamba_attn.tracing.layers import Layer, ScanLayer, require

AGGREGATIONS = ("alti", "l2")
_WORKSPACE = 2**22  # numbers of the vectors that are held at once


class LaTIM(TokenAttribution):
    """How much of a token's vector each other token makes: LaTIM (arXiv 2502.15612); the same for every class.

    A mixer's output is written as a sum of one vector per token that is read (arXiv 2502.15612),

        y_i = sum_j T_i(x_j)        T_i(x_j) = W (z_i * v_ij)

    with v_ij the part of the scans' output that comes from token j, channel by channel, z the gate and W out_proj. The
    activation between convolution and scan is no sum, and f = SiLU of every tap of the convolution alone stands for it,
    the paper's best choice; what that leaves over, and all biases, belong to no token. To T_i(x_i) comes token i of the
    residual stream x, so that the block's output b_i = x_i + y_i is what is split. The size of a part, in rows divided
    by their sums:

    ==========  ======================================================================================================
    ``"alti"``  max(0, |b_i|_1 - |b_i - T_i(x_j)|_1), by how much the token brings the sum closer (ALTI, arXiv
                2203.04212)
    ``"l2"``    |T_i(x_j)|_2
    ==========  ======================================================================================================

    The query's row of the product of these matrices is carried from the last layer to the first, as ALTI does, and sums
    to 1.

    The paper is about language models. Ours are: routes and both directions are summed as vectors, which out_proj
    allows; a convolution over the grid has neighbours for taps; out_norm of VMamba has its denominator held fixed, as
    the norm of Mamba-2 in the paper; the stages of VMamba meet as in ``AttentionRollout``; the query is the class
    token, or all patches. What stands in a block besides the mixer, as an MLP, moves nothing between tokens and is left
    out. A row without a positive part stays with its token.

    Where no adapter knows a mixer and its scan is seen at a door, convolution and gate are found as in
    ``ImplicitAttention``, and the norm and the projection behind them by number too.

    Args:
        model: as in ``ImplicitAttention``, with a norm before every mixer, a module that is called with the residual
            stream. Fused norms hide the stream and are refused.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        aggregation: one of the above.

    Raises:
        ValueError: another aggregation.
        UnsupportedModelError: when called, layers that are softmax attention, or mixers of another make.

    Example:
        >>> LaTIM(model, layers=[-2, -1], aggregation="l2").attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """

    reads_traces: ClassVar[bool] = False  # it watches the pass
    reads_gradients: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        aggregation: str = "alti",
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"LaTIM(aggregation={aggregation!r}): no such one. {nearest(aggregation, AGGREGATIONS)}")
        self.aggregation = aggregation

    def matrices(self, inputs: Tensor) -> ByLayer[Float[Tensor, "batch tokens tokens"]]:
        """Return every layer's matrix by the layers' names: in row i what each token makes of token i.

        Args:
            inputs: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch.
        """
        bound = self._called_with("matrices", inputs)
        with torch.no_grad():
            found = {}
            for layer, parts in bound._interactions(inputs, None):
                matrix = parts.stream.new_empty(layer.batch, layer.tokens, layer.tokens)
                for image in range(layer.batch):
                    for rows, values in self._rows(parts, image, torch.arange(layer.tokens, device=matrix.device)):
                        matrix[image, rows] = values
                found[layer.name] = matrix
            return ByLayer(found)

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        pairs = self._interactions(inputs, target, multiplied=True)
        layers = [layer for layer, _ in pairs]
        by_name = {layer.name: parts for layer, parts in pairs}

        def product(layer: Layer, row: Tensor) -> Tensor:
            result = torch.zeros_like(row)
            for image, own in enumerate(row):
                for rows, values in self._rows(by_name[layer.name], image, own.nonzero().flatten()):
                    result[image] += own[rows] @ values.to(row)
            return result

        return [(layers[0].layout, roll_out(layers, query_weights(layers[-1], query), product=product))]

    def _interactions(
        self, inputs: Tensor, target: Target, *, multiplied: bool = False
    ) -> list[tuple[ScanLayer, Interactions]]:
        recorder = InteractionRecorder()
        with self._traced(inputs, target, rules=recorder, multiplied=multiplied) as (record, _):
            layers = require(self.called, record.layers, ScanLayer)
            return [(layer, Interactions(layer, recorder, self.called)) for layer in layers]

    def _rows(
        self, parts: Interactions, image: int, rows: Int[Tensor, " rows"]
    ) -> Iterator[tuple[Int[Tensor, " some"], Float[Tensor, "some tokens"]]]:
        """Rows of one image's matrix, some at a time."""
        for some in rows.split(max(1, _WORKSPACE // (parts.width * parts.tokens))):
            vectors = parts.vectors(image, some)
            vectors[:, torch.arange(len(some), device=some.device), some] += parts.stream[image][:, some]
            if self.aggregation == "l2":
                sizes = torch.linalg.vector_norm(vectors, dim=0)
            else:
                block = (parts.stream[image] + parts.output[image])[:, some, None]
                # feature by feature, so that what hands on nothing has exactly 0
                sizes = (block.abs() - (block - vectors).abs()).sum(0).clamp(min=0)
            own = torch.zeros_like(sizes).scatter(1, some[:, None], 1.0)
            sums = sizes.sum(1, keepdim=True)
            yield some, torch.where(sums > 0, sizes / sums, own)
