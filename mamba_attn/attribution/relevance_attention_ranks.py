"""RelevanceAttentionRanks: MambaLRP's relevance, reordered with attention; our own combination."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.grids import cell_means
from mamba_attn.attribution.implicit_attention import ImplicitAttention
from mamba_attn.attribution.lrp.mamba_lrp import MambaLRP
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.raw_attention import RawAttention
from mamba_attn.attribution.targets import Target
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.ranks import shares
from mamba_attn.errors import nearest
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layers import ScanLayer, require

_Part = ImplicitAttention | MambaLRP | RawAttention
EXTENT = ("smooth_relevance", "implicit_attention", "raw_attention")


class RelevanceAttentionRanks(MapAttribution):
    """MambaLRP's relevance, reordered by attention. New here; not from a paper.

    Relevance finds the few patches that drive the prediction and is noise on the rest of the object; attention covers
    the object but does not know what drives the prediction. Let r(m) be the rank of every patch in a map m, from 0
    (lowest) to 1 (highest), with ties at their mean. Patches are ordered by

        weight * r(relevance) ** power + r( sum of r(m) over ``extent`` )

    and the numbers of relevance's positive part are sorted into that order, the largest first. So both determine the
    order, while the map is as concentrated as relevance and nowhere negative. A high power keeps only the top of the
    relevance ranking.

    relevance is ``MambaLRP``; ``extent`` may contain ``"smooth_relevance"`` (MambaLRP with the generalised gamma rule
    in every linear layer and convolution), ``"implicit_attention"`` and ``"raw_attention"``, each with its defaults.
    All are averaged over the cells of the model's first token grid. The cost is five forward passes, three backward
    passes and, for ``"implicit_attention"``, a dense matrix of tokens per layer. The defaults were chosen on one half
    of the test images (docs/comparing.md). All cells after the positive ones are 0.

    Args:
        model: Vim or VMamba.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        power: exponent of relevance's rank, at least 0.
        weight: of relevance compared with ``extent``, at least 0.
        gamma: strength of the gamma rule, at least 0.
        extent: names from the list above, at least one; several as a tuple.

    Raises:
        ValueError: an option is outside its range, or a name is unknown; when called, a pixel or box is given.
        UnsupportedModelError: when called, layers that are softmax attention, or mixers of another make.

    Example:
        >>> RelevanceAttentionRanks(model).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    takes_parts: ClassVar[bool] = False  # as MambaLRP

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        power: float = 6.0,
        weight: float = 2.0,
        gamma: float = 1.0,
        extent: str | tuple[str, ...] = EXTENT,
    ) -> None:
        super().__init__(model)
        self.layout, self.orders = layout, orders
        for name, value in (("power", power), ("weight", weight), ("gamma", gamma)):
            if not value >= 0:
                raise ValueError(f"RelevanceAttentionRanks({name}={value!r}): expected a number of at least 0.")
        names = (extent,) if isinstance(extent, str) else tuple(extent)
        for name in names or ("",):
            if name not in EXTENT:
                raise ValueError(f"RelevanceAttentionRanks(extent={extent!r}): {nearest(name, EXTENT)}")
        given: dict[str, Any] = {"layout": layout, "orders": orders}
        smooth = MambaLRP(model, gamma_layers="*", gamma=gamma, **given)
        others = (ImplicitAttention(model, **given), RawAttention(model, **given))
        made = dict(zip(EXTENT, (smooth, *others), strict=True))
        self.relevance = MambaLRP(model, **given)
        self.extent = [made[name] for name in names]
        self.power = power
        self.weight = weight

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        cells = self._cells(images, target)

        def read(method: _Part) -> Tensor:
            maps = self._at_this_call(method)._finite_maps(images, target, query, size, not cells.pixels)
            return cell_means(maps, cells) if cells.pixels else maps

        relevance = read(self.relevance)
        extent = torch.stack([shares(read(method)) for method in self.extent]).sum(0)
        order = self.weight * shares(relevance) ** self.power + shares(extent)
        found = in_order(relevance.clamp(min=0), order)
        return found if grid else cells.to_pixels(found, size)

    def _cells(self, images: Tensor, target: Target) -> TokenLayout:
        """Return the first token grid; checks model and target here, so errors name this method and not its parts."""
        reached = self._call.reached(f"{self.called}.attribute", self.model)
        with torch.inference_mode(False), torch.no_grad(), self._tracing() as record:
            output = self._call.run(self.model, images.clone() if images.is_inference() else images)
        layers = require(self.called, self._part(record, reached).layers, ScanLayer)
        self._values(output, target, len(images))
        return layers[0].layout


def in_order(
    values: Float[Tensor, "batch 1 *size"], order: Float[Tensor, "batch 1 *size"]
) -> Float[Tensor, "batch 1 *size"]:
    """Return every map's own numbers, its largest where ``order`` is largest; ties from the last to the first."""
    place = order.flatten(1).argsort(dim=1, stable=True)
    ordered = values.flatten(1).sort(1).values
    return torch.zeros_like(ordered).scatter(1, place, ordered).view_as(values)
