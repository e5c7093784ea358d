"""Operations and bytes of the hidden attention of a model's layers, from shapes alone.

Two formulations are known to be exact. *Direct*: one exponential per (pair of tokens, channel, state). *Factored*:
a sequence is halved until its parts are leaves; the two halves of a part meet at the midpoint, where every token has
one factor per (channel, state), and their block is a matrix product; inside the leaves it is direct.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mamba_attn.models.ss2d import ROUTES, SS2D
from mamba_attn.models.vim import VimMixer, VisionMamba
from mamba_attn.models.vmamba import VSSM

LEAF = 8
FORMULATIONS = ("direct", "factored")
_STEP = 4  # bytes of delta, A and the matrices: float32 in every type of pass


@dataclass(frozen=True)
class Scans:
    """The selective scans of some layers that are alike.

    Args:
        layer: name of the first of these layers.
        layers: how many there are.
        routes: scans of one layer.
        length: steps of a route, which are all tokens.
        channels: of a route.
        states: per channel.
    """

    layer: str
    layers: int
    routes: int
    length: int
    channels: int
    states: int

    def __str__(self) -> str:
        return f"L {self.length}, {self.channels} channels, {self.states} states, {self.routes} routes"

    @property
    def pairs(self) -> int:
        """Entries of the lower triangle of one route, diagonal included."""
        return self.length * (self.length + 1) // 2

    @property
    def width(self) -> int:
        """Channels times states of all routes of all these layers."""
        return self.channels * self.states * self.routes * self.layers


@dataclass(frozen=True)
class Work:
    """The work of a call.

    Args:
        exponentials: to be computed.
        flops: of the sums over channels and states: two per entry of the lower triangle, channel and state.
        bytes_read: the inputs, each once.
        bytes_written: the matrices, routes merged, once.
    """

    exponentials: int
    flops: int
    bytes_read: int
    bytes_written: int

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.exponentials + other.exponentials,
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )

    @property
    def bytes(self) -> int:
        """Bytes read plus bytes written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


NOTHING = Work(0, 0, 0, 0)


def scans_of(model: nn.Module, pixels: int) -> list[Scans]:
    """Return the scans of a model of ours for square images, one entry per shape, first to last.

    Args:
        model: a VisionMamba or VSSM, on any device, "meta" included.
        pixels: side of the image.

    Raises:
        TypeError: another kind of model.
    """
    if not isinstance(model, VisionMamba | VSSM):
        raise TypeError(f"scans_of({type(model).__name__}): expected a VisionMamba or a VSSM of mamba_attn.models.")
    found: dict[tuple[int, ...], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(model, VisionMamba) and isinstance(module, VimMixer):
            channels, states = module.get_parameter("A_log").shape
            shape = (2, model.layout(pixels, pixels).tokens, channels, states)
        elif isinstance(model, VSSM) and isinstance(module, SS2D):
            rows, states = module.A_logs.shape
            stage = int(name.split(".")[1])  # layers.STAGE.blocks.BLOCK.op
            shape = (ROUTES, model.layout(pixels, pixels, stage).tokens, rows // ROUTES, states)
        else:
            continue
        found.setdefault(shape, []).append(name)
    return [Scans(names[0], len(names), *shape) for shape, names in found.items()]


def attention_work(scans: Scans, batch: int, formulation: str, itemsize: int = 4) -> Work:
    """Return the work of the hidden attention of these layers, channels folded, routes merged.

    Args:
        scans: the layers.
        batch: number of images.
        formulation: one of ``FORMULATIONS``.
        itemsize: bytes of an entry of B and C; delta, A and the matrices are float32.

    Raises:
        ValueError: an unknown formulation.
    """
    if formulation not in FORMULATIONS:
        raise ValueError(f"attention_work(formulation={formulation!r}): expected one of {FORMULATIONS}.")
    exponentials = scans.pairs if formulation == "direct" else sum(halving(scans.length))
    steps = scans.routes * scans.length * (scans.channels * _STEP + 2 * scans.states * itemsize)
    return Work(
        exponentials=batch * scans.width * exponentials,
        flops=2 * batch * scans.width * scans.pairs,
        bytes_read=scans.layers * batch * steps + _STEP * scans.width,
        bytes_written=scans.layers * batch * _STEP * scans.length**2,
    )


def total(works: Iterable[Work]) -> Work:
    """Return the sum of some works."""
    return sum(works, NOTHING)


@functools.lru_cache(maxsize=4096)
def halving(length: int, leaf: int = LEAF) -> tuple[int, int]:
    """Return the factored form's exponentials per channel and state: of the factors at all midpoints, of all leaves.

    Args:
        length: steps.
        leaf: parts up to this length are not halved.
    """
    if length <= leaf:
        return 0, length * (length + 1) // 2
    (upper, first), (lower, second) = halving(length // 2, leaf), halving(length - length // 2, leaf)
    return length + upper + lower, first + second


def on_paper(name: str, pixels: int) -> nn.Module:
    """Return a model of ours without its weights, for ``scans_of`` and for counting parameters.

    Args:
        name: see ``mamba_attn.models.create``.
        pixels: side of the image.
    """
    from mamba_attn import models

    with torch.device("meta"):
        return models.create(name, image_size=pixels)
