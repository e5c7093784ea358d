"""Where tokens sit in the image, or in a text: the patch grid, and the tokens that are not patches."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from mamba_attn._types import Float, Int


@dataclass(frozen=True)
class TokenLayout:
    """The token frame of one layer.

    Patches are numbered in raster order, or by columns, over the token indices that class tokens and registers leave
    free. With ``window`` the frame is the grid padded to whole windows, below and on the right, in raster order; the
    padding is part of the frame but not of maps: it lies outside the image.

    Args:
        grid: (height, width) of the patch grid; of a volume or a video (depth or frames, height, width), of a line of
            text (tokens,).
        patch_size: side of a patch, in pixels, or one per axis of the grid: a video's patches may span one frame.
        stride: distance between neighbouring patches, in pixels, or one per axis; less than ``patch_size`` when patches
            overlap. Default: ``patch_size``.
        class_tokens: token indices of class tokens.
        registers: token indices of registers.
        offset: centre of the first patch, in pixels from the image's edge, or one per axis. Default:
            ``patch_size / 2``. Stems of padded convolutions are centred on a pixel, not a patch: use 0.5.
        window: side, in patches, of the square windows (of a volume: cubes) that tokens are mixed within; None: all
            tokens are mixed.
        pixels: whether the tokens lie in an image; those of a text do not.
        columns_first: whether patches are numbered down the grid's columns and not along its rows, as by models that
            turn a spectrogram (time, frequency) on its side; the grid's axes are the input's.

    Raises:
        ValueError: a grid without axes, sizes for another number of axes, an index outside the token frame, an index
            used twice, a size below one, or windows together with class tokens, registers or ``columns_first``.

    Example:
        >>> TokenLayout(grid=(14, 14), patch_size=16, class_tokens=(98,)).tokens
        197
    """

    grid: tuple[int, ...]
    patch_size: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] | None = None
    class_tokens: tuple[int, ...] = ()
    registers: tuple[int, ...] = ()
    offset: float | tuple[float, ...] | None = None
    window: int | None = None
    pixels: bool = True
    columns_first: bool = False
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("patch_size", "stride", "offset"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.grid):
                raise ValueError(
                    f"TokenLayout(grid={self.grid}, {name}={value}): expected one number, or one per axis of the grid."
                )
        if not self.grid or min(*self.grid, *self.patch_sizes, *self.steps) < 1:
            raise ValueError(
                f"TokenLayout(grid={self.grid}, patch_size={self.patch_size}, stride={self.stride}): "
                "grid, patch_size and stride must be at least 1."
            )
        extra = self.class_tokens + self.registers
        if self.window is not None and (self.window < 1 or extra or self.columns_first):
            raise ValueError(
                f"TokenLayout(window={self.window}, columns_first={self.columns_first}, "
                f"class_tokens={self.class_tokens}, registers={self.registers}): window must be at least 1, and "
                "windows cannot hold class tokens or registers, or be numbered by columns."
            )
        object.__setattr__(self, "tokens", math.prod(self.padded) + len(extra))
        if len(set(extra)) != len(extra) or any(not 0 <= index < self.tokens for index in extra):
            raise ValueError(
                f"TokenLayout: class_tokens={self.class_tokens} and registers={self.registers} must be distinct "
                f"token indices in 0..{self.tokens - 1} of a {_times(self.grid)} grid with {len(extra)} extra tokens."
            )

    @classmethod
    def line(cls, tokens: int) -> Self:
        """Return the layout of a text: a grid of one axis, without pixels.

        Args:
            tokens: of the text, padding included.

        Raises:
            ValueError: no tokens.

        Example:
            >>> TokenLayout.line(7).to_grid(torch.ones(2, 7)).shape
            torch.Size([2, 7])
        """
        if tokens < 1:
            raise ValueError(f"TokenLayout.line({tokens!r}): the text is empty; expected at least one token.")
        return cls(grid=(tokens,), pixels=False)

    @property
    def patches(self) -> Int[Tensor, " patches"]:
        """Token index of every patch, in raster order."""
        if self.window is not None:
            return torch.arange(self.tokens).view(self.padded)[tuple(map(slice, self.grid))].flatten()
        free = torch.ones(self.tokens, dtype=torch.bool)
        free[list(self.class_tokens + self.registers)] = False
        numbers = free.nonzero().squeeze(1)
        return (
            numbers.view(self.grid[::-1]).permute(*range(len(self.grid))[::-1]).flatten()
            if self.columns_first
            else numbers
        )

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """Sides of a patch in pixels, one per axis of the grid."""
        return self._per_axis(self.patch_size)

    @property
    def steps(self) -> tuple[int, ...]:
        """Distances between neighbouring patches in pixels, one per axis: ``stride``, or ``patch_size`` without."""
        return self._per_axis(self.patch_size if self.stride is None else self.stride)

    @property
    def centres(self) -> tuple[float, ...]:
        """Centre of the first patch in pixels, along each axis: ``offset``, or half a patch when none was given."""
        return tuple(side / 2 for side in self.patch_sizes) if self.offset is None else self._per_axis(self.offset)

    @property
    def step(self) -> int:
        """Distance between neighbouring patches in pixels, along the last axis."""
        return self.steps[-1]

    @property
    def centre(self) -> float:
        """Centre of the first patch in pixels, along the last axis."""
        return self.centres[-1]

    @property
    def covered(self) -> tuple[int, ...]:
        """Pixels that the patches cover, along each axis."""
        sizes = zip(self.grid, self.steps, self.patch_sizes, strict=True)
        return tuple((count - 1) * step + side for count, step, side in sizes)

    @property
    def padded(self) -> tuple[int, ...]:
        """The grid with its padding to whole windows."""
        side = self.window or 1
        return tuple(-(-count // side) * side for count in self.grid)

    def _per_axis(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.grid)

    def windows(self, device: torch.device | str = "cpu") -> Int[Tensor, "windows length"]:
        """Return the tokens of each window, which are mixed with each other; all tokens if there are no windows.

        Windows are in raster order, tokens in raster order inside each.

        Args:
            device: of the result.
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
        """Assemble windows into the token frame, the inverse of ``to_windows``.

        Args:
            x: with images and, inside each, windows first: (batch * windows, ...).
            axis: the tokens' axis.
        """
        if self.window is None or len(self.windows(x.device)) == 1:
            return x
        windows, inverse = _windows(self.padded, self.window, x.device)
        side_by_side: Tensor = x.unflatten(0, (-1, len(windows))).movedim(1, axis).flatten(axis, axis + 1)
        return side_by_side.index_select(axis, inverse)

    def to_grid(self, values: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch_and_grid"]:
        """Drop tokens that are not patches, and padding; arrange the rest on the grid.

        Args:
            values: one number per token.

        Returns:
            (*batch, *grid): for an image (*batch, height, width).

        Raises:
            ValueError: ``values`` has another number of tokens.
        """
        if values.shape[-1] != self.tokens:
            raise ValueError(
                f"to_grid(values{tuple(values.shape)}): expected {self.tokens} tokens in the last axis "
                f"(grid {_times(self.grid)} and {self.tokens - math.prod(self.grid)} other tokens)."
            )
        patches = values.index_select(-1, self.patches.to(values.device))
        grid: Tensor = patches.unflatten(-1, self.grid)
        return grid

    def to_pixels(
        self, values: Float[Tensor, "*values"], size: tuple[int, ...] | None = None
    ) -> Float[Tensor, "*batch_and_size"]:
        """Interpolate a map on the grid linearly between patch centres, constant outside them.

        With stride == patch_size this equals ``F.interpolate(mode="bilinear", align_corners=False)``; overlapping
        patches keep their true centres, ``index * stride + centre``.

        Args:
            values: a map on the patch grid, (..., *grid); or one number per token, (..., tokens), as
                ``layer.row`` returns, or per patch, (..., patches). Values shaped like the grid are read as a map.
            size: of the image in pixels, one number per axis: (rows, columns). Default: what the patches cover.

        Returns:
            (..., *size).

        Raises:
            ValueError: ``values`` of another shape; a size below one pixel; a text, which has no pixels.

        Example:
            >>> TokenLayout(grid=(4, 6), patch_size=16, class_tokens=(12,)).to_pixels(torch.ones(2, 25)).shape
            torch.Size([2, 64, 96])
        """
        self._require_pixels("to_pixels")
        values = self._on_grid(values, size)
        axes = len(self.grid)
        for axis, pixels in enumerate(size or self.covered):  # one axis at a time
            weights = self._interpolation(pixels, axis).to(values)
            if axis == axes - 2:
                values = weights @ values
            else:
                values = (values.movedim(axis - axes, -1) @ weights.mT).movedim(-1, axis - axes)
        return values

    def _on_grid(self, values: Tensor, size: tuple[int, ...] | None) -> Tensor:
        """Return ``to_pixels``'s values as a map on the grid."""
        grid, cells = self.grid, math.prod(self.grid)
        if size is not None and (len(size) != len(grid) or min(size) < 1):
            expected = "(rows, columns) of the image" if len(grid) == 2 else f"{len(grid)} numbers, one per axis"
            raise ValueError(f"to_pixels(size={size}): expected {expected}, at least one pixel each.")
        if tuple(values.shape[-len(grid) :]) == grid and (len(grid) > 1 or cells != self.tokens):
            return values
        count = values.shape[-1] if values.ndim else 0
        if count == self.tokens:
            return self.to_grid(values)
        if count == cells:
            return values.reshape(*values.shape[:-1], *grid)
        per_token = f"(..., {self.tokens}) with one number per token" if self.tokens != cells else ""
        raise ValueError(
            f"to_pixels(values{tuple(values.shape)}): expected a map (..., {', '.join(map(str, grid))}) on the patch "
            f"grid, {per_token + ', ' if per_token else ''}or (..., {cells}) with one number per patch."
        )

    def token_at(self, *place: float) -> int:
        """Return the token whose patch centre is nearest to a pixel.

        Args:
            place: row and column, from the top and from the left, in pixels; of another grid one number per axis. A
                fraction lies inside its pixel.

        Raises:
            ValueError: another number of axes, or a pixel outside what the patches cover; a text, which has none.
        """
        self._require_pixels("token_at")
        if len(place) != len(self.grid):
            raise ValueError(
                f"token_at{place}: expected {len(self.grid)} numbers, one per axis of {_times(self.grid)}."
            )
        index = 0
        for axis, (value, count) in enumerate(zip(place, self.grid, strict=True)):
            covered = self.covered[axis]
            if not 0 <= value < covered:
                name = ("row", "column")[axis] if len(place) == 2 else f"place[{axis}]"
                raise ValueError(f"token_at: {name} {value} is outside the {covered} pixels that the patches cover.")
            nearest = round((math.floor(value) + 0.5 - self.centres[axis]) / self.steps[axis])
            index = index * count + min(max(nearest, 0), count - 1)
        return int(self.patches[index])

    def _require_pixels(self, call: str) -> None:
        if not self.pixels:
            raise ValueError(f"{call}: the tokens of a text have no pixels; number them by their position, from 0.")

    def _interpolation(self, pixels: int, axis: int) -> Tensor:
        """(pixels, count) weights of linear interpolation at the pixel centres of an axis."""
        count = self.grid[axis]
        position = (torch.arange(pixels, dtype=torch.float64) + 0.5 - self.centres[axis]) / self.steps[axis]
        position = position.clamp(0, count - 1)
        return (1 - (position[:, None] - torch.arange(count)).abs()).clamp(min=0)


def _times(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))


@functools.lru_cache(maxsize=64)
def _in_order(tokens: int, device: torch.device) -> Int[Tensor, " tokens"]:
    with torch.inference_mode(False):  # a cached inference tensor could not be used while training
        return torch.arange(tokens, device=device)


@functools.lru_cache(maxsize=64)
def _windows(
    padded: tuple[int, ...], side: int, device: torch.device
) -> tuple[Int[Tensor, "windows length"], Int[Tensor, " tokens"]]:
    """Return the tokens of every window and each token's position in that list; cached."""
    with torch.inference_mode(False):
        cut = torch.arange(math.prod(padded), device=device).view(
            [n for count in padded for n in (count // side, side)]
        )
        order = cut.permute(*range(0, cut.ndim, 2), *range(1, cut.ndim, 2)).reshape(-1, side ** len(padded))
        return order, order.flatten().argsort()
