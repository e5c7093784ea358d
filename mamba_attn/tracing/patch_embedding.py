"""Where a patch embedding's tokens stand when the first layer gets them: what the families of plain sequences share.

Nothing is guessed from settings: class tokens and registers may stand anywhere, and some forks shuffle or flip the
tokens at random. The first layer's input is compared with the patches themselves, bit by bit; where the patches do
not stand there in raster order, the layout is not known. ``Embedding`` says it of any convolution, once gradients have
shown which token each of its patches goes to.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn._types import Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.adapters import LayoutSource, Seen
from mamba_attn.tracing.running import modules_of


def layout_sources(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[LayoutSource]:
    """Yield where the token frame of a model with ``patch_embed.proj`` and ``layers`` or ``blocks`` can be read.

    Args:
        model: a model, or one that has such models inside.
        modules: its modules, where they are known.
    """
    for module in modules_of(model).values() if modules is None else modules:
        embed = module._modules.get("patch_embed")
        if embed is None:
            continue
        layers = module._modules.get("layers", module._modules.get("blocks"))
        projection = getattr(embed, "proj", None)
        if not isinstance(projection, nn.Conv2d) or not isinstance(layers, Iterable):
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
        classes = _class_tokens(self.model.named_parameters(recurse=False))
        if others and classes not in (0, len(others)):
            return None  # class tokens and registers, and nobody says which is which
        if classes:
            return _layout(self.projection, self.grid, class_tokens=others)
        return _layout(self.projection, self.grid, registers=others)


@dataclass(frozen=True, eq=False)
class Embedding:
    """A convolution that makes patches of a finer grid.

    Args:
        leaf: added to the patches, (images, features, *grid): where their graph begins.
        given: what it was called with.
        kernel: sides of its patches.
        stride: distances between neighbouring patches.
        padded: whether it sees more than what it was given.
    """

    leaf: Tensor
    given: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padded: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], leaf: Tensor) -> "Embedding":
        """From the arguments of ``conv2d`` or ``conv3d``."""
        options: dict[str, Any] = dict(zip(("bias", "stride", "padding"), args[2:], strict=False)) | kwargs
        given, kernel = args[0].detach(), tuple(args[1].shape[2:])
        stride, padding = options.get("stride", 1), options.get("padding", 0)
        steps = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride) * (len(kernel) // len(stride))
        padded = padding == "same" or (padding != "valid" and bool(torch.as_tensor(padding).any()))
        return cls(leaf, given, kernel, steps, padded)

    def layout(
        self, order: Int[Tensor, " patches"], tokens: int, classes: Collection[int], inputs: Sequence[Tensor]
    ) -> TokenLayout | None:
        """Return the layout of tokens among which the patches stand; None where it is not known.

        Args:
            order: token of each patch.
            tokens: number of tokens.
            classes: those of them that are class tokens.
            inputs: what it was called with, one of which the convolution sees, perhaps turned on its side.
        """
        grid, kernel, stride, places = tuple(self.leaf.shape[2:]), self.kernel, self.stride, order
        turned = next((side for x in inputs if (side := _side(x, self.given)) is not None), None)
        others = tuple(sorted(set(range(tokens)) - set(order.tolist())))
        if turned is None or self.padded or int(order.min()) < 0 or len(others) + len(order) != tokens:
            return None
        if turned:
            grid, kernel, stride, places = grid[::-1], kernel[::-1], stride[::-1], order.view(grid).T.flatten()
        columns = places.view(grid).permute(*range(len(grid))[::-1]).flatten()
        ways = [bool((each.diff() > 0).all()) for each in (places, columns)]
        if not any(ways):
            return None
        named = tuple(token for token in others if token in classes)
        rest = tuple(token for token in others if token not in classes)
        return TokenLayout(grid, kernel, stride, named, rest, columns_first=not ways[0])


def _side(x: Tensor, given: Tensor) -> bool | None:
    """Whether a convolution was given an input on its side; None: something else."""
    sizes = tuple(given.shape[2:])
    straight, across = tuple(x.shape[-len(sizes) :]), tuple(x.shape[-len(sizes) :])[::-1]
    if sizes not in (straight, across) or x.numel() != given.numel():
        return None
    if len(sizes) != 2 or straight != across:
        return sizes != straight
    values, its = x.detach().flatten(), given.flatten()  # a square
    if torch.equal(values, its):
        return False
    return True if torch.equal(x.detach().mT.flatten(), its) else None


def makes_a_class_token(parameter: str) -> bool:
    """Whether a parameter's name says that it is one: "cls_token", CLIP's "class_embedding", DeiT's second of two."""
    return parameter.rpartition(".")[2].startswith(("cls_", "class_", "dist_", "distillation_"))


def _class_tokens(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    """Number of tokens that parameters of such a name hold."""
    named = [value for name, value in parameters if makes_a_class_token(name)]
    return sum(value.shape[1] for value in named if value.ndim == 3)


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
