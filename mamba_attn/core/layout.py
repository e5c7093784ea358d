"""Where tokens sit in the image: the patch grid, and the tokens that are not patches."""

import functools
import math
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from mamba_attn._types import Float, Int


@dataclass(frozen=True)
class TokenLayout:
    """The token frame of one layer.

    Patches are numbered in raster order over the token indices that class tokens and registers leave free. With
    ``window`` the frame is the grid padded to whole windows, below and on the right, in raster order; the padding is
    part of the frame and of no map: it lies outside the image.

    Args:
        grid: (height, width) of the patch grid.
        patch_size: side of a patch, in pixels.
        stride: distance between neighbouring patches, in pixels; less than ``patch_size`` when patches overlap.
            Default: ``patch_size``.
        class_tokens: token indices of class tokens.
        registers: token indices of registers.
        offset: centre of the first patch, in pixels from the image's edge. Default: ``patch_size / 2``. Stems of padded
            convolutions see around a pixel, not a patch: theirs is 0.5.
        window: side, in patches, of the square windows that tokens are mixed within; None: all tokens are mixed.

    Raises:
        ValueError: an index outside the token frame, an index used twice, a size below one, or windows beside class
            tokens or registers.

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
    window: int | None = None
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        height, width = self.grid
        if min(height, width, self.patch_size, self.step) < 1:
            raise ValueError(
                f"TokenLayout(grid={self.grid}, patch_size={self.patch_size}, stride={self.stride}): "
                "grid, patch_size and stride must be at least 1."
            )
        extra = self.class_tokens + self.registers
        if self.window is not None and (self.window < 1 or extra):
            raise ValueError(
                f"TokenLayout(window={self.window}, class_tokens={self.class_tokens}, registers={self.registers}): "
                "window must be at least 1, and windows hold patches alone."
            )
        object.__setattr__(self, "tokens", math.prod(self.padded) + len(extra))
        if len(set(extra)) != len(extra) or any(not 0 <= index < self.tokens for index in extra):
            raise ValueError(
                f"TokenLayout: class_tokens={self.class_tokens} and registers={self.registers} must be distinct "
                f"token indices in 0..{self.tokens - 1} of a {height}x{width} grid with {len(extra)} extra tokens."
            )

    @property
    def patches(self) -> Int[Tensor, " patches"]:
        """Token index of every patch, in raster order."""
        if self.window is not None:
            return torch.arange(self.tokens).view(self.padded)[: self.grid[0], : self.grid[1]].flatten()
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

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) of the grid with its padding to whole windows."""
        side = self.window or 1
        return -(-self.grid[0] // side) * side, -(-self.grid[1] // side) * side

    def windows(self, device: torch.device | str = "cpu") -> Int[Tensor, "windows length"]:
        """Return the tokens that are mixed with each other, window by window; without windows all in one.

        Windows are in raster order, tokens in raster order inside each.

        Args:
            device: where the indices are wanted.
        """
        if self.window is None:
            return _in_order(self.tokens, torch.device(device))[None]
        return _windows(self.padded, self.window, torch.device(device))[0]

    def to_windows(self, x: Tensor, axis: int) -> Tensor:
        """Cut the token frame into the windows that a mixer sees: (batch, ...) to (batch * windows, ...).

        Args:
            x: with the batch first.
            axis: the tokens' axis; window * window long in the result.
        """
        windows = self.windows(x.device)
        if len(windows) == 1:
            return x
        cut = x.index_select(axis, windows.flatten()).unflatten(axis, tuple(windows.shape))
        windows_first: Tensor = cut.movedim(axis, 1).flatten(0, 1)
        return windows_first

    def from_windows(self, x: Tensor, axis: int) -> Tensor:
        """Put windows together to the token frame, the inverse of ``to_windows``.

        Args:
            x: with images and, inside each, windows first: (batch * windows, ...).
            axis: the tokens' axis.
        """
        if self.window is None or self.padded == (self.window, self.window):
            return x
        windows, inverse = _windows(self.padded, self.window, x.device)
        side_by_side: Tensor = x.unflatten(0, (-1, len(windows))).movedim(1, axis).flatten(axis, axis + 1)
        return side_by_side.index_select(axis, inverse)

    def to_grid(self, values: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch height width"]:
        """Drop the tokens that are not patches, padding too, and lay the rest on the grid.

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
        self, values: Float[Tensor, "*values"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "*batch rows columns"]:
        """Interpolate a map on the grid linearly between patch centres, constant outside them.

        With stride == patch_size this equals ``F.interpolate(mode="bilinear", align_corners=False)``; overlapping
        patches keep their true centres, ``index * stride + centre``.

        Args:
            values: a map on the patch grid, (..., height, width); or one number per token, (..., tokens), as
                ``layer.row`` gives, or per patch, (..., patches). What has the shape of the grid is read as a map.
            size: (rows, columns) of the image in pixels. Default: what the patches cover.

        Raises:
            ValueError: ``values`` of another shape; a size below one pixel.

        Example:
            >>> TokenLayout(grid=(4, 6), patch_size=16, class_tokens=(12,)).to_pixels(torch.ones(2, 25)).shape
            torch.Size([2, 64, 96])
        """
        values = self._on_grid(values, size)
        rows, columns = size or tuple((n - 1) * self.step + self.patch_size for n in self.grid)
        vertical = self._interpolation(rows, self.grid[0]).to(values)
        horizontal = self._interpolation(columns, self.grid[1]).to(values)
        return vertical @ values @ horizontal.mT

    def _on_grid(self, values: Tensor, size: tuple[int, int] | None) -> Tensor:
        """The map that ``to_pixels`` was given, or is made of what it was given."""
        height, width = self.grid
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"to_pixels(size={size}): expected (rows, columns) of the image, at least one pixel each.")
        if tuple(values.shape[-2:]) == (height, width):
            return values
        count = values.shape[-1] if values.ndim else 0
        if count == self.tokens:
            return self.to_grid(values)
        if count == height * width:
            return values.reshape(*values.shape[:-1], height, width)
        per_token = f"(..., {self.tokens}) with one number per token" if self.tokens != height * width else ""
        raise ValueError(
            f"to_pixels(values{tuple(values.shape)}): expected a map (..., {height}, {width}) on the patch grid, "
            f"{per_token + ', ' if per_token else ''}or (..., {height * width}) with one number per patch."
        )

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


@functools.lru_cache(maxsize=64)
def _in_order(tokens: int, device: torch.device) -> Int[Tensor, " tokens"]:
    with torch.inference_mode(False):  # a cached inference tensor could not be used while training
        return torch.arange(tokens, device=device)


@functools.lru_cache(maxsize=64)
def _windows(
    padded: tuple[int, int], side: int, device: torch.device
) -> tuple[Int[Tensor, "windows length"], Int[Tensor, " tokens"]]:
    """The tokens of every window, and where in that list every token stands; remembered."""
    with torch.inference_mode(False):
        grid = torch.arange(padded[0] * padded[1], device=device).view(padded)
        order = rearrange(
            grid, "(down rows) (right columns) -> (down right) (rows columns)", rows=side, columns=side
        ).contiguous()
        return order, order.flatten().argsort()
