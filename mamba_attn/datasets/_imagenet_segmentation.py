"""ImageNet-Segmentation (Guillaumin, Kuettel and Ferrari, IJCV 2014): gtsegs_ijcv.mat, a MATLAB v7.3 file, hence HDF5.

``/value/img`` and ``/value/gt`` are (images, 1) arrays of references: the first to an image (3, columns, rows), the
second to a (1, 1) array of references to a mask (columns, rows) of 0 and 1. MATLAB stores columns first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mamba_attn.datasets.regions import transformed_mask
from mamba_attn.datasets.samples import Data, Item, Regions
from mamba_attn.images import ImageError
from mamba_attn.models.transforms import EvaluationTransform

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageNetSegmentation(Data):
    """The images of gtsegs_ijcv.mat and their binary masks; there are no labels.

    Args:
        path: of the file.
        name: as people read it.

    Raises:
        ImportError: h5py is not installed.
        ValueError: not such a file.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        try:
            import h5py
        except ImportError as error:
            raise ImportError(f"open_data({name!r}): reading it needs h5py: pip install 'mamba_attn[hdf5]'") from error
        try:
            self._file = h5py.File(path, "r")
            count = len(self._file["value/img"])
            fits = len(self._file["value/gt"]) == count
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(
                f"open_data({name!r}): expected the MATLAB v7.3 file of ImageNet-Segmentation, with /value/img and "
                f"/value/gt ({error})."
            ) from error
        if not fits or count == 0:
            raise ValueError(
                f"open_data({name!r}): /value/img and /value/gt must be of the same length, and not empty."
            )
        items = [Item(f"{index:05d}", mask=f"{index:05d}") for index in range(count)]
        super().__init__(name, f"{Path(path).name}-{Path(path).stat().st_size}", items, truth="masks")

    def _picture(self, item: Item) -> "Image":
        from PIL import Image

        pixels = self._read(item.key, "img")
        if pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
            raise ImageError(f"{self.name}: {item.key}: expected an image (3, columns, rows), got {pixels.shape}.")
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(2, 1, 0).astype(np.uint8)))

    def _regions(self, item: Item, picture: "Image", transform: EvaluationTransform) -> Regions:
        from PIL import Image

        mask = self._read(item.key, "gt").T.astype(np.uint8)
        if mask.shape != (picture.height, picture.width):
            raise ImageError(f"{self.name}: {item.key}: its mask is {mask.shape}, the image {picture.size[::-1]}.")
        values = transformed_mask(Image.fromarray(np.ascontiguousarray(mask)), transform)
        return torch.from_numpy((values == 1).astype(np.float32)), None

    def _read(self, key: str, what: str) -> np.ndarray:
        """What a reference, or for masks a reference to one, leads to."""
        try:
            found: Any = self._file[self._file[f"value/{what}"][int(key), 0]]
            if what == "gt":
                found = self._file[found[0, 0]]
            return np.asarray(found)
        except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
            raise ImageError(f"{self.name}: {key}: /value/{what} is damaged there ({error}).") from error
