"""AttentionRollout, and the products over layers that it shares with the gradient-weighted methods.

``roll_out`` multiplies I + A, ``roll_out_weighted`` I + W with W any weighted attention; ``to_finer`` carries a row
from one stage to the finer one before it.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.queries import Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import AnyLayer, Layer

Product = Callable[[Tensor], Tensor]  # row -> row @ W
Step = Callable[[AnyLayer], tuple[Product, Tensor | float]]


class AttentionRollout(TokenAttribution):
    """The query's row of the product of all layers' attention (arXiv 2005.00928, eq. 1); independent of the class.

    By default, average each layer's matrix over channels and sum it over routes (in a ViT: average heads), take the
    positive part, add the identity for the residual stream, and divide rows by their sums. The query's row of the
    product is carried from the last layer to the first, one dense matrix at a time; it sums to 1.

    Between stages of VMamba, downsampling acts as its averaging matrix: a token takes the mean of the block of tokens
    that it covers. The global pool acts as the mean over tokens, which is the default query there.

    Args:
        model: a model that ``mamba_attn.trace`` supports.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        signed: no positive part and no normalisation, I + attention as it is; time and memory linear in tokens.
        convention: "exact", or published code whose map to return instead: "hidden_mamba", "implicit_unified",
            "vmamba_analysis" or "vmamba_analysis_dt", see ``mamba_attn.attribution.published``. These take no other
            option; they use their own default layers unless ``layers`` is given.

    Raises:
        ValueError: an unknown convention, or a published one with ``signed=True``. When called: a convention that does
            not suit the model, or a pixel or box for one that only computes the class token's row.

    Example:
        >>> AttentionRollout(model, signed=True).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    reads_gradients: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        signed: bool = False,
        convention: str = "exact",
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        self.signed = signed
        self.convention = convention
        self._other = self._published(AttentionRollout, "convention")

    @property
    def shared_folds(self) -> tuple[str, ...]:
        """The mean, but for published code."""
        return () if self._other is not None else ("mean",)

    @property
    def needs_matrices(self) -> bool:
        """Whether it computes whole matrices; with ``signed`` rows will do."""
        return not self.signed

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        if self._other is not None:
            return self._at_this_call(self._other)._explain(inputs, target, query)
        with self._traced(inputs, target, multiplied=True) as (record, _):
            layers = record.layers
        start = query_weights(layers[-1], query)
        row = roll_out(layers, start, signed=self.signed)
        return [(layers[0].layout, row)]


def roll_out(
    layers: Sequence[Layer],
    row: Float[Tensor, "batch last_tokens"],
    *,
    signed: bool = False,
    product: Callable[[Layer, Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch first_tokens"]:
    """Return ``row`` times the product of the layers' matrices, from the last layer to the first.

    Args:
        layers: in execution order.
        row: over the tokens of the last layer.
        signed: I + attention instead of the normalised positive part.
        product: of a row with a layer's matrix, where that is another than either.
    """
    if product is None:
        product = _signed_product if signed else _normalised_product
    for index in reversed(range(len(layers))):
        layer = layers[index]
        row = product(layer, row)
        if index > 0:
            row = to_finer(row, layers[index - 1].layout, layer.layout)
    return row


def _signed_product(layer: Layer, row: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    return layer.left_product(row)


def _normalised_product(layer: Layer, row: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Row @ (I + A+), rows of the matrix divided by their sums, which are at least 1."""
    positive = layer.attention("mean").clamp(min=0)
    weighted = row / (1 + positive.sum(-1))
    return weighted + (weighted.unsqueeze(1) @ positive).squeeze(1)


def roll_out_weighted(
    layers: Sequence[AnyLayer],
    start: Float[Tensor, "batch last_tokens"],
    step: Step[AnyLayer],
) -> Float[Tensor, "batch first_tokens"]:
    """Return ``start`` times the product of the layers' I + W, minus the part carried by the identities alone.

    The two parts are carried apart: W can be thousands of times smaller than the identity.

    Args:
        layers: in execution order.
        start: over the tokens of the last layer.
        step: for a layer, the product with its W from the left, and what the rows of I + W are divided by.
    """
    alone, rest = start, torch.zeros_like(start)
    for index in reversed(range(len(layers))):
        product, divisor = step(layers[index])
        alone, rest = alone / divisor, rest / divisor
        rest = rest + product(alone + rest)
        if index > 0:
            finer, coarser = layers[index - 1].layout, layers[index].layout
            alone, rest = to_finer(alone, finer, coarser), to_finer(rest, finer, coarser)
    return rest


def of_one_token(layer: Layer, gradient: Tensor) -> Tensor:
    """Return the gradient of the logit as it were if the head read one token alone.

    A head that averages over tokens hands each of them 1 / tokens of the logit's gradient, and the query that stands
    for such a head averages over them once more; a class token is one token already, and so is a text's last.

    Args:
        layer: the layer.
        gradient: of the logit, of any shape.
    """
    layout = layer.layout
    return gradient if layout.class_tokens or not layout.pixels else gradient * len(layout.patches)


def dense(weighted: Float[Tensor, "batch tokens tokens"]) -> tuple[Product, float]:
    """Return the step of a W that is held as a matrix, nothing divided."""
    return lambda row: (row.unsqueeze(1) @ weighted).squeeze(1), 1.0


def to_finer(
    row: Float[Tensor, "batch coarse_tokens"], finer: TokenLayout, coarser: TokenLayout
) -> Float[Tensor, "batch fine_tokens"]:
    """Return ``row`` times the averaging matrix of what lies between two layers; its sum over patches is kept.

    A token takes the mean of the block of tokens that it covers. Convolutions with overlapping windows, as VMamba's of
    3 and stride 2, are treated so too: of all averages on their windows it is the only one that counts every token of
    the finer grid alike. Plain means over the windows count every other row and column twice, and one corner of the
    image more than the other. What a row has at the padding of windows goes nowhere: every call puts zeros there. On
    one grid patches stay where they are, however much padding each layer has.

    Args:
        row: over the coarser layer's tokens.
        finer: token frame of the earlier layer.
        coarser: token frame of the later layer.

    Raises:
        UnsupportedModelError: frames of different grids that hold more than patches; a later grid that is finer.
    """
    one_frame = (finer.grid, finer.padded, finer.tokens) == (coarser.grid, coarser.padded, coarser.tokens)
    if one_frame and finer.columns_first == coarser.columns_first:
        return row
    classes = (finer.class_tokens, coarser.class_tokens)
    if finer.grid == coarser.grid and len(classes[0]) == len(classes[1]):
        kept, placed = (
            torch.cat([own.patches, torch.tensor(its, dtype=torch.long)]).to(row.device)
            for own, its in zip((coarser, finer), classes[::-1], strict=True)
        )
        return row.new_zeros(len(row), finer.tokens).index_copy(1, placed, row[:, kept])
    others = finer.class_tokens + finer.registers + coarser.class_tokens + coarser.registers
    grids = list(zip(finer.grid, coarser.grid, strict=False))
    if others or len(finer.grid) != len(coarser.grid) or any(fine < coarse for fine, coarse in grids):
        finer_grid, coarser_grid = ("x".join(map(str, layout.grid)) for layout in (finer, coarser))
        raise UnsupportedModelError(
            f"rollout from a grid of {finer_grid} to one of {coarser_grid}: only patches, on grids that shrink, can "
            "be averaged; name the layers of one stage with layers=."
        )
    fine = coarser.to_grid(row)
    for (many, few), step, finer_step in zip(grids, coarser.steps, finer.steps, strict=True):
        means = _blocks(many, few, round(step / finer_step)).to(row)
        fine = torch.tensordot(fine, means, ([1], [0]))  # the axis goes to the end, the next one is axis 1
    return row.new_zeros(len(row), finer.tokens).index_copy(1, finer.patches.to(row.device), fine.flatten(1))


def _blocks(fine: int, coarse: int, stride: int) -> Float[Tensor, "coarse fine"]:
    """Means over blocks of ``stride`` neighbours, the last maybe smaller; blocks as equal as can be if that fails."""
    owner = torch.arange(fine) // max(stride, 1)
    if owner[-1] != coarse - 1:
        owner = torch.arange(fine) * coarse // fine
    inside = (owner == torch.arange(coarse)[:, None]).double()
    return inside / inside.sum(1, keepdim=True)
