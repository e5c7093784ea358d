"""Small models whose mixers stand in flips, maps and lines of tokens: what is looked at ahead of a pass."""

from typing import Any

import torch
from torch import nn

import mamba_attn
from tests.integrations.small_vim import Block, Mamba
from tests.tracing.foreign import selective_scan_fn


class Compiled(Mamba):
    """Its scan goes through a compiled extension's stand-in."""

    def scanned(self, u: torch.Tensor, projected: torch.Tensor, suffix: str, A: torch.Tensor) -> torch.Tensor:
        low, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], -1)
        delta, D = nn.functional.linear(low, self.dt_proj.weight), self.D
        given = (u.mT, delta.mT, -torch.exp(A), B.mT.contiguous(), C.mT.contiguous(), D, None, self.dt_proj.bias)
        y: torch.Tensor = selective_scan_fn(*given, delta_softplus=True).mT
        return y


class BothWays(nn.Module):
    """As SEMamba's: one mixer gets the tokens as they are, the other backwards, by flips around it."""

    def __init__(self, forward: nn.Module, backward: nn.Module) -> None:
        super().__init__()
        self.forward_block, self.backward_block = Block(8, forward), Block(8, backward)
        self.join = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        there, first = self.forward_block(x)
        back, second = self.backward_block(x.flip(1))
        return self.join(torch.cat([there + first, (back + second).flip(1)], -1)) + x


class Lines(nn.Module):
    """Mixers over the rows of a map: many sequences of one image."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.permute(0, 2, 3, 1).flatten(0, 1)
        out: torch.Tensor = self.inner(rows).unflatten(0, (x.shape[0], x.shape[2])).permute(0, 3, 1, 2)
        return out


class Flat(nn.Module):
    """As U-Mamba's: the map's pixels one after the other."""

    def __init__(self, mixer: nn.Module, channels: bool = False) -> None:
        super().__init__()
        self.mixer, self.channels = mixer, channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2) if self.channels else x.flatten(2).mT
        mixed = self.mixer(tokens)
        out: torch.Tensor = x + (mixed if self.channels else mixed.mT).reshape(x.shape)
        return out


class Groups(nn.Module):
    """One module on the first half of the channels, and on the second."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(part) for part in x.chunk(2, 1)], 1)


def run(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


def compiled() -> nn.Module:
    return Compiled(8)
