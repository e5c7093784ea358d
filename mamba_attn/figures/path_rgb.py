"""The order in which a route visits the patches, as an RGB array; ``mamba_attn.figures.png`` has it too."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mamba_attn.figures.colours import EMPTY, INK, PATH, Scale, as_image, mix, to_rgb
from mamba_attn.figures.path import as_marks, as_route, jumps, mark, shown_steps, stroke
from mamba_attn.figures.picture import patch_size

FINE = 3  # drawn this much larger, then averaged


def scan_path_rgb(
    order: Any,
    grid: tuple[int, int],
    *,
    image: Any | None = None,
    step: int | None = None,
    marks: Iterable[int] = (),
    colours: Sequence[str] | None = None,
    size: int = 400,
) -> np.ndarray:
    """Return the path of one route as (rows, columns, 3) uint8; ``side_by_side`` takes several.

    Args:
        order: (length,): the patch visited at each step, as raster index.
        grid: (height, width) of the patch grid.
        image: as in ``figures.scan_path``.
        step: draw the first steps only. Default: all.
        marks: patches in a frame, as raster indices.
        colours: as in ``figures.scan_path``.
        size: height in pixels.

    Raises:
        ValueError: as ``figures.scan_path``.
    """
    points, framed = as_route("scan_path_rgb", order, grid), as_marks("scan_path_rgb", marks, grid)
    count = shown_steps("scan_path_rgb", step, len(points))
    steps = to_rgb(np.arange(len(points)), Scale(0, max(len(points) - 1, 1), list(colours or PATH)))
    picture = None if image is None else as_image("scan_path_rgb(image)", image)
    patch = (1, 1) if picture is None else patch_size("scan_path_rgb(image)", picture.shape[:2], grid)
    width = max(1, round(size * grid[1] * patch[1] / (grid[0] * patch[0])))
    below = _cells(points[:count], grid, steps) if picture is None else picture
    method = Image.Resampling.NEAREST if picture is None else Image.Resampling.BICUBIC
    drawn = Image.fromarray(below).resize((FINE * width, FINE * size), method)
    pen = _Pen(drawn, grid)
    far = jumps(points)[: count - 1]
    line, end = stroke(pen.cell / FINE), mark(pen.cell / FINE) + 2
    if picture is not None:
        pen.path(points[:count], far, np.full_like(steps, 255), 2 * line + 1, thin=0)
    pen.path(points[:count], far, steps, line, thin=line / 3)
    for point in framed:
        pen.frame(point)
    pen.dot(points[0], end, steps[0])
    pen.square(points[count - 1], end, steps[count - 1])
    return np.asarray(drawn.resize((width, size), Image.Resampling.BOX))


def _cells(points: np.ndarray, grid: tuple[int, int], steps: np.ndarray) -> np.ndarray:
    """The step of every cell as a pale colour; cells that are not visited are grey."""
    cells = np.broadcast_to(EMPTY, (*grid, 3)).copy()
    cells[points[:, 0], points[:, 1]] = mix(EMPTY, steps, 0.25)[: len(points)]
    return cells


class _Pen:
    """Draws on an enlarged image; sizes are given in pixels before the enlargement."""

    def __init__(self, image: Image.Image, grid: tuple[int, int]) -> None:
        self.draw, self.size = ImageDraw.Draw(image), image.size
        self.cells = np.array([image.width / grid[1], image.height / grid[0]])
        self.cell = float(self.cells.min())

    def centre(self, point: np.ndarray) -> tuple[float, float]:
        x, y = (point[::-1] + 0.5) * self.cells
        return float(x), float(y)

    def around(self, point: np.ndarray, size: float) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a thing about a cell's centre, moved into the picture."""
        half = size * FINE / 2
        x, y = (min(max(at, half), side - half) for at, side in zip(self.centre(point), self.size, strict=True))
        return x - half, y - half, x + half, y + half

    def path(self, points: np.ndarray, far: np.ndarray, steps: np.ndarray, line: float, thin: float) -> None:
        """Moves with round corners; jumps thin."""
        for start, stop, jump, colour in zip(points[:-1], points[1:], far, steps, strict=False):
            width = thin if jump else line
            if width:
                self.draw.line((*self.centre(start), *self.centre(stop)), tuple(colour), round(width * FINE))
        for point, colour in zip(points, steps, strict=False):
            self.draw.ellipse(self.around(point, line), tuple(colour))

    def frame(self, point: np.ndarray) -> None:
        """Dark on light, to show on any image."""
        size = 0.8 * self.cell / FINE
        self.draw.rectangle(self.around(point, size + 2), None, "white", 4 * FINE)
        self.draw.rectangle(self.around(point, size), None, INK, 2 * FINE)

    def dot(self, point: np.ndarray, size: float, colour: np.ndarray) -> None:
        """The first step."""
        self.draw.ellipse(self.around(point, size), tuple(colour), "white", 2 * FINE)

    def square(self, point: np.ndarray, size: float, colour: np.ndarray) -> None:
        """The last step drawn."""
        self.draw.rectangle(self.around(point, size), tuple(colour), "white", 2 * FINE)
