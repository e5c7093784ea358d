"""From a picture to a model's input, and back: size, crop, interpolation, mean and standard deviation, range of values.

A ``Transform`` says all of it in numbers, so that it can be stored, drawn and inverted. ``Transform.of`` reads those of
torchvision, timm and transformers, which need not be installed; any other function of a picture is kept as it is, and
its mean and standard deviation are measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mamba_attn import images
from mamba_attn._types import Float
from mamba_attn.images import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image

FITS = ("crop", "squash", "pad")
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_TO_INTEGERS, _TO_FLOATS = ("ToImage", "PILToTensor"), ("ToTensor", "ToDtype", "ConvertImageDtype")
_NO_CHANGE = (*_TO_INTEGERS, *_TO_FLOATS, "ToPureTensor", "RGB")
_TOLERANCE = 0.02  # of pixel values in 0..1: what rounding and interpolation may add outside


class Axis(NamedTuple):
    """One axis of a picture in the model's input: pixel x of the file lies at ``scale * x - cut``."""

    scale: float
    cut: int


@dataclass(frozen=True)
class Transform:
    """Scale, crop or squash or pad, normalise.

    Args:
        size: (rows, columns) of the model's input in pixels.
        cover: (rows, columns) that the scaled picture just covers before the centre is cut out; for square sizes: the
            length of its shorter side. Default: ``size``.
        interpolation: "bilinear", "bicubic" or another of Pillow's, antialiased.
        mean: of each channel, pixels in 0..1; one number for a model of grey images. Default: ImageNet's.
        std: standard deviation of each channel. Default: ImageNet's.
        fit: "crop" keeps the proportions and cuts the centre out; "squash" scales each side to ``cover`` by itself;
            "pad" shows the whole picture with black margins.
        range: (low, high) of the values in files of more than 8 bits, shown as black and white. Default: the format's.

    Raises:
        ValueError: an unknown ``fit``, sides below one pixel, a mean and a standard deviation of other lengths, a
            standard deviation of 0.

    Example:
        >>> transform = Transform((224, 224), cover=(256, 256), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> from mamba_attn.images import samples
        >>> transform(samples()[0]).shape
        torch.Size([3, 224, 224])
    """

    size: tuple[int, int]
    cover: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    fit: str = "crop"
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("size", "cover"):
            sides = self.size if getattr(self, name) is None else getattr(self, name)
            if len(sides) != 2 or min(sides) < 1:
                raise ValueError(f"Transform({name}={sides!r}): expected (rows, columns) in pixels, at least 1 each.")
            object.__setattr__(self, name, (int(sides[0]), int(sides[1])))
        for name in ("mean", "std"):
            values = getattr(self, name)
            spelt = (values,) if isinstance(values, int | float) else tuple(values)
            object.__setattr__(self, name, tuple(float(value) for value in spelt))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(map(abs, self.std)) == 0:
            raise ValueError(
                f"Transform(mean={self.mean}, std={self.std}): expected one number per channel, 1 or 3 of each, and no "
                "standard deviation of 0."
            )
        if self.fit not in FITS:
            raise ValueError(f"Transform(fit={self.fit!r}): expected one of {FITS}.")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range={self.range!r}: expected two numbers, the lower first.")

    def __call__(self, image: "Image | str | Path") -> Float[Tensor, "colours rows columns"]:
        """Return the model's input, without the batch axis.

        Args:
            image: a Pillow image, or the path of a file (see ``mamba_attn.images.read``).

        Raises:
            ImageError: a file that cannot be used.
            ImportError: Pillow is not installed.
        """
        return self.normalise(self.pixels(image)[None])[0]

    def pixels(self, image: "Image | str | Path | Tensor") -> np.ndarray:
        """Return what the model sees before normalisation: (rows, columns, 3) uint8.

        Args:
            image: a Pillow image or the path of a file; or the model's own input, (colours, rows, columns) or a batch
                of them, whose normalisation is undone: (..., rows, columns, 3).

        Raises:
            ImageError: a file that cannot be used.
            ValueError: a tensor without this transform's channels.
            ImportError: Pillow is not installed.
        """
        if isinstance(image, Tensor):
            return self._undone(image)
        return self._shown(images.read(image, range=self.range) if isinstance(image, str | Path) else image)

    def _shown(self, picture: "Image") -> np.ndarray:
        if self.fit == "pad":
            return images.pad(picture, self.size, interpolation=self.interpolation)
        squash = self.fit == "squash"
        return images.crop(picture, self.size, cover=self.cover, interpolation=self.interpolation, squash=squash)

    def normalise(self, pixels: np.ndarray) -> Float[Tensor, "batch colours rows columns"]:
        """Return the model's input of pictures (batch, rows, columns, 3) in uint8."""
        return images.normalise(pixels, self.mean, self.std)

    def blank(self) -> Float[Tensor, "1 colours rows columns"]:
        """Return zeros of the shape of one input."""
        return torch.zeros(1, len(self.mean), *self.size)

    def axes(self, rows: int, columns: int) -> tuple[Axis, Axis]:
        """Return where a picture's rows and columns lie in the model's input.

        Args:
            rows: of the picture.
            columns: of the picture.

        Raises:
            ValueError: the transform is a function, so this is not known.
        """
        sides, scaled = (rows, columns), cast(tuple[int, int], self.cover)
        if self.fit != "squash":
            scaled = images.fitting(sides, self.size) if self.fit == "pad" else images.covering(sides, scaled)
        first, second = (
            Axis(length / side, round((length - shown) / 2))  # whole pixels
            for length, side, shown in zip(scaled, sides, self.size, strict=True)
        )
        return first, second

    def shown_share(self, rows: int, columns: int) -> float:
        """Return the share of a picture's area that the model sees, in 0..1.

        Args:
            rows: of the picture.
            columns: of the picture.
        """
        share = 1.0
        for axis, side, length in zip(self.axes(rows, columns), (rows, columns), self.size, strict=True):
            share *= min(1.0, length / (axis.scale * side))
        return share

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in JSON's types; ``from_dict`` reads it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @staticmethod
    def from_dict(kept: Mapping[str, Any]) -> "Transform":
        """Return a transform from what ``as_dict`` returned, of this or an older version."""
        values: dict[str, Any] = {key: tuple(its) if isinstance(its, list) else its for key, its in kept.items()}
        return FunctionTransform(**values) if "function_name" in values else Transform(**values)

    @staticmethod
    def of(
        given: Any,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
    ) -> "Transform":
        """Read a transform, and replace what is given here.

        Args:
            given: a ``Transform``; torchvision's ``Compose`` of resizing, cropping and normalising, or a preset; timm's
                data configuration; an image processor of transformers; any other function of a Pillow image that
                returns (colours, rows, columns), always the same for the same image.
            mean: of each channel, pixels in 0..1. Default: as read or, of a function, measured.
            std: standard deviation of each channel.
            size: (rows, columns) of the model's input.

        Raises:
            TypeError: not a transform.
            ValueError: a function that is random, or returns another shape or range.
        """
        found = _read(given, mean, std)
        changes: dict[str, Any] = {
            name: None if told is None else _per_channel(told, len(found.mean))
            for name, told in (("mean", mean), ("std", std))
        }
        if size is not None and tuple(size) != found.size:
            if isinstance(found, FunctionTransform):
                raise ValueError(
                    f"size={tuple(size)}: the function {found.function_name} makes images of {found.size}."
                )
            cover = cast(tuple[int, int], found.cover)
            changes["size"] = size
            changes["cover"] = tuple(
                int(new * big / old) for new, big, old in zip(size, cover, found.size, strict=True)
            )
        return replace(found, **{name: value for name, value in changes.items() if value is not None})

    def _undone(self, batch: Tensor) -> np.ndarray:
        if batch.ndim not in (3, 4) or batch.shape[-3] != len(self.mean):
            raise ValueError(
                f"pixels(tensor of shape {tuple(batch.shape)}): expected {len(self.mean)} channels on the axis before "
                "rows and columns."
            )
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        values = (batch.detach().float().cpu() * std + mean).clamp(0, 1) * 255
        coloured = values.expand(*values.shape[:-3], 3, *values.shape[-2:])
        return coloured.round().to(torch.uint8).movedim(-3, -1).numpy()


@dataclass(frozen=True)
class FunctionTransform(Transform):
    """A function from a Pillow image to a model's input, with the mean and standard deviation that undo it.

    Args:
        function: None where it was read from a file, which cannot hold it.
        function_name: of it.
    """

    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    function_name: str = ""

    def _shown(self, picture: "Image") -> np.ndarray:
        if self.function is None:
            raise ValueError(
                f"this transform was the function {self.function_name!r}, which a store cannot hold: give it again as "
                "transform=."
            )
        found = _called(self.function, picture)
        if tuple(found.shape) != (len(self.mean), *self.size):
            raise ValueError(
                f"transform={self.function_name}: it returned {tuple(found.shape)} for a picture of {picture.height} x "
                f"{picture.width} pixels, and {(len(self.mean), *self.size)} before; expected one shape."
            )
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        _require_range(self.function_name, found * std + mean)
        return self._undone(found)

    def axes(self, rows: int, columns: int) -> tuple[Axis, Axis]:
        """Raise ValueError: where a function puts a picture is not known."""
        raise ValueError(
            f"transform={self.function_name}: where a function puts the pixels of a file is not known, so boxes and "
            "masks cannot be moved with them; give a Transform(size=...) instead."
        )

    def shown_share(self, rows: int, columns: int) -> float:
        """Return 1: what a function leaves out is not known."""
        return 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return all of it but the function."""
        return {**super().as_dict(), "function": None}


def _read(given: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> Transform:
    if isinstance(given, Transform):
        return given
    if isinstance(given, Mapping) and "input_size" in given:
        return _of_timm(given)
    if isinstance(getattr(given, "data_config", None), Mapping):  # transformers' wrapper of timm's models
        return _of_timm(given.data_config)
    if hasattr(given, "image_mean") and hasattr(given, "size"):
        return _of_processor(given)
    if all(hasattr(given, name) for name in ("crop_size", "resize_size", "mean", "std")):
        (crop,), (side,) = (tuple(_listed(each))[:1] for each in (given.crop_size, given.resize_size))
        interpolation = _interpolation(given.interpolation)
        return Transform((crop, crop), (side, side), interpolation, tuple(given.mean), tuple(given.std))
    if isinstance(getattr(given, "transforms", None), Sequence):
        found = _of_compose(given.transforms)
        if found is not None:
            return found
    if not callable(given):
        raise TypeError(
            f"transform={type(given).__name__}: expected a Transform, torchvision's Compose, timm's data config, "
            "an image processor of transformers, or a function from a Pillow image to (colours, rows, columns)."
        )
    return _measured(given, mean, std)


def _of_timm(config: Mapping[str, Any]) -> Transform:
    channels, rows, columns = (int(side) for side in config["input_size"])
    share = float(config.get("crop_pct") or 0.875)
    fit = {"squash": "squash", "border": "pad"}.get(str(config.get("crop_mode", "center")), "crop")
    cover = None if fit == "pad" else (int(rows / share), int(columns / share))
    interpolation = str(config.get("interpolation") or "bicubic")
    mean, std = (
        tuple(config.get(name) or default)[:channels]
        for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
    )
    return Transform((rows, columns), cover, "bilinear" if interpolation == "random" else interpolation, mean, std, fit)


def _of_processor(processor: Any) -> Transform:
    size, crop = _sides(processor.size), _sides(getattr(processor, "crop_size", None))
    cropped = bool(getattr(processor, "do_center_crop", False)) and crop is not None
    shorter = dict(processor.size).get("shortest_edge") if isinstance(processor.size, Mapping) else processor.size
    share = getattr(processor, "crop_pct", None)
    if size is None and shorter and share and shorter < 384:  # ConvNeXt's
        size, crop, cropped, shorter = None, (shorter, shorter), True, int(shorter / share)
    if size is None and not (shorter and (cropped or share)):
        raise ValueError(
            f"transform={type(processor).__name__}: its size {processor.size} gives images of different shapes; give "
            "a Transform(size=...) instead."
        )
    cover = (int(shorter or 0), int(shorter or 0)) if size is None else size
    scale = 255 * float(getattr(processor, "rescale_factor", 1 / 255) or 1 / 255)
    normalised = bool(getattr(processor, "do_normalize", True))
    mean = tuple(float(value) / scale for value in processor.image_mean) if normalised else (0.0,) * 3
    std = tuple(float(value) / scale for value in processor.image_std) if normalised else (1.0 / scale,) * 3
    interpolation = _interpolation(getattr(processor, "resample", 3))
    return Transform(
        crop if cropped and crop else cover, cover, interpolation, mean, std, "crop" if size is None else "squash"
    )


def _of_compose(parts: Sequence[Any]) -> Transform | None:
    """Return what torchvision's transforms do one after the other; None if one of them is not known."""
    resized: Any = None
    cut: Any = None
    in_floats = False
    fit, interpolation = "crop", "bilinear"
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    for part in parts:
        kind = type(part).__name__
        if kind == "Resize" and resized is None and cut is None and getattr(part, "max_size", None) is None:
            sides = _listed(part.size)
            resized, fit = (sides * 2)[:2], "squash" if len(sides) == 2 else "crop"
            interpolation = _interpolation(part.interpolation)
        elif kind == "CenterCrop" and cut is None:
            cut = (_listed(part.size) * 2)[:2]
        elif kind == "Normalize":
            mean, std = tuple(map(float, part.mean)), tuple(map(float, part.std))
        elif kind not in _NO_CHANGE or not getattr(part, "scale", True):
            return None
        in_floats |= kind in _TO_FLOATS
    if (
        not in_floats
        or resized is None
        or (cut is None and fit == "crop")
        or (cut is not None and any(c > r for c, r in zip(cut, resized, strict=True)))
    ):
        return None
    size = resized if cut is None else cut
    return Transform((size[0], size[1]), (resized[0], resized[1]), interpolation, mean, std, fit)


def _measured(function: Callable[..., Any], mean: Sequence[float] | None, std: Sequence[float] | None) -> Transform:
    """Find the size, mean and standard deviation of a function from what it makes of a few pictures."""
    from PIL import Image

    name = getattr(function, "__name__", type(function).__name__)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    black, white = (_called(function, Image.new("RGB", (400, 300), colour)) for colour in ("black", "white"))
    first, again, turned = (
        _called(function, picture) for picture in (noise, noise, noise.transpose(Image.Transpose.ROTATE_90))
    )
    if first.shape != turned.shape:
        raise ValueError(
            f"transform={name}: it returned {tuple(first.shape)} for a picture of 300 x 400 pixels and "
            f"{tuple(turned.shape)} for one of 400 x 300; expected one shape, e.g. by a centre crop at the end."
        )
    if first.ndim != 3 or first.shape[0] not in (1, 3):
        raise ValueError(
            f"transform={name}: it returned {tuple(first.shape)}; expected (colours, rows, columns), 1 or 3 colours."
        )
    if not torch.equal(first, again):
        raise ValueError(
            f"transform={name}: it is random: two calls differ for one picture; give the one for evaluation."
        )
    if mean is None or std is None:
        middle = (slice(None), first.shape[1] // 2, first.shape[2] // 2)  # a margin may be padded
        low, high = black[middle], white[middle]
        if bool((high - low).abs().min() < 1e-6):
            raise ValueError(
                f"transform={name}: black and white pictures come out alike, so its mean and standard deviation cannot "
                f"be measured; say them, as in Transform.of({name}, mean=0.5, std=0.5)."
            )
        std = tuple(float(value) for value in 1 / (high - low))
        mean = tuple(float(value) for value in -low / (high - low))
    undo = [torch.tensor(tuple(values)).view(-1, 1, 1) for values in (mean, std)]
    _require_range(name, first * undo[1] + undo[0])
    return FunctionTransform(
        (first.shape[1], first.shape[2]), mean=tuple(mean), std=tuple(std), function=function, function_name=name
    )


def _called(function: Callable[..., Any], picture: "Image") -> Tensor:
    found = function(picture)
    if not isinstance(found, Tensor):
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"transform={name}: it returned {type(found).__name__}; expected a tensor (colours, rows, columns)."
        )
    return found.detach().float().cpu()


def _require_range(name: str, pixels: Tensor) -> None:
    """Refuse pixels that, with the normalisation undone, are no colours."""
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(
            f"transform={name}: with its normalisation undone, pixels are {low:.2f} to {high:.2f} instead of 0 to 1; "
            "give the mean= and std= that it uses."
        )


def _per_channel(values: Sequence[float] | float, channels: int) -> tuple[float, ...]:
    """Return a number for each channel; one stands for all."""
    listed = (float(values),) if isinstance(values, int | float) else tuple(map(float, values))
    return listed * channels if len(listed) == 1 else listed


def _listed(sides: Any) -> list[int]:
    return [int(side) for side in sides] if isinstance(sides, Sequence) else [int(sides)]


def _sides(size: Any) -> tuple[int, int] | None:
    """Return (height, width) of a processor's entry that gives both."""
    if isinstance(size, int):
        return None
    found = dict(size) if isinstance(size, Mapping) else getattr(size, "__dict__", {}) or {}
    height, width = found.get("height"), found.get("width")
    return (int(height), int(width)) if height and width else None


def _interpolation(given: Any) -> str:
    """Return Pillow's name of an interpolation, in small letters."""
    value = getattr(given, "value", given)
    return _PILLOW.get(value, "bicubic") if isinstance(value, int) else str(value)
