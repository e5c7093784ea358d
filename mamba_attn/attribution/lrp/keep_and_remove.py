"""KeepAndRemoveLRP: MambaLRP, asked again about what it kept and what it removed; our own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Bool, Float
from mamba_attn.attribution.cell_filling import FILLS, CellFilling, in_turn
from mamba_attn.attribution.lrp.mamba_lrp import MambaLRP
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.core.ranks import shares
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders

_KEPT = (0.8, 0.6, 0.4, 0.2)  # of the cells, one pass each
_REMOVED = (0.08, 0.16, 0.24, 0.32)


class KeepAndRemoveLRP(CellFilling):
    """MambaLRP's relevance, corrected by what the model sees without some of the patches. New here.

    Measured under four fills of removed cells on the demo models it is no clear gain over ``MambaLRP`` and costs many
    times as much; docs/comparing.md has the table.

    Relevance is exact for the image as it is, and says nothing about what the model turns to when a part is gone,
    which is what removal asks. With R = ``MambaLRP``, on the cells of the first token grid:

    - *keep*: N = R(image); four times, the cells with the highest N (80, 60, 40, 20 %) are kept, the others filled,
      and what R gives to the kept ones is added to N.
    - *remove*: four times, the next 8 % of the cells with the highest R of what is left are filled. D orders the cells
      by when they went, and those that stay by R(image).

    The map is rank(N) + rank(D), ranks from 0 to 1. Fills take turns, so that the map does not belong to one of them:
    the darkest value of each colour in the image, its mean colour, its blur, its own cells shuffled. The cost is
    1 + 8 ``draws`` passes of MambaLRP.

    Args:
        model: as for ``MambaLRP``.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        draws: fills per step; relevances are averaged over them.
        fills: names from the list above, at least one; several as a tuple.

    Raises:
        ValueError: an option is outside its range, or a name is unknown; when called, a pixel or box, or inputs that
            are no images.
        UnsupportedModelError: as ``MambaLRP``.

    Example:
        >>> KeepAndRemoveLRP(model, draws=1).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        draws: int = 2,
        fills: str | tuple[str, ...] = FILLS,
    ) -> None:
        super().__init__(model, layout, orders, fills)
        if draws < 1:
            raise ValueError(f"KeepAndRemoveLRP(draws={draws!r}): expected at least 1.")
        self.relevance = MambaLRP(model, layout=layout, orders=orders)
        self.draws = draws

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        target = self._settled(images, target)
        relevance = self._relevance(images, target)
        cells = relevance[0].numel()
        turns = in_turn(self.fills, images, (relevance.shape[2], relevance.shape[3]))

        def again(kept: Bool[Tensor, "batch cells"]) -> Float[Tensor, "batch cells"]:
            shown = _nearest(kept.view_as(relevance), (images.shape[2], images.shape[3]))
            found = [
                self._relevance(torch.where(shown, images, next(turns)), target).flatten(1) for _ in range(self.draws)
            ]
            return torch.stack(found).mean(0).masked_fill(~kept, 0)

        first = relevance.flatten(1)
        kept_sum = first.clone()
        for part in _KEPT:
            kept_sum += again(_highest(kept_sum, round(cells * part)))
        gone = torch.zeros_like(first, dtype=torch.bool)
        left, removal = first, shares(first)
        for place, part in enumerate(_REMOVED):
            more = _highest(left.masked_fill(gone, -torch.inf), round(cells * part) - int(gone[0].sum()))
            removal = torch.where(more, 1 + len(_REMOVED) - place + shares(left), removal)
            gone |= more
            left = again(~gone)
        found = (shares(kept_sum) + shares(removal)).view_as(relevance)
        return found if grid else self._layouts(images)[0].to_pixels(found, size)

    def _relevance(self, images: Tensor, target: Target) -> Float[Tensor, "batch 1 rows columns"]:
        size = (images.shape[2], images.shape[3])
        return self._at_this_call(self.relevance)._finite_maps(images, target, None, size, True)


def _highest(values: Float[Tensor, "batch cells"], count: int) -> Bool[Tensor, "batch cells"]:
    """Return which cells are the highest; of equal ones the first."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order[:, :count], True)


def _nearest(kept: Bool[Tensor, "batch 1 rows columns"], size: tuple[int, int]) -> Bool[Tensor, "batch 1 height width"]:
    return F.interpolate(kept.float(), size=size, mode="nearest") > 0
