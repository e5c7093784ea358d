"""Where a patch embedding's tokens stand when the first layer gets them: what the families of plain sequences share.

Nothing is guessed from settings: class tokens and registers may stand anywhere, and some forks shuffle or flip the
tokens at random. The first layer's input is compared with the patches themselves, bit by bit; where the patches do
not stand there in raster order, the layout is not known.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.adapters import LayoutSource, Seen


def layout_sources(model: nn.Module) -> Iterator[LayoutSource]:
    """Yield where the token frame of a model with ``patch_embed.proj`` and ``layers`` or ``blocks`` can be read.

    Args:
        model: a model, or one that has such models inside.
    """
    for module in model.modules():
        embed = module._modules.get("patch_embed")
        layers = module._modules.get("layers", module._modules.get("blocks"))
        projection = getattr(embed, "proj", None)
        if embed is None or not isinstance(projection, nn.Conv2d) or not isinstance(layers, Iterable):
            continue
        first = next(iter(layers), None)
        if hasattr(module, "class_token"):  # our own models say it
            yield LayoutSource(projection, partial(_as_said, module, projection))
        elif isinstance(first, nn.Module):
            reader = _Reader(module, projection)
            yield LayoutSource(projection, reader.see_grid)
            yield LayoutSource(embed, reader.see_patches)
            yield LayoutSource(first, reader.find, before=True)


def _as_said(
    model: nn.Module, projection: nn.Conv2d, seen: Seen, inputs: tuple[Any, ...], output: Tensor
) -> TokenLayout | None:
    height, width = output.shape[-2:]
    positions = {"middle": (height * width // 2,), "first": (0,)}.get(str(model.class_token), ())
    return _layout(projection, (height, width), class_tokens=positions)


class _Reader:
    """Keeps the patches of one forward pass until the first layer starts."""

    def __init__(self, model: nn.Module, projection: nn.Conv2d) -> None:
        self.model = model
        self.projection = projection
        self.grid = (0, 0)
        self.patches: Tensor | None = None

    def see_grid(self, seen: Seen, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the grid; the patches, too, where nothing follows the convolution."""
        self.grid = (output.shape[-2], output.shape[-1])
        self.patches = output.detach().flatten(2).mT

    def see_patches(self, seen: Seen, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the patches after the norm of an embedding that has one."""
        if isinstance(output, Tensor) and output.ndim == 3:
            self.patches = output.detach()

    def find(self, seen: Seen, inputs: tuple[Any, ...], output: None) -> TokenLayout | None:
        """Return the layout, from the first layer's input."""
        patches, self.patches = self.patches, None
        if patches is None:  # the first layer runs again
            return seen.layout
        tokens = inputs[0] if inputs else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or patches.shape[1] != self.grid[0] * self.grid[1]:
            return None
        position = getattr(self.model, "pos_embed", None)
        found = _tokens_of_patches(
            tokens.detach(), patches, position.detach() if isinstance(position, Tensor) else None
        )
        if found is None:
            return None
        others = tuple(sorted(set(range(tokens.shape[1])) - set(found)))
        classes = sum(
            value.shape[1] for name, value in self.model.named_parameters(recurse=False) if name.startswith("cls_token")
        )
        if others and classes not in (0, len(others)):
            return None  # class tokens and registers, and nobody says which is which
        if classes:
            return _layout(self.projection, self.grid, class_tokens=others)
        return _layout(self.projection, self.grid, registers=others)


def _layout(
    projection: nn.Conv2d, grid: tuple[int, int], class_tokens: tuple[int, ...] = (), registers: tuple[int, ...] = ()
) -> TokenLayout | None:
    kernel, stride = projection.kernel_size, projection.stride
    if kernel[0] != kernel[1] or stride[0] != stride[1]:
        return None  # patches that are not square
    return TokenLayout(grid, kernel[0], stride[0], class_tokens, registers)


def _tokens_of_patches(
    tokens: Float[Tensor, "batch tokens features"],
    patches: Float[Tensor, "images patches width"],
    position: Tensor | None,
) -> list[int] | None:
    """The token that holds each patch, when there is exactly one way to find all patches in raster order.

    Position embeddings may have been added to the patches, or to all tokens after others were inserted.
    """
    count, extra = patches.shape[1], tokens.shape[1] - patches.shape[1]
    if extra < 0 or tokens.shape[0] != patches.shape[0] or tokens.shape[2] != patches.shape[2]:
        return None
    if position is not None and (
        position.ndim != 3 or position.shape[1] not in (count, count + extra) or position.shape[2] != tokens.shape[2]
    ):
        return None
    fits = []  # by the number of other tokens before a patch
    for before in range(extra + 1):
        here = slice(before, before + count)
        added = position if position is None or position.shape[1] == count else position[:, here]
        expected = patches if added is None else patches + added
        fits.append((tokens[:, here] == expected).all(-1).all(0))
    matrix = torch.stack(fits).tolist()  # one wait for the device
    earliest = _offsets(matrix, range(count), range(extra + 1))
    latest = _offsets(matrix, range(count - 1, -1, -1), range(extra, -1, -1))
    if earliest is None or latest is None or earliest != latest[::-1]:
        return None
    return [patch + offset for patch, offset in enumerate(earliest)]


def _offsets(fits: list[list[bool]], patches: range, offsets: range) -> list[int] | None:
    """The first offset that fits each patch, none before that of the patch before; None when there is none."""
    chosen, remaining = [], iter(offsets)
    offset = next(remaining)
    for patch in patches:
        while not fits[offset][patch]:
            following = next(remaining, None)
            if following is None:
                return None
            offset = following
        chosen.append(offset)
    return chosen
