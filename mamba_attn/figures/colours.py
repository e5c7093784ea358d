"""Maps values to colours by one rule for plotly figures, PNGs and notebooks; needs only numpy.

All lists are safe for colour-blind readers. Inferno, Viridis, Cividis and Plasma are plotly's and matplotlib's. A sign
has the same colour in every figure and on every page: orange above zero, blue below.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


def _hex(codes: str) -> list[str]:
    return [f"#{code}" for code in codes.split()]


SEQUENTIAL = _hex("000004 1b0c41 4a0c6b 781c6d a52c60 cf4446 ed6925 fb9b06 f7d13d fcffa4")  # Inferno
VIRIDIS = _hex("440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725")
CIVIDIS = _hex("00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838")
# orange above zero; the ends differ in lightness and in hue for every kind of colour vision
DIVERGING = _hex("08306b 2166ac 67a3d1 b8d5ea f7f7f5 fcd3a1 f5a04a d4650f 7f3300")
PATH = _hex("0d0887 46039f 7201a8 9c179e bd3786 d8576b ed7953 fb9f3a fdca26")  # Plasma; its palest is lost on white
# Okabe and Ito's colours without yellow, which is invisible on white, then two that differ from them in lightness
CATEGORIES = _hex("0072b2 d55e00 009e73 cc79a7 e69f00 56b4e9 5b4a9e 8a8a00")
MISSING = (128, 128, 128)  # NaN and Inf
EMPTY = np.array([240, 240, 240], dtype=np.uint8)  # cells without a value
INK = "#222222"
GRID = "#e4e4e4"  # lines behind a chart
PERCENTILE = 99.5  # of maps: values beyond it take the last colour; a few tokens would outshine the rest


class Scale(NamedTuple):
    """How numbers become colours.

    Args:
        low: value of the first colour.
        high: value of the last colour.
        colours: colour names as plotly writes them, evenly spaced.
    """

    low: float
    high: float
    colours: list[str]


def as_values(call: str, values: Any) -> np.ndarray:
    """Return a (rows, columns) array of numbers.

    Raises:
        ValueError: not two axes, or no finite number.
    """
    array = _array(values).astype(np.float64)
    if array.ndim != 2 or not np.isfinite(array).any():
        raise ValueError(
            f"{call}: expected a (rows, columns) array with at least one finite number, got {array.shape}; pass a "
            "single map, e.g. maps[0, 0]."
        )
    return array


def as_image(call: str, image: Any) -> np.ndarray:
    """Return a (rows, columns, 3) uint8 image; floating-point images are taken as 0..1.

    Args:
        call: name of the caller, for errors.
        image: (rows, columns, 3), or (3, rows, columns) as torch has them; an array or a tensor on any device.

    Raises:
        ValueError: another shape, or numbers outside 0..1.
    """
    array = _array(image)
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"{call}: expected an image (rows, columns, 3) or (3, rows, columns), got {array.shape}; pass images[0] of "
            "a batch."
        )
    if array.dtype == np.uint8:
        return array
    if not (np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{call}: expected an image of uint8, or of floating-point numbers in 0..1 (before normalisation), got "
            f"{array.dtype} in {array.min():.3g}..{array.max():.3g}; undo what the model's transform did: image * std "
            "+ mean."
        )
    return (array * 255).round().astype(np.uint8)


def _array(values: Any) -> np.ndarray:
    """Return numbers as a numpy array; also tensors of any device and precision, with or without gradients."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def scale(
    values: np.ndarray,
    *,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
) -> Scale:
    """Choose the range and the colours of some values.

    Args:
        values: any shape; NaN and Inf are left out.
        limits: (low, high). Default: the values' own range, for signed values symmetric about zero.
        signed: centre on zero, with two colours. Default: whether a value is negative.
        colours: colours from low to high. Default: Inferno, for signed values orange above zero and blue below.

    Raises:
        ValueError: limits that are not low < high, or for signed values not symmetric.
    """
    finite = values[np.isfinite(values)]
    signed = bool((finite < 0).any()) if signed is None else signed
    if limits is None:
        low, high = float(finite.min()), float(finite.max())
        low, high = (-max(-low, high), max(-low, high)) if signed else (low, high)
        high = high if high > low else low + 1.0  # constant values take the first colour, zeros the middle one
        low = -high if signed else low
    else:
        low, high = limits
        if not low < high or (signed and low != -high):
            kind = "(-high, high), for signed values" if signed else "(low, high) with low < high"
            raise ValueError(f"limits={limits}: expected {kind}.")
    return Scale(low, high, list(colours or (DIVERGING if signed else SEQUENTIAL)))


def scales(
    arrays: Sequence[np.ndarray],
    *,
    shared: bool,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
) -> list[Scale]:
    """Choose the ranges of panels, shared or one each; all are signed if any is. Arguments as in ``scale``."""
    every = np.concatenate([array.ravel() for array in arrays])
    signed = bool((every[np.isfinite(every)] < 0).any()) if signed is None else signed
    return [scale(every if shared else array, limits=limits, signed=signed, colours=colours) for array in arrays]


def limits(values: np.ndarray, signed: bool | None = None) -> dict[str, Any]:
    """Return the colour range of a map or matrix, as keyword arguments of the figures.

    Signed values are centred on zero; the largest half percent share the last colour.

    Args:
        values: any shape.
        signed: centre on zero. Default: whether a value is negative.
    """
    signed = bool((values < 0).any()) if signed is None else signed
    low, high = (0.0, float(np.percentile(np.abs(values), PERCENTILE))) if signed else _range(values)
    if not high > low:
        return {"signed": signed}
    return {"signed": signed, "limits": (-high, high) if signed else (low, high)}


def plotly_scale(colours: Sequence[str]) -> list[list[float | str]]:
    """Return colours as a plotly colorscale."""
    return [
        [float(position), colour] for position, colour in zip(np.linspace(0, 1, len(colours)), colours, strict=True)
    ]


def to_rgb(values: np.ndarray, chosen: Scale) -> np.ndarray:
    """Return the colour of every value, uint8 with a last axis of 3; values beyond the limits take the end's colour."""
    table = np.array([_channels(colour) for colour in chosen.colours], dtype=np.float64)
    position = (np.nan_to_num(values) - chosen.low) / (chosen.high - chosen.low)
    position = np.clip(position, 0, 1) * (len(table) - 1)
    channels = [np.interp(position, np.arange(len(table)), table[:, channel]) for channel in range(3)]
    rgb = np.stack(channels, axis=-1)
    rgb[~np.isfinite(values)] = MISSING
    return rgb.round().astype(np.uint8)


def mix(below: np.ndarray, above: np.ndarray, opacity: float) -> np.ndarray:
    """Return colours laid over others, uint8."""
    return (opacity * above.astype(np.float64) + (1 - opacity) * below).round().astype(np.uint8)


def categories(count: int) -> list[str]:
    """Return colours for unordered kinds: eight that everyone can distinguish; for more kinds, steps of Viridis."""
    if count <= len(CATEGORIES):
        return CATEGORIES[:count]
    return [css(colour) for colour in to_rgb(np.arange(count), Scale(0, count - 1, VIRIDIS))]


def css(rgb: np.ndarray) -> str:
    """Return one colour as plotly writes it."""
    return "rgb({}, {}, {})".format(*rgb)


def _channels(colour: str) -> tuple[float, ...]:
    if colour.startswith("#"):
        return tuple(bytes.fromhex(colour[1:]))
    return tuple(float(channel) for channel in colour.removeprefix("rgb(").removesuffix(")").split(","))


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(np.percentile(values, PERCENTILE))
