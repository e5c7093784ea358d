"""iGOS++: masks of what to delete and of what to insert, learnt along paths from the blurred image."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.grids import cell_means
from mamba_attn.attribution.partial_images import PartialImages, drawn_for, in_single
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.core.blur import blurred
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders

_NOISE = 0.2  # deviation, of normalised images
_ENOUGH = 1e-4  # share of the gradient's promise that a step has to keep
_SHORTER = 0.2  # from one length that is tried to the next
_SHORTEST = 1e-5  # is taken whatever it does
_EDGE = 0.01  # squared difference of colours across which a mask may change
_TOGETHER = 24  # images per pass


class Step(NamedTuple):
    """What one step of the descent looks at.

    Attributes:
        images: as the model takes them.
        blur: the blurred ones.
        noise: (path, batch, ...), added to what lies on the paths.
        target: of the images.
    """

    images: Tensor
    blur: Tensor
    noise: Tensor
    target: Target


class IGOSPlusPlus(PartialImages):
    """iGOS++: masks of what to delete and of what to insert, learnt along paths from the blurred image.

    Khorram, Lawson & Fuxin, "iGOS++: Integrated Gradient Optimized Saliency by Bilateral Perturbations" (CHIL 2021,
    arXiv 2012.15783). With x the image, b the blurred one, and p the softmax of the target's class,

        deleted(M)  = mean over k = 1 .. path of p(k/path M x + (1 - k/path M) b + noise)
        inserted(M) = mean over k = 1 .. path of p(k/path M b + (1 - k/path M) x + noise)
        loss = (deleted(D) - inserted(I) + deleted(D I) - inserted(D I)) / 2 + sparsity mean|1 - D I| + smoothness BTV

    is descended from masks D and I of 1, which become 0 where the class is. A line search finds the length of each
    step, from ``rate`` down by factors of 5, until the loss falls by 1e-4 of what the gradient promises. BTV is the
    mean squared difference of neighbouring cells of D I, and of neighbouring pixels where the image has no edge. (Of a
    model that returns one number per image, and of a function as the target, p is the value.) The map is 1 - D I,
    between 0 and 1.

    The noise has a deviation of 0.2, made for images whose colours are normalised. Unlike the published code, a search
    descends on the loss above, not on twice its first term, and begins one factor above the last length; a step's
    noise is drawn once, by the image's own content; the blur is our own, with a deviation of a sixteenth of the
    image's side. The cost is 4 ``steps`` ``path`` passes forward and backward, 1,200 by default, and 4 ``path`` forward
    for every length that is tried.

    Args:
        model: any; with ``grid=True``, one that ``mamba_attn.trace`` supports, whose first layer gives the grid.
        layout: as in ``mamba_attn.trace``; for ``grid=True``.
        orders: as in ``mamba_attn.trace``; for ``grid=True``.
        steps: of the descent.
        path: images on each path.
        cells: of the masks along the image's shorter side.
        sparsity: weight of what the masks take away.
        smoothness: weight of the masks' differences.
        rate: longest step that is tried.

    Raises:
        ValueError: an option is outside its range; when called, a pixel or box, or inputs that are no images.

    Example:
        >>> IGOSPlusPlus(model, steps=1, path=2).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        steps: int = 15,
        path: int = 20,
        cells: int = 28,
        sparsity: float = 1.0,
        smoothness: float = 20.0,
        rate: float = 1000.0,
    ) -> None:
        super().__init__(model)
        for name, value, least in (("steps", steps, 1), ("path", path, 1), ("cells", cells, 2)):
            if value < least:
                raise ValueError(f"IGOSPlusPlus({name}={value!r}): expected at least {least}.")
        for name, amount in (("sparsity", sparsity), ("smoothness", smoothness), ("rate", rate)):
            if not 0 <= amount < float("inf"):
                raise ValueError(f"IGOSPlusPlus({name}={amount!r}): expected a number from 0 on.")
        self.layout, self.orders = layout, orders
        self.steps, self.path, self.cells = steps, path, cells
        self.sparsity, self.smoothness, self.rate = sparsity, smoothness, rate

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        target = self._settled(images, target)
        with torch.inference_mode(False), torch.enable_grad():
            kept = self._descended(images.detach().clone(), target)
        maps = 1 - _enlarged(kept, images)
        return cell_means(maps, self._layouts(images)[0]) if grid else maps

    def _descended(
        self, images: Float[Tensor, "batch colours height width"], target: Target
    ) -> Float[Tensor, "batch 1 rows columns"]:
        blur, drawn, shorter = blurred(images), drawn_for(images), min(images.shape[2:])
        rows, columns = (round(self.cells * side / shorter) for side in images.shape[2:])
        masks = in_single(images).new_ones(2, len(images), 1, rows, columns)  # to delete, to insert
        lengths = torch.full((len(images),), self.rate).to(masks)
        for _ in range(self.steps):
            noise = torch.stack([_noise(self.path, images, each) for each in drawn], dim=1)
            step = Step(images, blur, noise, target)
            loss, gradient = self._loss(masks, step, differentiate=True)
            lengths = (lengths / _SHORTER).clamp(max=self.rate)  # one above what was right before
            masks, lengths = self._searched(masks, loss, gradient, lengths, step)
        return masks.prod(0)

    def _searched(
        self,
        masks: Float[Tensor, "2 batch 1 rows columns"],
        loss: Float[Tensor, " batch"],
        gradient: Float[Tensor, "2 batch 1 rows columns"],
        lengths: Float[Tensor, " batch"],
        step: Step,
    ) -> tuple[Float[Tensor, "2 batch 1 rows columns"], Float[Tensor, " batch"]]:
        """Return the masks after the longest step that lowers an image's loss enough, and its length."""
        steep = (gradient**2).sum((0, 2, 3, 4))
        while True:
            moved = (masks - lengths.view(-1, 1, 1, 1) * gradient).clamp(0, 1)
            enough = self._loss(moved, step)[0] <= loss - _ENOUGH * lengths * steep
            shorter = ~enough & (lengths >= _SHORTEST)
            if not bool(shorter.any()):
                return moved, lengths
            lengths = torch.where(shorter, _SHORTER * lengths, lengths)

    def _loss(
        self, masks: Float[Tensor, "2 batch 1 rows columns"], step: Step, differentiate: bool = False
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "2 batch 1 rows columns"]]:
        """Return each image's loss and, if that is asked for, its gradient."""
        images, blur = step.images, step.blur
        with torch.set_grad_enabled(differentiate):
            masks = masks.detach().requires_grad_(differentiate)
            together = masks.prod(0)
            loss = self.sparsity * (1 - together).abs().mean((1, 2, 3)) + self.smoothness * _roughness(together, images)
            total = torch.autograd.grad(loss.sum(), masks)[0] if differentiate else torch.zeros_like(masks)
            loss = loss.detach()
            sides = ((images, blur, 0.5), (blur, images, -0.5))  # deleted, inserted
            for which, (kept, filled, sign) in zip((0, 1, 2, 2), (*sides, *sides), strict=True):
                for some in torch.arange(self.path).split(max(1, _TOGETHER // len(images))):
                    mask = _enlarged(masks.prod(0) if which == 2 else masks[which], images)
                    parts = (((some.to(mask) + 1) / self.path).view(-1, 1, 1, 1, 1) * mask).to(images)
                    copies = parts * kept + (1 - parts) * filled + step.noise[some]
                    values = self._read(copies, step.target, self._chances).view(len(some), -1)
                    part = sign / self.path * values.sum(0)
                    loss = loss + part.detach()
                    if differentiate:
                        total = total + torch.autograd.grad(part.sum(), masks)[0]
        return loss, total

    def _chances(self, output: object, target: Target, batch: int) -> Float[Tensor, "1 values"]:
        chance = self._log_chance(output, target, batch)
        return (in_single(self._values(output, target, batch)).view(-1) if chance is None else chance.exp())[None]


def _noise(count: int, images: Tensor, drawn: torch.Generator) -> Float[Tensor, "count colours height width"]:
    return _NOISE * torch.randn((count, *images.shape[1:]), generator=drawn).to(images)


def _enlarged(masks: Float[Tensor, "batch 1 rows columns"], images: Tensor) -> Float[Tensor, "batch 1 height width"]:
    return F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)


def _roughness(masks: Float[Tensor, "batch 1 rows columns"], images: Tensor) -> Float[Tensor, " batch"]:
    """Half of the mean squared differences of cells, and of pixels where the image has no edge, along both sides."""
    found = masks.new_zeros(len(masks))
    for side in (2, 3):
        edges = torch.exp(-(in_single(images).diff(dim=side) ** 2) / _EDGE).mean(1, keepdim=True)
        pixels = edges * _enlarged(masks, images).diff(dim=side) ** 2
        found = found + 0.5 * (masks.diff(dim=side) ** 2).mean((1, 2, 3)) + 0.5 * pixels.mean((1, 2, 3))
    return found
