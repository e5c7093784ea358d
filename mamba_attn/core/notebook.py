"""How layers, traces and stores look in a notebook: small HTML with embedded pictures, without other packages."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

from mamba_attn.figures.colours import DIVERGING, VIRIDIS, limits, scale, to_rgb
from mamba_attn.figures.picture import data_uri

_LARGEST = 128  # cells of a picture's side
_STYLE = (
    "font:13px/1.45 system-ui,sans-serif;color:#1d2329;background:#fff;border:1px solid #dde2e7;border-radius:8px;"
    "padding:10px 12px;margin:3px 0;display:inline-block"
)


def card(title: str, facts: Mapping[str, object], body: str = "") -> str:
    """Return HTML of a titled box.

    Args:
        title: plain text.
        facts: plain text by name.
        body: HTML below.
    """
    listed = " · ".join(f"{safe(name)} <b>{safe(value)}</b>" for name, value in facts.items())
    return (
        f'<div style="{_STYLE}"><div style="font-weight:600">{safe(title)}</div>'
        f'<div style="color:#5b6670;margin:2px 0 8px">{listed}</div>{body}</div>'
    )


def row(pictures: Sequence[str]) -> str:
    """Return HTML of pictures side by side."""
    return f'<div style="display:flex;flex-wrap:wrap;gap:10px 14px">{"".join(pictures)}</div>'


def picture(values: np.ndarray, caption: str, side: int = 150) -> str:
    """Return HTML of a map or matrix in the colours of ``mamba_attn.figures``, above a caption.

    Args:
        values: (rows, columns); large ones are averaged over blocks.
        caption: plain text.
        side: length of the longer side on the screen, in pixels.
    """
    cells = _smaller(np.nan_to_num(np.asarray(values, dtype=np.float64)))
    return photo(coloured(cells), f"{caption} ({cells.min():.2g} to {cells.max():.2g})", side)


def photo(rgb: np.ndarray, caption: str, side: int = 150) -> str:
    """Return HTML of an image above a caption.

    Args:
        rgb: (rows, columns, 3) uint8; large ones are averaged over blocks.
        caption: plain text.
        side: length of the longer side on the screen, in pixels.
    """
    rgb = np.stack([_smaller(channel, side) for channel in np.moveaxis(rgb, 2, 0)], axis=2).round().astype(np.uint8)
    rows, columns = rgb.shape[:2]
    width, height = (max(1, round(side * n / max(rows, columns))) for n in (columns, rows))
    shown = f"width:{width}px;height:{height}px;image-rendering:pixelated;display:block;margin:0"
    return (
        f'<div style="max-width:{max(width, 125)}px"><img style="{shown}" alt="{safe(caption)}" src="{data_uri(rgb)}">'
        f'<div style="color:#5b6670;font-size:12px;overflow-wrap:anywhere">{safe(caption)}</div></div>'
    )


def coloured(values: np.ndarray) -> np.ndarray:
    """Return the colours of values, (rows, columns, 3) uint8: centred on zero if signed, else from the lowest on."""
    its = limits(values)
    return to_rgb(values, scale(values, colours=DIVERGING if its["signed"] else VIRIDIS, **its))


def safe(text: object) -> str:
    """Return any object as escaped HTML text."""
    return html.escape(str(text))


def _smaller(values: np.ndarray, side: int = _LARGEST) -> np.ndarray:
    """Average over square blocks; the last ones end at the edge."""
    factor = -(-max(values.shape) // side)
    if factor == 1:
        return values
    for axis in (0, 1):
        starts = np.arange(0, values.shape[axis], factor)
        counts = np.diff([*starts, values.shape[axis]])
        values = np.add.reduceat(values, starts, axis) / np.expand_dims(counts, 1 - axis)
    return values
