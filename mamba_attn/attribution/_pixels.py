"""What the methods share that make maps in pixels, of any model: what captum is asked, colours, the tokens' grid."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution._base import MapAttribution
from mamba_attn.attribution._targets import Function, Target, target_indices, target_values
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import NonFiniteError, nearest
from mamba_attn.tracing.tracer import trace

COLOURS = ("sum", "absolute")


class Asked(NamedTuple):
    """What captum's methods are given.

    Args:
        images: a copy that gradients can be taken of.
        target: in captum's words; None where there is a function.
        function: of the model's output, where the target is one; it must see exactly these images.
    """

    images: Tensor
    target: Any
    function: Function | None

    def forward(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the model, or the function after it."""
        function = self.function
        return model if function is None else lambda x: function(model(x)).reshape(-1)


class PixelAttribution(MapAttribution):
    """A method that gives every pixel a number, of any model; with ``grid=True`` the means over the tokens' cells.

    The grid is that of the first layer that ``mamba_attn.trace`` knows; without it models need not be known to it.
    """

    def _ask(self, images: Tensor, target: Target) -> Asked:
        """Fix the target at these images: the class predicted for them, not for what a method makes of them.

        Raises:
            ValueError: a target that does not fit the output.
            NonFiniteError: what is to be explained is NaN or Inf.
        """
        call = f"{type(self).__name__}.attribute"
        with torch.inference_mode(False), torch.no_grad():
            copy = images.detach().clone()
            output = self.model(copy)
            values = target_values(call, output, target, len(copy))
            if not bool(values.isfinite().all()):
                raise NonFiniteError(
                    f"{call}: what is to be explained is NaN or Inf; check the images, the weights and the precision "
                    "of the model."
                )
            copy.requires_grad_()
            if callable(target) and not isinstance(target, Tensor):
                return Asked(copy, None, target)
            indices = target_indices(call, output, target, len(copy))
            tuples = [tuple(each) for each in indices.tolist()]
            chosen: Any = indices[:, 0] if indices.shape[1] == 1 else tuples if len(tuples) > 1 else tuples[0]
        return Asked(copy, chosen, None)

    def _in_shape(self, maps: Float[Tensor, "batch 1 height width"], images: Tensor, grid: bool) -> Tensor:
        """The maps as they are, or the means over the cells of the first layer's grid."""
        return cell_means(maps, self._layouts(images)[0]) if grid else maps

    def _layouts(self, images: Tensor) -> list[TokenLayout]:
        """Where the tokens of every layer sit."""
        with torch.no_grad(), trace(self.model) as record:
            self.model(images[:1])
        return [layer.layout for layer in record.layers]


def check_colours(call: str, colours: str) -> None:
    """Refuse an unknown way to reduce colours.

    Raises:
        ValueError: see above.
    """
    if colours not in COLOURS:
        raise ValueError(f"{call}(colours={colours!r}): no such reduction. {nearest(colours, COLOURS)}")


def over_colours(
    attributions: Float[Tensor, "batch colours height width"], colours: str
) -> Float[Tensor, "batch 1 height width"]:
    """The sum of the colours' signed numbers, or of their absolute values."""
    values = attributions.detach().abs() if colours == "absolute" else attributions.detach()
    return values.sum(1, keepdim=True)


def cell_means(
    maps: Float[Tensor, "batch 1 rows columns"], layout: TokenLayout
) -> Float[Tensor, "batch 1 height width"]:
    """The mean over every token's cell: the pixels that are nearer to its centre than to any other's."""
    vertical, horizontal = (
        _means(pixels, count, layout).to(maps) for pixels, count in zip(maps.shape[2:], layout.grid, strict=True)
    )
    return vertical @ maps @ horizontal.mT


def _means(pixels: int, count: int, layout: TokenLayout) -> Float[Tensor, "count pixels"]:
    position = (torch.arange(pixels, dtype=torch.float64) + 0.5 - layout.centre) / layout.step
    owner = (position + 0.5).floor().clamp(0, count - 1)
    inside = (owner == torch.arange(count)[:, None]).double()
    return inside / inside.sum(1, keepdim=True).clamp(min=1)
