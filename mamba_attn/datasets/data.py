"""Test images by a selector: ``DIR``, ``ZIP``, ``ZIP:PART`` or ``FILE.mat``."""

from pathlib import Path

from mamba_attn.datasets import _collections, _files
from mamba_attn.datasets._imagenet_segmentation import ImageNetSegmentation
from mamba_attn.datasets.samples import Data

_SELECTOR = "give a folder of images, ZIP, ZIP:PART or gtsegs_ijcv.mat"


def open_data(selector: str) -> Data:
    """Open a collection of test images; images are read when they are asked for.

    A folder, or zip, may hold

    - ``boxes.csv``: file, label, name, and boxes_xyxy..., a JSON list of [x0, y0, x1, y1] in pixels of the file;
    - ``labels.csv``: file, label, name, optionally mask, an 8-bit image of 1 (the object) and 2 (what resembles it),
      and imagenet1k_index;
    - ``segments.csv`` with images/ and segments/: masks of COCO's panoptic kind, whose things are the objects;
    - or images alone, in a folder per class or all in one place.

    Where files lie in train/ and val/, val is read unless the part names the other.

    Args:
        selector: ``photos``, ``imagenette128.zip``, ``localise.zip:digits64``, ``localise.zip:digits64/train`` or the
            file of ImageNet-Segmentation.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no such part, or not such a file.
        ImportError: a .mat file without h5py.
    """
    if not selector.strip():
        raise ValueError(f"open_data({selector!r}): {_SELECTOR}.")
    text, part = _split(selector)
    path = Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"open_data({selector!r}): there is no file or folder {text!r}; {_SELECTOR}.")
    name = path.name + (f":{part}" if part else "")
    if path.suffix.lower() == ".mat":
        if part:
            raise ValueError(f"open_data({selector!r}): a .mat file has no parts; {_SELECTOR}.")
        return ImageNetSegmentation(path, name)
    if path.is_dir():
        identity = f"{path.resolve()}:{part}"
        return _collections.collection(_files.Folder(str(path)), part, name, identity)
    if path.suffix.lower() != ".zip":
        raise ValueError(f"open_data({selector!r}): expected a folder, a .zip or a .mat file; {_SELECTOR}.")
    identity = f"{path.name}-{path.stat().st_size}:{part}"
    return _collections.collection(_files.Zip(str(path)), part, name, identity)


def _split(selector: str) -> tuple[str, str]:
    """The path, and the part after its last colon; a path that exists as it is written has none."""
    if Path(selector).expanduser().exists():
        return selector, ""
    path, colon, part = selector.rpartition(":")
    return (path, part.strip("/")) if colon and path else (selector, "")
