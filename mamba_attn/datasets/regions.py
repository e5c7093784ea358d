"""Where the truth of an image lies in the pixels that a model sees: boxes and masks, transformed like the image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mamba_attn._types import Float
from mamba_attn.models.transforms import EvaluationTransform

if TYPE_CHECKING:
    from PIL.Image import Image


def box_coverage(
    boxes: Sequence[Sequence[float]], image: tuple[int, int], transform: EvaluationTransform
) -> Float[torch.Tensor, "rows columns"]:
    """Return which part of every pixel of the transformed image lies in the boxes, in 0..1.

    Where several boxes share an edge pixel the largest part counts.

    Args:
        boxes: (x0, y0, x1, y1) each, in pixels of the image.
        image: its (rows, columns).
        transform: scale to cover, cut the centre out.
    """
    scale = max(cover / side for cover, side in zip(transform.cover, image, strict=True))
    whole = torch.zeros(transform.size)
    for x0, y0, x1, y1 in boxes:
        parts = [
            _covered(low * scale - cut, high * scale - cut, length)
            for low, high, side, length in (
                (y0, y1, image[0], transform.size[0]),
                (x0, x1, image[1], transform.size[1]),
            )
            for cut in (round((side * scale - length) / 2),)  # whole pixels, as the transform cuts
        ]
        whole = torch.maximum(whole, parts[0][:, None] * parts[1])
    return whole


def transformed_mask(mask: "Image", transform: EvaluationTransform) -> np.ndarray:
    """Return a mask as the model sees its image, (rows, columns): the value of the nearest pixel, never a mixture.

    Args:
        mask: 8-bit grey, the image's size; its values are numbers of regions.
        transform: of the model.
    """
    return replace(transform, interpolation="nearest").pixels(mask)[..., 0]


def _covered(low: float, high: float, length: int) -> torch.Tensor:
    """Which part of each of the unit intervals from 0 on lies between two numbers."""
    start = torch.arange(length, dtype=torch.float32)
    return ((start + 1).clamp(max=high) - start.clamp(min=low)).clamp(min=0)
