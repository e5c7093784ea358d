"""What layers, traces and stores show in a notebook: small HTML with its pictures inside, made by no other package."""

import base64
import html
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

# the lists of mamba_attn.figures.colours, which this file is too low to import; a test compares
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
BLUE_ORANGE = "08306b 2166ac 67a3d1 b8d5ea f7f7f5 fcd3a1 f5a04a d4650f 7f3300"
_PERCENTILE = 99.5  # values beyond it take the last colour
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
    """Return HTML of a map or matrix, its colours those of ``mamba_attn.figures``, above a caption.

    Args:
        values: (rows, columns); large ones are averaged over blocks.
        caption: plain text.
        side: the longer one's pixels on the screen.
    """
    cells = _smaller(np.nan_to_num(np.asarray(values, dtype=np.float64)))
    return photo(coloured(cells), f"{caption} ({cells.min():.2g} to {cells.max():.2g})", side)


def photo(rgb: np.ndarray, caption: str, side: int = 150) -> str:
    """Return HTML of an image above a caption.

    Args:
        rgb: (rows, columns, 3) uint8; large ones are averaged over blocks.
        caption: plain text.
        side: the longer one's pixels on the screen.
    """
    rgb = np.stack([_smaller(channel, side) for channel in np.moveaxis(rgb, 2, 0)], axis=2).round().astype(np.uint8)
    rows, columns = rgb.shape[:2]
    width, height = (max(1, round(side * n / max(rows, columns))) for n in (columns, rows))
    shown = f"width:{width}px;height:{height}px;image-rendering:pixelated;display:block;margin:0"
    return (
        f'<div style="max-width:{max(width, 125)}px"><img style="{shown}" alt="{safe(caption)}" src="{png(rgb)}">'
        f'<div style="color:#5b6670;font-size:12px;overflow-wrap:anywhere">{safe(caption)}</div></div>'
    )


def coloured(values: np.ndarray) -> np.ndarray:
    """Return the colours of values, (rows, columns, 3) uint8: signed ones centred on zero, else from the lowest on."""
    signed = bool((values < 0).any())
    size = np.abs(values) if signed else values
    high = float(np.percentile(size, _PERCENTILE))
    low = -high if signed else float(values.min())
    if not high > (0 if signed else low):
        high = float(size.max())
        low = -high if signed else low
    high = high if high > low else low + 1
    table = np.array([list(bytes.fromhex(one)) for one in (BLUE_ORANGE if signed else VIRIDIS).split()], np.float64)
    place = np.clip((values - low) / (high - low), 0, 1) * (len(table) - 1)
    channels = [np.interp(place, np.arange(len(table)), table[:, channel]) for channel in range(3)]
    return np.asarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def png(rgb: np.ndarray) -> str:
    """Return an image as the address of a PNG that it contains.

    Args:
        rgb: (rows, columns, 3) uint8.
    """
    rows, columns = rgb.shape[:2]
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), rgb.reshape(rows, 3 * columns)], axis=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def safe(text: object) -> str:
    """Return anything as text in HTML."""
    return html.escape(str(text))


def _smaller(values: np.ndarray, side: int = _LARGEST) -> np.ndarray:
    """Means over square blocks, the last ones cut at the edge."""
    factor = -(-max(values.shape) // side)
    if factor == 1:
        return values
    for axis in (0, 1):
        starts = np.arange(0, values.shape[axis], factor)
        counts = np.diff([*starts, values.shape[axis]])
        values = np.add.reduceat(values, starts, axis) / np.expand_dims(counts, 1 - axis)
    return values
