"""Evaluation transforms: preprocessing as in the measurement of a model's accuracy."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mamba_attn import images
from mamba_attn._types import Float

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class EvaluationTransform:
    """Scale, crop the centre, normalise with ImageNet's mean and standard deviation.

    Args:
        size: (rows, columns) of the model's input in pixels.
        cover: (rows, columns) that the scaled image just covers before the centre is cut out; for square sizes: the
            length of its shorter side.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    size: tuple[int, int]
    cover: tuple[int, int]
    interpolation: str = "bicubic"

    def __call__(self, image: "Image | str | Path") -> Float[Tensor, "3 rows columns"]:
        """Return the model's input, without the batch axis.

        Args:
            image: a Pillow image, or the path of a file (see ``mamba_attn.images.read``).

        Raises:
            ImageError: a file that cannot be used.
            ImportError: Pillow is not installed.
        """
        return images.normalise(self.pixels(image)[None])[0]

    def pixels(self, image: "Image | str | Path") -> np.ndarray:
        """Return what the model sees before normalisation: (rows, columns, 3) uint8."""
        picture = images.read(image) if isinstance(image, str | Path) else image
        return images.crop(picture, self.size, cover=self.cover, interpolation=self.interpolation)
