"""Images blurred by a Gaussian."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn._types import Float

_PART = 16  # 14 pixels of 224: objects keep a place and a colour, and lose their shape


def blurred(images: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """Return images blurred by a Gaussian whose deviation is a sixteenth of the shorter side.

    Weights are divided by their sum inside the image, so edges do not darken.

    Args:
        images: any number of leading axes.
    """
    sigma = min(images.shape[-2:]) / _PART
    reach = math.ceil(3 * sigma)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64, device=images.device)
    weights = torch.exp(-0.5 * (places / sigma) ** 2).to(images.dtype)
    values = images.reshape(-1, 1, *images.shape[-2:])
    ones = torch.ones_like(values[:1])
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        values, ones = (F.conv2d(x, weights.view(shape), padding="same") for x in (values, ones))
    return (values / ones).view_as(images)
