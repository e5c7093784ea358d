"""The same pictures as RGB arrays, through Pillow: no browser needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamba_attn.figures.colours import INK, as_image, as_values, mix, scale, scales, to_rgb
from mamba_attn.figures.picture import patch_size

try:
    from PIL import Image, ImageDraw, ImageFont

    from mamba_attn.figures.path_rgb import scan_path_rgb as scan_path_rgb
    from mamba_attn.figures.reach_rgb import reach_rgb as reach_rgb
    from mamba_attn.figures.roofline_rgb import roofline_rgb as roofline_rgb
except ImportError as error:
    raise ImportError("mamba_attn.figures.png needs Pillow: pip install 'mamba_attn[explain]'") from error

GAP = 8  # pixels between panels


def matrix_rgb(
    values: Any,
    *,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
) -> np.ndarray:
    """Return a matrix or map as (rows, columns, 3) uint8, one pixel per value; NaN and Inf are grey.

    Args:
        values: (rows, columns).
        limits: as in ``figures.matrix``.
        signed: as in ``figures.matrix``.
        colours: as in ``figures.matrix``.

    Raises:
        ValueError: not a matrix, or limits that do not fit.
    """
    array = as_values("matrix_rgb(values)", values)
    return to_rgb(array, scale(array, limits=limits, signed=signed, colours=colours))


def overlay_rgb(
    image: Any,
    values: Any,
    *,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
) -> np.ndarray:
    """Return a map over its image as (rows, columns, 3) uint8.

    Args:
        image: as in ``figures.overlay``.
        values: (rows, columns), the image's size.
        opacity: of the map, 0 to 1.
        limits: as in ``figures.overlay``.
        signed: as in ``figures.overlay``.
        colours: as in ``figures.overlay``.

    Raises:
        ValueError: shapes that disagree, or limits that do not fit.
    """
    picture = as_image("overlay_rgb(image)", image)
    heat = matrix_rgb(values, limits=limits, signed=signed, colours=colours)
    if picture.shape != heat.shape:
        raise ValueError(
            f"overlay_rgb: the map is {heat.shape[:2]} pixels, the image {picture.shape[:2]}; they must agree."
        )
    return mix(picture, heat, opacity)


def layer_grid_rgb(
    image: Any,
    maps: Sequence[Any],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    shared: bool = False,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    size: int = 180,
) -> np.ndarray:
    """Return a map per layer over one image, in reading order, as (rows, columns, 3) uint8.

    Args:
        image: as in ``figures.layer_grid``.
        maps: as in ``figures.layer_grid``.
        titles: one below each.
        columns: panels in a row. Default: all in one, at most six.
        shared: one colour range for all panels.
        opacity: of the maps, 0 to 1.
        limits: as in ``figures.layer_grid``.
        signed: as in ``figures.layer_grid``.
        colours: as in ``figures.layer_grid``.
        size: height of a panel in pixels.

    Raises:
        ValueError: no maps, another number of titles, or a map that does not tile the image.
    """
    picture = as_image("layer_grid_rgb(image)", image)
    full = []
    for index, values in enumerate(maps):
        array = as_values(f"layer_grid_rgb(maps[{index}])", values)
        patch = patch_size(f"layer_grid_rgb(maps[{index}])", picture.shape[:2], array.shape)
        full.append(array.repeat(patch[0], 0).repeat(patch[1], 1))
    chosen = scales(full, shared=shared, limits=limits, signed=signed, colours=colours) if full else []
    panels = [mix(picture, to_rgb(array, its), opacity) for array, its in zip(full, chosen, strict=True)]
    return side_by_side(panels, titles, height=size, columns=columns or 6)


def side_by_side(
    panels: Sequence[np.ndarray], captions: Sequence[str], *, height: int = 256, columns: int | None = None
) -> np.ndarray:
    """Return panels in rows on white, each enlarged to the same height, its caption below it.

    Args:
        panels: (rows, columns, 3) uint8 each.
        captions: one per panel; too long ones are cut.
        height: of the panels in pixels; a panel that is higher keeps its size.
        columns: panels in a row. Default: all.

    Raises:
        ValueError: no panels, another number of captions, or no columns.
    """
    if not panels or len(panels) != len(captions):
        raise ValueError(
            f"side_by_side: expected one caption per panel, got {len(panels)} panels and {len(captions)} captions."
        )
    if columns is not None and columns < 1:
        raise ValueError(f"side_by_side(columns={columns}): expected at least one column.")
    height = max(height, *(panel.shape[0] for panel in panels))
    columns = columns or len(panels)
    rows = [
        _row(panels[start : start + columns], captions[start : start + columns], height)
        for start in range(0, len(panels), columns)
    ]
    width = max(row.shape[1] for row in rows)
    white = [np.full((row.shape[0], width - row.shape[1], 3), 255, dtype=np.uint8) for row in rows]
    return np.concatenate([np.concatenate(pair, axis=1) for pair in zip(rows, white, strict=True)])


def save_png(path: str | Path, rgb: np.ndarray) -> None:
    """Write a (rows, columns, 3) uint8 array.

    Raises:
        OSError: the file cannot be written.
    """
    Image.fromarray(rgb).save(path, format="PNG")


def _fit(draw: Any, caption: str, font: Any, width: int) -> str:
    """The caption, shortened until it fits."""
    shown = caption
    while draw.textlength(shown, font) > width and len(shown) > 1:
        caption = caption[:-1]
        shown = caption.rstrip() + "…"
    return shown


def _row(panels: Sequence[np.ndarray], captions: Sequence[str], height: int) -> np.ndarray:
    """Panels of one height with their captions."""
    pictures = [Image.fromarray(as_image("side_by_side(panels)", panel)) for panel in panels]
    pictures = [
        picture.resize((max(1, round(picture.width * height / picture.height)), height), Image.Resampling.BICUBIC)
        for picture in pictures
    ]
    text = max(11, height // 18)
    font = ImageFont.load_default(text)
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, height + 2 * GAP + 2 * text), "white")
    draw, left = ImageDraw.Draw(sheet), GAP
    for picture, caption in zip(pictures, captions, strict=True):
        sheet.paste(picture, (left, GAP))
        cut = _fit(draw, caption, font, picture.width)
        draw.text((left + picture.width / 2, height + GAP + text), cut, INK, font, anchor="mm")
        left += picture.width + GAP
    return np.asarray(sheet)
