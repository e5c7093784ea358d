"""MaskRefinement: relevance refined as a mask, by what the model answers to its highest cells alone; our own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.cell_filling import FILLS, CellFilling, in_turn
from mamba_attn.attribution.lrp.frozen_contribution import FrozenContribution
from mamba_attn.attribution.lrp.mamba_lrp import MambaLRP
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.partial_images import in_single
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.vit.attn_lrp import AttnLRP
from mamba_attn.core.ranks import shares
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_kinds import SCANS, SOFTMAX, layer_kinds

STARTS = ("relevance", "none")
_SOFTNESS = 0.06  # of a mask's edge, in ranks
_RATE = 0.05  # of Adam
_INNER = 0.07  # fractions are drawn between this and 1 less this
_TOGETHER = 24  # images per pass
_SURE = 1e-4  # a chance is taken for no closer to 1


class MaskRefinement(CellFilling):
    """Relevance, refined as a mask: which cells alone keep the class, and which take it away. New here.

    Relevance is exact for the image as it is; removal asks what the model does with parts of it. So the order of the
    cells is descended from there. z begins as the ranks, 0 to 1, of ``MambaLRP`` (of ``AttnLRP`` for softmax attention,
    of ``FrozenContribution`` where a model has both), on the cells of the first token grid. In each step of Adam, for
    several fractions q that are drawn evenly from 0.07 to 0.93,

        m = sigmoid((z - quantile(z, q)) / 0.06)
        loss = -log p(m image + (1 - m) fill) - log(1 - p((1 - m) image + m fill))

    with p the softmax of the target's class: the highest cells alone should keep it, and all but them lose it. (Of a
    model that returns one number per image, and of a function as the target, v(removed) - v(kept), v the value.) The
    map is the mean of z over the second half of the steps, less 1/2. Fills take turns, so that the map does not belong
    to one of them: the darkest value of each colour in the image, its mean colour, its blur, its own cells shuffled.

    Masks that are learnt are known from Fong & Vedaldi, "Interpretable Explanations of Black Boxes by Meaningful
    Perturbation" (ICCV 2017) and Khorram et al., "iGOS++" (CHIL 2021); what is new is where they begin, and that one z
    holds the masks of all fractions. Values are ranks, comparable within a map, without scale. The cost is
    2 ``steps`` ``fractions`` passes forward and backward.

    Args:
        model: with layers that ``MambaLRP``, ``AttnLRP`` or ``FrozenContribution`` explains; of others,
            ``start="none"`` needs their token grid alone.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        steps: of the descent; with 0 the map is the ranks of the relevance.
        fractions: per step.
        fills: names from "dark", "mean", "blur", "shuffle", at least one; several as a tuple.
        start: "relevance", or "none": all cells begin equal, but for noise of 0.01 that is drawn once.

    Raises:
        ValueError: an option is outside its range, or a name is unknown; when called, a pixel or box, or inputs that
            are no images.
        UnsupportedModelError: as the method of the relevance.

    Example:
        >>> MaskRefinement(model, steps=2).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        steps: int = 24,
        fractions: int = 3,
        fills: str | tuple[str, ...] = FILLS,
        start: str = "relevance",
    ) -> None:
        super().__init__(model, layout, orders, fills)
        for name, value, least in (("steps", steps, 0), ("fractions", fractions, 1)):
            if value < least:
                raise ValueError(f"MaskRefinement({name}={value!r}): expected at least {least}.")
        if start not in STARTS:
            raise ValueError(f"MaskRefinement(start={start!r}): expected one of {STARTS}.")
        self.steps, self.fractions, self.start = steps, fractions, start

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        target = self._settled(images, target)
        layout = self._layouts(images)[0]
        begun = self._begun(images, target, layout.grid)
        found = (self._refined(images, target, begun) if self.steps else begun) - 0.5
        return found if grid else layout.to_pixels(found, size)

    def _begun(self, images: Tensor, target: Target, grid: tuple[int, ...]) -> Float[Tensor, "batch 1 rows columns"]:
        if self.start == "none":
            noise = in_single(torch.rand(grid, generator=torch.Generator().manual_seed(0)).to(images))
            return (0.5 + 0.01 * noise).expand(len(images), 1, *grid)
        size = (images.shape[2], images.shape[3])
        relevance = self._at_this_call(self._relevance(images))._finite_maps(images, target, None, size, True)
        return shares(relevance)

    def _relevance(self, images: Tensor) -> MapAttribution:
        """The method that the descent begins with, by the kinds of the model's layers."""
        shown = images if self._call.has_others else images[:1]
        kinds = layer_kinds(
            self.model, lambda: self._call.run(self.model, shown), layout=self.layout, orders=self.orders
        ).values()
        fitting = {frozenset((SCANS,)): MambaLRP, frozenset((SOFTMAX,)): AttnLRP}
        method: Any = fitting.get(frozenset(kinds), FrozenContribution)
        relevance: MapAttribution = method(self.model, layout=self.layout, orders=self.orders)
        relevance.called = self.called
        return relevance

    def _refined(
        self, images: Tensor, target: Target, begun: Float[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch 1 rows columns"]:
        draw = torch.Generator().manual_seed(0)
        turns = in_turn(self.fills, images, (begun.shape[2], begun.shape[3]))
        with torch.inference_mode(False), torch.enable_grad():
            pixels = images.detach().clone()
            z = begun.detach().clone().requires_grad_()
            descent = torch.optim.Adam([z], lr=_RATE, betas=(0.9, 0.99))
            total = torch.zeros_like(begun)
            for step in range(self.steps):
                place = (torch.arange(self.fractions) + torch.rand(self.fractions, generator=draw)) / self.fractions
                parts = (_INNER + (1 - 2 * _INNER) * place).to(z)
                edges = torch.quantile(z.detach().flatten(1), parts, dim=1)
                fill = next(turns)
                z.grad = torch.zeros_like(z)
                for some in edges.split(max(1, _TOGETHER // (2 * len(images)))):
                    loss = self._loss(pixels, target, z, some, fill)
                    z.grad += torch.autograd.grad(loss / self.fractions, z)[0]
                descent.step()
                if 2 * step >= self.steps - 1:
                    total += z.detach()
        return total / (self.steps // 2 + self.steps % 2)

    def _loss(
        self,
        images: Tensor,
        target: Target,
        z: Float[Tensor, "batch 1 rows columns"],
        edges: Float[Tensor, "fractions batch"],
        fill: Tensor,
    ) -> Float[Tensor, ""]:
        """Summed over images, so that each has the same gradient in any batch."""
        soft = torch.sigmoid((z - edges[..., None, None, None]) / _SOFTNESS)
        mask = F.interpolate(soft.flatten(0, 1), size=images.shape[2:], mode="nearest").unflatten(0, soft.shape[:2])
        mask = mask.to(images.dtype)
        kept, gone = mask * images + (1 - mask) * fill, (1 - mask) * images + mask * fill
        keeps, loses = self._read(torch.cat([kept, gone]), target, self._chances).chunk(2, dim=1)
        return -keeps[0].sum() - loses[1].sum()

    def _chances(self, output: Any, target: Target, batch: int) -> Float[Tensor, "2 values"]:
        """Return the log of the target's probability, and of what is left to 1; of values without classes v and -v."""
        chance = self._log_chance(output, target, batch)
        if chance is not None:
            return torch.stack([chance, torch.log1p(-chance.exp().clamp(max=1 - _SURE))])
        values = in_single(self._values(output, target, batch)).view(-1)
        return torch.stack([values, -values])
