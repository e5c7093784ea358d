"""Images with the boxes of their objects, as a model sees them."""

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import normalise
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.samples import box_coverage

ARCHIVE = "localise.zip"
FOLDER = "imagenette_boxes224"
LARGEST = 0.5  # of the image: the boxes of the others leave a map little to miss


@dataclass(frozen=True)
class BoxedImages:
    """Images after a model's transform, and which part of every pixel lies in a box.

    Args:
        pixels: (images, rows, columns, 3) uint8.
        inside: (images, rows, columns) in 0..1: 1 in the union of the boxes, a fraction on its edges.
    """

    pixels: np.ndarray
    inside: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """All images in order, normalised: (batch, 3, rows, columns)."""
        for start in range(0, len(self), batch):
            yield normalise(torch.from_numpy(self.pixels[start : start + batch]).permute(0, 3, 1, 2).float() / 255)


def load(data: Path, transform: Transform, limit: int | None = None) -> BoxedImages:
    """Read the images whose boxes cover less than ``LARGEST``, in a fixed random order.

    Neighbours in that order are of different classes nine times of ten, so that one's map can be tried on the other.

    Args:
        data: folder with localise.zip.
        transform: of the model.
        limit: keep only this number of first images.

    Raises:
        FileNotFoundError: there is no such zip.
    """
    from PIL import Image

    path = data / ARCHIVE
    if not path.is_file():
        raise FileNotFoundError(f"--data {data}: expected {ARCHIVE} there.")
    pixels, inside = [], []
    with zipfile.ZipFile(path) as archive:
        table = io.TextIOWrapper(archive.open(f"{FOLDER}/boxes.csv"), encoding="utf-8")
        rows = [row for row in csv.DictReader(table) if float(row["box_union_fraction"]) < LARGEST]
        for index in np.random.default_rng(0).permutation(len(rows))[:limit]:
            image = Image.open(io.BytesIO(archive.read(f"{FOLDER}/{rows[index]['file']}")))
            pixels.append(transform.pixels(image))
            boxes = json.loads(rows[index]["boxes_xyxy_in_224"])
            inside.append(box_coverage(boxes, (image.height, image.width), transform))
    return BoxedImages(np.stack(pixels), torch.stack(inside))
