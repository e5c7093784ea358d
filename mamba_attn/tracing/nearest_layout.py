"""The layout of tokens that is read from the sizes of feature maps: that of the nearest one with as many cells."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import prod

from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.adapters import Seen
from mamba_attn.tracing.replay import Replay

Maps = Mapping[str, Sequence[tuple[int, ...]]]
_OBLONG = 1.5  # sides of a cell


def nearest_layout(
    module: str, tokens: int, maps: Maps, replay: Replay | None, seen: Seen, own: tuple[int, ...] = ()
) -> TokenLayout | None:
    """Return the layout of a mixer's tokens: of the nearest feature map with as many cells, in the module or around it.

    Args:
        module: the mixer's name.
        tokens: number of tokens.
        maps: shapes that the modules took and returned.
        replay: how the model was called, whose sizes say how large a cell is.
        seen: what the forward pass has shown of the image.
        own: a grid that is looked at first.
    """
    grids, inputs = [own], [] if replay is None else [tuple(tensor.shape) for tensor in replay.tensors]
    for shape in chain(*_nearest_first(module, maps)):
        # features stand first or last; of what the model was given, three colours and rows are no grid
        both = (shape[2:],) if shape in inputs else (shape[2:], shape[1:-1])
        grids += [grid for grid in both if min(grid) > 1 or len(grid) > 2]
    given = [_sizes(shape, maps) for shape in inputs if len(shape) > 2]
    fitting = [grid for grid in grids if len(grid) > 1 and prod(grid) == tokens]
    whole = seen.image_size or next((size for size in given if len(size) == 2), None)
    # channels and rows of another map may have as many cells, but hardly cells that are squares
    grid = next((grid for grid in fitting if grid == own or _has_squares(grid, whole)), (*fitting, (tokens,))[0])
    if len(grid) == 2 and seen.image_size is not None:
        layout = seen.grid_layout(*grid)
        turned = replay is not None and _is_turned(replay, seen.image_size)
        return _on_its_side(layout) if turned else layout
    if len(grid) == 1 and (seen.image_size is not None or any(len(size) > 1 for size in given)):
        return None  # a line in what is no line
    sizes = next((size for size in given if len(size) == len(grid)), grid)
    patches = tuple(max(1, round(size / count)) for size, count in zip(sizes, grid, strict=True))
    if len(grid) == 1 and not sizes[0] // patches[0] <= tokens <= -(-sizes[0] // patches[0]):
        return None  # what was taken for a line's length is something else
    return TokenLayout(grid, patches)


def _has_squares(grid: tuple[int, ...], size: tuple[int, ...] | None) -> bool:
    """Whether the cells of a grid over an image are about as high as wide; of volumes nobody knows."""
    if size is None or len(grid) != 2 or len(size) != 2:
        return True
    height, width = (pixels / cells for pixels, cells in zip(size, grid, strict=True))
    return max(height, width) < _OBLONG * min(height, width)


def _sizes(shape: tuple[int, ...], maps: Maps) -> tuple[int, ...]:
    """Sizes of an input without images and colours: colours stand third where frames are taken as so many images."""
    frames, colours = shape[1:3]
    images = [each for shapes in maps.values() for each in shapes if len(each) == len(shape) - 1]
    as_images = len(shape) == 5 and any(e[0] % frames == 0 and e[1:] == (colours, *shape[3:]) for e in images)
    return (frames, *shape[3:]) if as_images else shape[2:]


def _is_turned(replay: Replay, size: tuple[int, ...]) -> bool:
    """Whether the model turned its input on its side, so that a map of it would lie across the input."""
    given = [tuple(tensor.shape[-len(size) :]) for tensor in replay.tensors]
    return size not in given and size[::-1] in given


def _on_its_side(layout: TokenLayout) -> TokenLayout:
    """The layout over the input of a grid whose model turned its input: the grid's rows are the input's columns."""
    return replace(layout, grid=layout.grid[::-1], patch_size=layout.patch_sizes[::-1], columns_first=True)


def _nearest_first(module: str, maps: Maps) -> Iterator[Sequence[tuple[int, ...]]]:
    """Shapes that were seen in the module itself, below it, and so on with what stands around it."""
    around = [module, *(module[:end] for end in range(len(module) - 1, 0, -1) if module[end] == "."), ""]
    for outer in dict.fromkeys(around):
        inside = [(name, shapes) for name, shapes in maps.items() if not outer or f"{name}.".startswith(f"{outer}.")]
        yield from (shapes for _, shapes in sorted(inside, key=lambda item: len(item[0])))
