"""Inputs of a selective scan as a Mamba layer at initialisation has them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One selective scan: one image, one route."""

    channels: int
    states: int
    length: int

    def __str__(self) -> str:
        return f"L {self.length}, {self.channels} channels, {self.states} states"


def inputs(shape: Shape, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float32 delta, A, B, C for one image.

    delta (1, channels, length) is log-uniform per channel in 1e-3..1e-1 (Mamba's initialisation) times a log-normal
    factor per token, times ``scale``; A (channels, states) = -1..-states; B and C (1, states, length) are normal.

    Args:
        shape: of the scan.
        scale: factor of the step sizes.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([1e-3, 1e-1]).log()
    base = torch.rand(1, shape.channels, 1, generator=generator) * (high - low) + low
    token = 0.5 * torch.randn(1, shape.channels, shape.length, generator=generator)
    delta = scale * torch.exp(base + token)
    A = -torch.arange(1.0, shape.states + 1).expand(shape.channels, -1).contiguous()
    B, C = (torch.randn(1, shape.states, shape.length, generator=generator) for _ in range(2))
    return delta, A, B, C
