"""Where tokens sit in the image: the patch grid, and the tokens that are not patches."""

import math
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from mamba_attn._types import Float, Int


@dataclass(frozen=True)
class TokenLayout:
    """The token frame of one layer.

    Patches are numbered in raster order over the token indices that class tokens and registers leave free.

    Args:
        grid: (height, width) of the patch grid.
        patch_size: side of a patch, in pixels.
        stride: distance between neighbouring patches, in pixels; less than ``patch_size`` when patches overlap.
            Default: ``patch_size``.
        class_tokens: token indices of class tokens.
        registers: token indices of registers.
        offset: centre of the first patch, in pixels from the image's edge. Default: ``patch_size / 2``. Stems of padded
            convolutions see around a pixel, not a patch: theirs is 0.5.

    Raises:
        ValueError: an index outside the token frame, an index used twice, or a size below one.

    Example:
        >>> TokenLayout(grid=(14, 14), patch_size=16, class_tokens=(98,)).tokens
        197
    """

    grid: tuple[int, int]
    patch_size: int = 1
    stride: int | None = None
    class_tokens: tuple[int, ...] = ()
    registers: tuple[int, ...] = ()
    offset: float | None = None
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        height, width = self.grid
        if min(height, width, self.patch_size, self.step) < 1:
            raise ValueError(
                f"TokenLayout(grid={self.grid}, patch_size={self.patch_size}, stride={self.stride}): "
                "grid, patch_size and stride must be at least 1."
            )
        extra = self.class_tokens + self.registers
        object.__setattr__(self, "tokens", height * width + len(extra))
        if len(set(extra)) != len(extra) or any(not 0 <= index < self.tokens for index in extra):
            raise ValueError(
                f"TokenLayout: class_tokens={self.class_tokens} and registers={self.registers} must be distinct "
                f"token indices in 0..{self.tokens - 1} of a {height}x{width} grid with {len(extra)} extra tokens."
            )

    @property
    def patches(self) -> Int[Tensor, " patches"]:
        """Token index of every patch, in raster order."""
        free = torch.ones(self.tokens, dtype=torch.bool)
        free[list(self.class_tokens + self.registers)] = False
        return free.nonzero().squeeze(1)

    @property
    def step(self) -> int:
        """Distance between neighbouring patches in pixels: ``stride``, or ``patch_size`` when none was given."""
        return self.patch_size if self.stride is None else self.stride

    @property
    def centre(self) -> float:
        """Centre of the first patch in pixels: ``offset``, or half a patch when none was given."""
        return self.patch_size / 2 if self.offset is None else self.offset

    def to_grid(self, values: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch height width"]:
        """Drop the tokens that are not patches and lay the rest on the grid.

        Args:
            values: one number per token.

        Raises:
            ValueError: ``values`` has another number of tokens.
        """
        if values.shape[-1] != self.tokens:
            raise ValueError(
                f"to_grid(values{tuple(values.shape)}): expected {self.tokens} tokens in the last axis "
                f"(grid {self.grid[0]}x{self.grid[1]} and {self.tokens - self.grid[0] * self.grid[1]} other tokens)."
            )
        patches = values.index_select(-1, self.patches.to(values.device))
        return rearrange(patches, "... (height width) -> ... height width", height=self.grid[0])

    def to_pixels(
        self, values: Float[Tensor, "*batch height width"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "*batch rows columns"]:
        """Interpolate a map on the grid linearly between patch centres, constant outside them.

        With stride == patch_size this equals ``F.interpolate(mode="bilinear", align_corners=False)``; overlapping
        patches keep their true centres, ``index * stride + centre``.

        Args:
            values: a map on the patch grid.
            size: (rows, columns) of the image in pixels. Default: what the patches cover.
        """
        rows, columns = size or tuple((n - 1) * self.step + self.patch_size for n in self.grid)
        vertical = self._interpolation(rows, self.grid[0]).to(values)
        horizontal = self._interpolation(columns, self.grid[1]).to(values)
        return vertical @ values @ horizontal.mT

    def token_at(self, row: float, column: float) -> int:
        """Return the token whose patch centre is nearest to a pixel.

        Args:
            row: from the top, in pixels; a fraction lies inside its pixel.
            column: from the left, likewise.

        Raises:
            ValueError: the pixel lies outside what the patches cover.
        """
        position = []
        for name, value, count in (("row", row, self.grid[0]), ("column", column, self.grid[1])):
            covered = (count - 1) * self.step + self.patch_size
            if not 0 <= value < covered:
                raise ValueError(f"token_at: {name} {value} is outside the {covered} pixels that the patches cover.")
            nearest = round((math.floor(value) + 0.5 - self.centre) / self.step)
            position.append(min(max(nearest, 0), count - 1))
        return int(self.patches[position[0] * self.grid[1] + position[1]])

    def _interpolation(self, pixels: int, count: int) -> Tensor:
        """(pixels, count) weights of linear interpolation at the pixel centres."""
        position = (torch.arange(pixels, dtype=torch.float64) + 0.5 - self.centre) / self.step
        position = position.clamp(0, count - 1)
        return (1 - (position[:, None] - torch.arange(count)).abs()).clamp(min=0)
