"""Controls: maps that ignore the model. A score that they reach as well is worth nothing."""

import functools
import zlib

import torch
from torch import Tensor, nn

from mamba_attn._types import Float, Num
from mamba_attn.attribution.grids import cell_means
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.tracing.texts import is_text


class _Control(MapAttribution):
    """A map of the image's size or content alone; a target, if given, is still checked."""

    def _draw(self, image: Num[Tensor, "colours *size"]) -> Float[Tensor, "*size"]:
        raise NotImplementedError

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        if target is not None:
            self._output(images, target)
        text = is_text(images)
        drawn = [self._draw(image) for image in (images.unsqueeze(1) if text else images)]
        maps = torch.stack(drawn).unsqueeze(1).to(images.device)
        return cell_means(maps, self._layouts(images)[0]) if grid and not text else maps


class RandomMap(_Control):
    """Independent uniform numbers in 0..1, one per pixel; the same for the same image, wherever it is in a batch.

    Args:
        model: any; the map does not depend on it.
        seed: changes the numbers.

    Example:
        >>> RandomMap(model).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__(model)
        self.seed = seed

    def _draw(self, image: Num[Tensor, "colours *size"]) -> Float[Tensor, "*size"]:
        content = zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes(), self.seed)
        return torch.rand(image.shape[1:], generator=torch.Generator().manual_seed(content))


class CentreMap(_Control):
    """A Gaussian about the centre of the image, or of the line of a text, its deviation a quarter of each side.

    Args:
        model: any; the map does not depend on it.

    Example:
        >>> CentreMap(model).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    def _draw(self, image: Num[Tensor, "colours *size"]) -> Float[Tensor, "*size"]:
        sides = (
            torch.exp(-0.5 * ((torch.arange(side) + 0.5 - side / 2) / (side / 4)) ** 2) for side in image.shape[1:]
        )
        return functools.reduce(lambda found, side: found[..., None] * side, sides)
