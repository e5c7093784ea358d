"""The same pictures as RGB arrays, through Pillow: no browser needed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamba_attn.figures.colours import INK, as_image, as_values, scale, to_rgb

try:
    from PIL import Image, ImageDraw, ImageFont
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
    return (opacity * heat.astype(np.float64) + (1 - opacity) * picture).round().astype(np.uint8)


def side_by_side(panels: Sequence[np.ndarray], captions: Sequence[str], *, height: int = 256) -> np.ndarray:
    """Return panels in a row on white, each enlarged to the same height, its caption below it.

    Args:
        panels: (rows, columns, 3) uint8 each.
        captions: one per panel; too long ones are cut.
        height: of the panels in pixels; a panel that is higher keeps its size.

    Raises:
        ValueError: no panels, or another number of captions.
    """
    if not panels or len(panels) != len(captions):
        raise ValueError(
            f"side_by_side: expected one caption per panel, got {len(panels)} panels and {len(captions)} captions."
        )
    height = max(height, *(panel.shape[0] for panel in panels))
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


def save_png(path: str | Path | io.BytesIO, rgb: np.ndarray) -> None:
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
