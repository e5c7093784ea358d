"""From image files to a model's input: find, read anything Pillow reads, crop, normalise."""

import glob
import io
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.errors import MambaAttnError

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
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


class ImageError(MambaAttnError):
    """An image file that cannot be used: damaged, not an image, or too large."""


def samples() -> list[Path]:
    """Return the bundled CC0 images."""
    return sorted(SAMPLES.glob("*.jpg"))


def find(patterns: Iterable[str]) -> list[Path]:
    """Return the image files for names, folders and glob patterns, in order and without duplicates.

    A folder stands for the files directly in it with the suffix of an image format, sorted by name. ``**`` in a pattern
    descends into folders.

    Args:
        patterns: as a user writes them; a name that exists literally is not a pattern.

    Raises:
        FileNotFoundError: an entry yields no image; the message says which.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = _images(path.iterdir())
            reason = f"the folder {pattern!r} holds no images"
        elif path.exists():
            files, reason = [path], ""
        elif glob.has_magic(pattern):
            files = [path for path in map(Path, sorted(glob.glob(str(path), recursive=True))) if path.is_file()]
            reason = f"the pattern {pattern!r} matches no file"
        else:
            files, reason = [], f"there is no file or folder {pattern!r}"
        if not files:
            raise FileNotFoundError(f"{reason}; give image files, folders or patterns such as 'photos/*.jpg'.")
        found.update((file.resolve(), file) for file in files if file.resolve() not in found)
    return list(found.values())


def read(path: str | Path | io.BytesIO, name: str | None = None) -> "Image":
    """Read the first frame of an image file as 8-bit RGB, rotated upright according to its EXIF data.

    Any mode is converted: grey, palette, CMYK, 16-bit grey (scaled, not clipped). Transparency becomes white.

    Args:
        path: the file, or an open one.
        name: its name in errors. Default: the path.

    Raises:
        ImageError: no such file, not an image, damaged or truncated, too many pixels, or values of unknown range.
        ImportError: Pillow is not installed.
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
            with Image.open(path) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
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


def crop(
    image: "Image", size: tuple[int, int], *, cover: tuple[int, int] | None = None, interpolation: str = "bilinear"
) -> np.ndarray:
    """Scale the image until it just covers ``cover`` and crop the centre, in one antialiased interpolation.

    For square sizes: shorter side to ``cover``, then centre crop.

    Args:
        image: any size and mode.
        size: (rows, columns) in pixels.
        cover: (rows, columns) in pixels, at least ``size``. Default: ``size``.
        interpolation: "bilinear" or "bicubic".

    Returns:
        (rows, columns, 3) uint8: the image as the model sees it, before normalisation.
    """
    from PIL.Image import Resampling

    rows, columns = size
    height, width = cover or size
    if height * image.width >= width * image.height:  # the limiting side keeps its exact length
        width = max(width, image.width * height // image.height)
    else:
        height = max(height, image.height * width // image.width)
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    vertical, horizontal = image.height / height, image.width / width
    box = (left * horizontal, top * vertical, (left + columns) * horizontal, (top + rows) * vertical)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))  # rounding must not leave the image
    return np.asarray(image.convert("RGB").resize((columns, rows), Resampling[interpolation.upper()], box=box))


def normalise(images: np.ndarray) -> Float[Tensor, "batch 3 rows columns"]:
    """Normalise uint8 images (batch, rows, columns, 3) with ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(images.astype(np.float32) / 255).movedim(3, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def _images(paths: Iterable[Path]) -> list[Path]:
    """Return files with the suffix of an image format, sorted by name."""
    from PIL import Image

    known = Image.registered_extensions()
    return sorted(path for path in paths if path.suffix.lower() in known and path.is_file())


def _rgb(image: "Image") -> "Image":
    """Convert any mode to 8-bit RGB, with transparency on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {image.mode} has no known range of values; save it with 8 or 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        front = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front)
    return image.convert("RGB")
