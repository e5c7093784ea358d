"""The training images: zips decoded once to uint8, random crops made per batch, the evaluation transform."""

import csv
import io
import json
import os
import random
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in PIL's convert("L")


@dataclass(frozen=True)
class Collection:
    """Data sets that are trained on together, and how their images are varied.

    Args:
        sets: names of the zips, each with labels.csv at its top or in "zip:folder".
        scale: smallest and largest share of the image that a random crop keeps.
        ratio: smallest and largest ratio of its sides.
        flip: whether images are mirrored.
    """

    sets: tuple[str, ...]
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    @property
    def augmentation(self) -> str:
        """Description of the augmentation for the card."""
        ratio = "" if self.ratio == (3 / 4, 4 / 3) else f" (ratio {self.ratio[0]:g} to {self.ratio[1]:g})"
        flip = ", flip" if self.flip else ""
        return f"random resized crop {self.scale[0]:g}-{self.scale[1]:g}{ratio}{flip}, colour jitter 0.2"


COLLECTIONS = {
    "objects": Collection(("imagenette128", "clothing128")),
    # a mirrored digit is another one, and a small crop may hold the distractor alone
    "digits": Collection(("localise:digits64",), (0.8, 1.0), (0.9, 1.1), flip=False),
}


@dataclass(frozen=True)
class Images:
    """Decoded images of one split, each a uint8 (height, width, 3) view into a memory-mapped buffer.

    Args:
        buffers: one flat uint8 array per data set.
        table: (images, 5) int64: data set, offset into its buffer, height, width, label.
        classes: names of the labels, over all data sets.
        collection: what they are part of.
    """

    buffers: list[np.ndarray]
    table: np.ndarray
    classes: list[str]
    collection: Collection = COLLECTIONS["objects"]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> Tensor:
        """(images,) joint label of every image."""
        return torch.from_numpy(self.table[:, 4].copy())

    def image(self, index: int) -> Tensor:
        """One image, uint8 (1, 3, height, width), channels last in memory, not copied."""
        which, offset, height, width, _ = self.table[index]
        flat = self.buffers[which][offset : offset + height * width * 3]
        return torch.from_numpy(flat.reshape(1, height, width, 3)).permute(0, 3, 1, 2)


def load(data: Path, cache: Path, split: str, limit: int | None = None, collection: str = "objects") -> Images:
    """Open a split of all data sets of a collection; labels of the second set follow those of the first.

    Args:
        data: folder with the collection's zips.
        cache: folder for the decoded arrays (about 0.8 GB), written once.
        split: "train" or "val".
        limit: keep this many images, spread evenly over the split.
        collection: a key of COLLECTIONS.

    Raises:
        FileNotFoundError: a zip is missing.
    """
    buffers, tables, classes = [], [], []
    for which, name in enumerate(COLLECTIONS[collection].sets):
        stem = _decode(data, name, cache)
        meta = json.loads(stem.with_suffix(".json").read_text())
        buffers.append(np.load(stem.with_suffix(".npy"), mmap_mode="c"))  # "c": torch warns about read-only arrays
        rows = np.array([row[1:] for row in meta["images"] if row[0] == split], dtype=np.int64).reshape(-1, 4)
        rows[:, 3] += len(classes)
        tables.append(np.column_stack([np.full(len(rows), which), rows]))
        classes += meta["classes"]
    table = np.concatenate(tables)
    if limit is not None and limit < len(table):
        table = table[np.linspace(0, len(table) - 1, limit).astype(int)]
    return Images(buffers, table, classes, COLLECTIONS[collection])


def _decode(data: Path, name: str, cache: Path) -> Path:
    """Decode a set into <cache>/<name>-<bytes>.npy and .json unless they are there; return that path without suffix."""
    from PIL import Image

    archive_name, _, folder = name.partition(":")
    path = data / f"{archive_name}.zip"
    if not path.is_file():
        raise FileNotFoundError(f"--data {data}: expected {path.name} there.")
    inside = f"{folder}/" if folder else ""
    stem = cache / f"{folder or archive_name}-{path.stat().st_size}"
    if stem.with_suffix(".json").is_file():
        return stem
    cache.mkdir(parents=True, exist_ok=True)
    arrays, entries, names, offset = [], [], {}, 0
    with zipfile.ZipFile(path) as archive:
        for row in csv.DictReader(io.TextIOWrapper(archive.open(f"{inside}labels.csv"), encoding="utf-8")):
            array = np.asarray(Image.open(io.BytesIO(archive.read(inside + row["file"]))).convert("RGB"))
            arrays.append(array.reshape(-1))
            names[int(row["label"])] = row.get("name", row["label"])
            entries.append((row["file"].split("/")[0], offset, *array.shape[:2], int(row["label"])))
            offset += array.size
    partial = cache / f".{stem.name}-{os.getpid()}.npy"  # two trainings may start at once
    np.save(partial, np.concatenate(arrays))
    partial.with_suffix(".json").write_text(
        json.dumps({"classes": [names[label] for label in sorted(names)], "images": entries})
    )
    for suffix in (".npy", ".json"):  # .json last: it says that the array is complete
        os.replace(partial.with_suffix(suffix), stem.with_suffix(suffix))
    return stem


def chosen(images: Images, batch: int, seed: int, epoch: int, step: int, balance: float = 0.0) -> np.ndarray:
    """(batch,) indices of the images of a step; the last, incomplete batch of an epoch is dropped.

    Args:
        images: of the collection.
        batch: images per step.
        seed: of the order.
        epoch: of the order.
        step: within the epoch.
        balance: images of a class of n come in proportion to n ** -balance: 0 shows each once per epoch, 1 shows all
            classes equally often, the images of large ones not in every epoch.
    """
    drawn = np.random.default_rng((seed, epoch))
    order = drawn.permutation(len(images))
    if balance:
        classes = images.table[:, 4]
        weights = np.bincount(classes)[classes].astype(float) ** -balance
        ends = np.cumsum(weights[order]) * (len(images) / weights.sum())
        times = np.diff(np.floor(ends + drawn.random()), prepend=0).astype(int)  # as often as its weight, within one
        order = drawn.permutation(np.repeat(order, times))[: len(images)]
        order = np.concatenate([order, order[: len(images) - len(order)]])
    return order[step * batch : (step + 1) * batch]


def rectangle(images: Images, index: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image, by timm's RandomResizedCropAndInterpolation."""
    varied = images.collection
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(
        images.image(index), varied.scale, varied.ratio
    )
    return top, left, height, width


def cut(images: Images, index: int, rectangle: Sequence[int]) -> Tensor:
    """Cut a rectangle out of an image: uint8 (1, 3, height, width), not copied."""
    top, left, height, width = rectangle
    return images.image(index)[..., top : top + height, left : left + width]


def train_batch(
    images: Images, pixels: int, indices: np.ndarray, seed: int, epoch: int, step: int, crops: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """One augmented batch: (batch, 3, pixels, pixels) normalised images and (batch,) labels.

    Augmentation depends on (seed, epoch, step) alone, as ``chosen`` does, so that a resumed run sees the same batches.

    timm's recipe on uint8 tensors, since the images are kept decoded: random crops (the collection's scale and ratio)
    or those given, (batch, 4) rectangles; antialiased bilinear resize, horizontal flip with probability 1/2 where the
    collection has it; brightness, contrast and saturation jittered by up to 0.2, always in this order (timm shuffles
    it).
    """
    random.seed(f"{seed} {epoch} {step}")  # timm draws from the global generator
    resized = []
    for place, index in enumerate(indices):
        crop = cut(images, index, rectangle(images, index) if crops is None else crops[place])
        crop = F.interpolate(crop, size=(pixels, pixels), mode="bilinear", antialias=True)
        resized.append(crop.flip(-1) if random.random() < 0.5 and images.collection.flip else crop)
    factors = np.random.default_rng((seed, epoch, step, 1)).uniform(0.8, 1.2, (3, len(indices), 1, 1, 1))
    return normalise(_jitter(_to_float(torch.cat(resized)), torch.from_numpy(factors).float())), images.labels[indices]


def _to_float(x: Tensor) -> Tensor:
    """Unsigned bytes, channels last, to numbers in [0, 1], channels first (three channels broadcast slowly if last)."""
    return x.contiguous().float().div_(255)


def _jitter(x: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation by one factor per image, in place; values stay in [0, 1]."""
    brightness, contrast, saturation = factors
    x.mul_(brightness).clamp_(0, 1)
    mean = _grey(x).mean((2, 3), keepdim=True)
    x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    grey = _grey(x)
    return x.mul_(saturation).add_(grey * (1 - saturation)).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    """(batch, 1, height, width) luminance."""
    red, green, blue = x.split(1, dim=1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2]


def normalise(x: Tensor) -> Tensor:
    """Images in [0, 1] to ImageNet's mean 0 and standard deviation 1."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)
    return (x - mean) / std


def evaluation_batches(images: Images, pixels: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order: shorter side resized to ``pixels`` (antialiased bilinear), centre crop, normalised."""
    for start in range(0, len(images), batch):
        chosen = range(start, min(start + batch, len(images)))
        crops = torch.cat([centre(images.image(index), pixels) for index in chosen])
        yield normalise(_to_float(crops)), images.labels[start : start + batch]


def centre(image: Tensor, pixels: int) -> Tensor:
    """Return the square of an image that evaluation shows: shorter side resized to ``pixels``, middle cut out."""
    height, width = image.shape[-2:]
    short = min(height, width)
    size = (height * pixels // short, width * pixels // short)
    if size != (height, width):
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    top, left = round((size[0] - pixels) / 2), round((size[1] - pixels) / 2)
    return image[..., top : top + pixels, left : left + pixels]
