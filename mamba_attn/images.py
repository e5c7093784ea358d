"""From image files to a model's input: find, read anything Pillow reads, crop, normalise."""

import glob
import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.errors import MambaAttnError, local_path

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SAMPLES = Path(__file__).parent / "data"

# errors of Pillow's readers on damaged files
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)
_LARGEST = 65535  # of 16 bits
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


class ImageError(MambaAttnError):
    """An image file that cannot be used: damaged, not an image, or too large.

    Example:
        >>> import io
        >>> try:
        ...     read(io.BytesIO(b"no image"), "page.html")
        ... except ImageError as error:
        ...     print("page.html" in str(error))
        True
    """


def samples() -> list[Path]:
    """Return the bundled CC0 images.

    Example:
        >>> [path.name for path in samples()][:1]
        ['clothing_dress_1.jpg']
    """
    return sorted(SAMPLES.glob("*.jpg"))


def find(patterns: Iterable[str]) -> list[Path]:
    """Return the image files for names, folders and glob patterns, in order and without duplicates.

    A folder stands for the files directly in it with the suffix of an image format, sorted by name; where there are
    none, for those in the folders below it, as of a folder per class: in "val" if there are "train" and "val". ``**``
    in a pattern descends into folders.

    Args:
        patterns: as a user writes them; a name that exists literally is not a pattern.

    Raises:
        FileNotFoundError: an entry yields no image; the message says which.
        ValueError: an entry that is no path on this machine.
        ImageError: a pipe or a device.

    Example:
        >>> len(find([str(SAMPLES)]))
        6
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = local_path("file", pattern)
        if path.is_dir():
            files = _images(path.iterdir()) or _below(path)
            reason = f"the folder {pattern!r} holds no images, nor do those in it"
        elif path.is_file():
            files, reason = [path], ""
        elif path.exists():
            raise ImageError(f"{pattern}: this is a pipe or a device, not a file.")
        elif glob.has_magic(pattern):
            files = [path for path in map(Path, sorted(glob.glob(str(path), recursive=True))) if path.is_file()]
            reason = f"the pattern {pattern!r} matches no file"
        else:
            files, reason = [], f"there is no file or folder {pattern!r}"
        if not files:
            raise FileNotFoundError(f"{reason}; give image files, folders or patterns such as 'photos/*.jpg'.")
        found.update((file.resolve(), file) for file in files if file.resolve() not in found)
    return list(found.values())


def read(
    path: str | Path | io.BytesIO, name: str | None = None, *, range: tuple[float, float] | None = None
) -> "Image":
    """Read the first frame of an image file as 8-bit RGB, rotated upright according to its EXIF data.

    Any mode is converted: grey, palette, CMYK, 16-bit grey (scaled, not clipped). Transparency becomes white.

    Args:
        path: the file, or an open one.
        name: its name in errors. Default: the path.
        range: (low, high) of the values in files of more than 8 bits, shown as black and white; values outside it are
            clipped. Default: 0..65535 for 16 bits; numbers of another kind need it.

    Raises:
        ImageError: no such file, not an image, damaged or truncated, too many pixels, or values of unknown range.
        ImportError: Pillow is not installed.

    Warns:
        UserWarning: a 16-bit file of which less than an eighth of the range is used, as by a 12-bit camera.

    Example:
        >>> read(samples()[0]).mode
        'RGB'
    """
    name = str(path) if name is None else name
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'mamba_attn[explain]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats()) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name}: refused, because it has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller first."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: this is not an image, or its format is not one that Pillow reads.") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name}: there is no such file.") from error
    except _DAMAGED as error:
        reason = str(error).strip().rstrip(".").partition("\n")[0][:150] or type(error).__name__
        raise ImageError(f"{name}: the image is damaged or incomplete ({reason}).") from error
    return _rgb(upright, name, range)


def crop(
    image: "Image",
    size: tuple[int, int],
    *,
    cover: tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    squash: bool = False,
) -> np.ndarray:
    """Scale the image until it just covers ``cover`` and crop the centre, in one antialiased interpolation.

    For square sizes: shorter side to ``cover``, then centre crop.

    Args:
        image: any size and mode.
        size: (rows, columns) in pixels.
        cover: (rows, columns) in pixels, at least ``size``. Default: ``size``.
        interpolation: "bilinear", "bicubic" or another of Pillow's.
        squash: scale each side to ``cover`` by itself, whatever the proportions.

    Returns:
        (rows, columns, 3) uint8: the image as the model sees it, before normalisation.

    Example:
        >>> crop(read(samples()[0]), (64, 96)).shape
        (64, 96, 3)
    """
    from PIL.Image import Resampling

    rows, columns = size
    height, width = (cover or size) if squash else covering((image.height, image.width), cover or size)
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    vertical, horizontal = image.height / height, image.width / width
    box = (left * horizontal, top * vertical, (left + columns) * horizontal, (top + rows) * vertical)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))  # rounding must not leave the image
    return np.asarray(image.convert("RGB").resize((columns, rows), Resampling[interpolation.upper()], box=box))


def covering(sides: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) to which an image is scaled to just cover a rectangle.

    Example:
        >>> covering((100, 200), (50, 50))
        (50, 100)
    """
    (rows, columns), (height, width) = sides, cover
    if height * columns >= width * rows:  # the limiting side keeps its exact length
        return height, max(width, columns * height // rows)
    return max(height, rows * width // columns), width


def fitting(sides: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) to which an image is scaled to just fit into a rectangle.

    Example:
        >>> fitting((100, 200), (50, 50))
        (25, 50)
    """
    scale = min(wanted / side for wanted, side in zip(room, sides, strict=True))
    return max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))


def pad(image: "Image", size: tuple[int, int], *, interpolation: str = "bilinear") -> np.ndarray:
    """Scale the image until it just fits into ``size``, centred on black; arguments and result as in ``crop``.

    Example:
        >>> pad(read(samples()[0]), (64, 96)).shape
        (64, 96, 3)
    """
    from PIL.Image import Resampling

    rows, columns = size
    height, width = fitting((image.height, image.width), size)
    top, left = -round((height - rows) / 2), -round((width - columns) / 2)
    shown = np.zeros((rows, columns, 3), np.uint8)
    inside = image.convert("RGB").resize((width, height), Resampling[interpolation.upper()])
    shown[top : top + height, left : left + width] = np.asarray(inside)
    return shown


def normalise(
    images: np.ndarray, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Float[Tensor, "batch colours rows columns"]:
    """Normalise uint8 images (batch, rows, columns, 3).

    Args:
        images: what models see, in RGB.
        mean: of each channel, in 0..1; one for grey images, which are the mean of the colours. Default: ImageNet's.
        std: standard deviation of each channel.

    Example:
        >>> normalise(np.zeros((1, 8, 8, 3), np.uint8), mean=[0.5] * 3, std=[0.5] * 3).unique()
        tensor([-1.])
    """
    pixels = torch.from_numpy(images.astype(np.float32) / 255).movedim(3, 1)
    pixels = pixels.mean(1, keepdim=True) if len(mean) == 1 else pixels
    shift, scale = (torch.tensor(tuple(values)).view(1, -1, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def _formats() -> list[str]:
    """Return Pillow's formats but those that another program is started for, or that are no pictures."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name not in ("EPS", "WMF", "MPEG", "HDF5", "BUFR", "GRIB")]


def _images(paths: Iterable[Path]) -> list[Path]:
    """Return files with the suffix of an image format, sorted by name."""
    from PIL import Image

    known = Image.registered_extensions()
    return sorted(path for path in paths if path.suffix.lower() in known and path.is_file())


def _below(folder: Path) -> list[Path]:
    """Return the images in the folders below a folder, without hidden ones."""
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        folder = folder / "val"
    hidden = (path for path in folder.rglob("*") if any(p.startswith(".") for p in path.relative_to(folder).parts))
    return _images(set(folder.rglob("*")) - set(hidden))


def _rgb(image: "Image", name: str, range: tuple[float, float] | None) -> "Image":
    """Convert any mode to 8-bit RGB, with transparency on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        low, high = _range_of(values, image.mode, name) if range is None else range
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        return Image.fromarray(np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        front = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front)
    return image.convert("RGB")


def _range_of(values: np.ndarray, mode: str, name: str) -> tuple[float, float]:
    """Return the range of a file of more than 8 bits, where its format tells it."""
    low, high = float(values.min()), float(values.max())
    if mode == "F" or low < 0 or high > _LARGEST:
        kind = "floating-point numbers" if mode == "F" else "integers"
        raise ImageError(
            f"{name}: its values are {kind} from {low:g} to {high:g}, and which of them is black and which is white is "
            f"not in the file; give range=({low:g}, {high:g}), or another."
        )
    if 0 < high < _LARGEST / 8:
        bits = 2 ** int(high).bit_length() - 1
        warnings.warn(
            f"{name}: its values end at {high:g} of {_LARGEST}, so the picture is almost black; if that is white, give "
            f"range=(0, {bits}).",
            stacklevel=2,
        )
    return 0, _LARGEST
