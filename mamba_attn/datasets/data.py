"""Opens test images by a selector: ``DIR``, ``ZIP``, ``ZIP:PART`` or ``FILE.mat``.

A folder or zip has a table of boxes, labels or segments, or images sorted by class. gtsegs_ijcv.mat is
ImageNet-Segmentation (Guillaumin, Kuettel and Ferrari, IJCV 2014), a MATLAB v7.3 file, hence HDF5.
"""

import csv
import hashlib
import io
import json
import lzma
import math
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mamba_attn import images
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.samples import Data, Item, Regions, box_coverage, transformed_mask
from mamba_attn.errors import local_path
from mamba_attn.images import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val")
TABLES = ("boxes.csv", "segments.csv", "labels.csv")
_BOXES = "boxes_xyxy"  # start of the column's name; the rest names the image whose pixels count
_THINGS = "the object is the union of all things (COCO's sense), whatever class is explained"
_LARGEST = 512 * 2**20  # bytes of one file: a zip of a megabyte can hold a gigabyte of zeros
_MOST_CLASSES = 100_000
_SELECTOR = "give a folder of images, ZIP, ZIP:PART or gtsegs_ijcv.mat"
# raised for a damaged or encrypted member of a zip
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)


def open_data(selector: str) -> Data:
    """Open a collection of test images; images are read on demand.

    A folder, or zip, may hold

    - ``boxes.csv``: file, label, name, and boxes_xyxy..., a JSON list of [x0, y0, x1, y1] in pixels of the file;
    - ``labels.csv``: file, label, name, optionally mask, an 8-bit image of 1 (the object) and 2 (what resembles it),
      and imagenet1k_index;
    - ``segments.csv`` with images/ and segments/: masks of COCO's panoptic kind, whose things are the objects;
    - or images alone, in a folder per class or all in one place.

    If files lie in train/ and val/, val is read unless the part names train.

    Args:
        selector: ``photos``, ``imagenette128.zip``, ``localise.zip:digits64``, ``localise.zip:digits64/train`` or the
            file of ImageNet-Segmentation.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no such part, or not a file of these kinds.
        ImportError: a .mat file without h5py.

    Example:
        >>> from mamba_attn.images import SAMPLES
        >>> len(open_data(str(SAMPLES)))  # a folder, a zip, ...
        6
    """
    if not selector.strip():
        raise ValueError(f"open_data({selector!r}): {_SELECTOR}.")
    text, part = _split(selector)
    path = local_path("data", text)
    if not path.exists():
        raise FileNotFoundError(f"open_data({selector!r}): no such file or folder {text!r}; {_SELECTOR}.")
    name = path.name + (f":{part}" if part else "")
    if path.suffix.lower() == ".mat":
        if part:
            raise ValueError(f"open_data({selector!r}): a .mat file has no parts; {_SELECTOR}.")
        return ImageNetSegmentation(path, name)
    if path.is_dir():
        return collection(Folder(str(path)), part, name)
    if path.suffix.lower() != ".zip":
        raise ValueError(f"open_data({selector!r}): expected a folder, a .zip or a .mat file; {_SELECTOR}.")
    return collection(Zip(str(path)), part, name)


def _split(selector: str) -> tuple[str, str]:
    """Split off the part after the last colon; a path that exists as written has no part."""
    if local_path("data", selector).exists():
        return selector, ""
    path, colon, part = selector.rpartition(":")
    return (path, part.strip("/")) if colon and path else (selector, "")


class Files(ABC):
    """A tree of files below a root; names are relative to it, with slashes."""

    def __init__(self, root: str) -> None:
        self.root = root

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all files, in order."""

    @abstractmethod
    def _bytes(self, name: str) -> bytes:
        """Return a file's contents; raise OSError or KeyError if absent."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file; -1 if it is absent."""

    def text(self, name: str) -> str:
        """Return a table's text.

        Raises:
            ValueError: it is not UTF-8, or damaged.
        """
        try:
            return self._bytes(name).decode("utf-8-sig")
        except _DAMAGED as error:
            raise ValueError(f"{self.root}: {name}: the zip is damaged at this file ({error}).") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.root}: {name} is not UTF-8 text.") from error

    def picture(self, name: str, range: tuple[float, float] | None = None) -> "Image":
        """Return an image, 8-bit RGB.

        Args:
            name: of the file.
            range: as in ``images.read``.

        Raises:
            ImageError: the file is absent or damaged.
        """
        where = f"{self.root}: {name}"
        try:
            content = self._bytes(name)
        except (OSError, KeyError) as error:
            raise images.ImageError(f"{where}: no such file.") from error
        except _DAMAGED as error:
            raise images.ImageError(f"{where}: the zip is damaged at this file ({error}).") from error
        return images.read(io.BytesIO(content), where, range=range)


class Folder(Files):
    """A folder; hidden files are left out."""

    @cached_property
    def names(self) -> list[str]:
        """Return the names of all files, in order."""
        root = Path(self.root)
        paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))

    def _bytes(self, name: str) -> bytes:
        path = Path(self.root) / name
        _require_size(name, path.stat().st_size)
        return path.read_bytes()

    def size(self, name: str) -> int:
        """Return the bytes of a file; see ``Files``."""
        try:
            return (Path(self.root) / name).stat().st_size
        except OSError:
            return -1


class Zip(Files):
    """A zip file.

    Raises:
        ValueError: the file is not a zip.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._archive  # noqa: B018  # refuse at once what is no zip

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    @property
    def _archive(self) -> zipfile.ZipFile:
        """The open file, each process its own: after a fork two would move one position."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.root)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(
                    f"open_data({self.root!r}): this is not a zip file, or a damaged one ({error})."
                ) from error
        return self._opened[1]

    @cached_property
    def names(self) -> list[str]:
        """Return the names of all files, in order."""
        return sorted(name for name in self._archive.namelist() if not name.endswith("/"))

    def _bytes(self, name: str) -> bytes:
        _require_size(name, self._archive.getinfo(name).file_size)  # a member cannot unpack to more than it says
        return self._archive.read(name)

    def size(self, name: str) -> int:
        """Return the bytes of a file; see ``Files``."""
        try:
            return self._archive.getinfo(name).file_size
        except KeyError:
            return -1


def _require_size(name: str, size: int) -> None:
    if size > _LARGEST:
        raise ImageError(f"{name}: {size / 1e6:,.0f} MB in one file, more than the {_LARGEST / 1e6:,.0f} MB allowed.")


def pictures(names: Iterable[str]) -> list[str]:
    """Return the names with the suffix of an image format."""
    from PIL import Image

    known = Image.registered_extensions()
    return [name for name in names if PurePosixPath(name).suffix.lower() in known]


class FileData(Data):
    """Images that lie in a folder or a zip.

    Args:
        files: where they lie.
        base: prefix of every item's key and mask.
        args: of ``Data``.
        options: of ``Data``.
    """

    def __init__(self, files: Files, base: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._files, self._base, self.in_files = files, base, True
        self.path = str(Path(files.root).resolve() / base) if isinstance(files, Folder) else ""

    @cached_property
    def identity(self) -> str:
        """Hash of the images' names and sizes: the same folder under two mounts is the same images."""
        digest = hashlib.sha256()
        for key in sorted({item.key for item in self.items}):
            digest.update(f"{self._identity_of(key)}\n".encode())
        return f"sha256:{digest.hexdigest()}"

    def identity_of(self, index: int) -> str:
        """Return the name and size of an image: other images may come and go."""
        return self._identity_of(self.items[index].key)

    def _identity_of(self, key: str) -> str:
        return f"{key}\0{self._files.size(self._base + key)}"

    def _picture(self, item: Item, range: tuple[float, float] | None) -> "Image":
        return self._files.picture(self._base + item.key, range)

    def _regions(self, item: Item, picture: "Image", transform: Transform) -> Regions:
        if item.boxes is not None:
            size = (picture.height, picture.width)
            _check_boxes(item)
            return (box_coverage(item.boxes, size, transform) if item.boxes else None), None
        if item.mask is None:
            return None, None
        mask = self._files.picture(self._base + item.mask)
        if mask.size != picture.size:
            raise ImageError(f"{item.key}: its mask has {mask.size} pixels, the image {picture.size}.")
        colours = np.asarray(mask)
        if (colours != colours[..., :1]).any():  # e.g. a palette: its colours are not region numbers
            raise ImageError(f"{item.key}: its mask has colours; expected 8-bit grey with the regions' numbers.")
        values = transformed_mask(mask, transform)
        return _where(values, item.values), _where(values, item.distractors) if item.distractors else None


def collection(files: Files, part: str, name: str) -> Data:
    """Open the collection of a part.

    Args:
        files: a folder or zip.
        part: a folder in it, or a split of one, with slashes; "" for all of it.
        name: see ``Data``.

    Raises:
        ValueError: no such part, several to choose from, no images, an invalid table.
    """
    base = f"{part}/" if part else ""
    if part and not any(file.startswith(base) for file in files.names):
        raise ValueError(f"open_data({name!r}): it has no folder {part!r}. {_parts(files)}")
    folder, table = _table(files, part)
    if table is None:
        if any(file.startswith(base) and file.endswith(tuple(f"/{each}" for each in TABLES)) for file in files.names):
            raise ValueError(f"open_data({name!r}): it has several parts; choose one. {_parts(files)}")
        return _sorted_by_class(files, base, name)
    rows = _rows(files, folder + table)
    split = part.removeprefix(folder.rstrip("/")).strip("/")
    readers: dict[str, Callable[..., Data]] = {"boxes.csv": _boxed, "segments.csv": _segmented, "labels.csv": _labelled}
    try:
        data = readers[table](files, folder, rows, split, name)
    except KeyError as error:
        raise ValueError(f"open_data({name!r}): {folder}{table} is not a valid table: no column {error}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"open_data({name!r}): {folder}{table} is not a valid table ({error}).") from error
    if not len(data):
        raise ValueError(f"open_data({name!r}): it holds no images.")
    return data


def _table(files: Files, part: str) -> tuple[str, str | None]:
    """The nearest folder, upwards, with a table, and the table's name."""
    there = set(files.names)
    places = [part, *map(str, PurePosixPath(part).parents)] if part else [""]
    for place in places:
        folder = "" if place in ("", ".") else f"{place}/"
        for table in TABLES:
            if folder + table in there:
                return folder, table
    return "", None


def _parts(files: Files) -> str:
    found = {file.rpartition("/")[0] for file in files.names if file.rpartition("/")[2] in TABLES}
    found = found - {""} or {file.partition("/")[0] for file in files.names if "/" in file}
    shown = ", ".join(sorted(found)[:12])
    return f"Its parts: {shown or 'none'}."


def _rows(files: Files, name: str) -> list[dict[str, str]]:
    try:
        lines = [line for line in csv.reader(io.StringIO(files.text(name))) if line]
    except csv.Error as error:
        raise ValueError(f"{files.root}: {name} is not a table that can be read ({error}).") from error
    header = lines[0] if lines else []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            wanted = f"{len(header)} cells as in its first line, {','.join(header):.60}"
            raise ValueError(f"{files.root}: {name}, line {number}: expected {wanted}; it has {len(line)}.")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _of_split(rows: Sequence[dict[str, str]], split: str) -> list[dict[str, str]]:
    """The rows of a split; without one, those of "val" where the files are split so."""
    if not split and {row["file"].partition("/")[0] for row in rows} >= set(SPLITS):
        split = "val"
    return [row for row in rows if not split or row["file"].startswith(f"{split}/")]


def _classes(rows: Iterable[dict[str, str]]) -> dict[str, Any]:
    """Names by label, and ImageNet's index where every class has one."""
    names: dict[int, str] = {}
    indices: dict[int, int] = {}
    for row in rows:
        if int(row["label"]) < 0:
            raise ValueError(f"label {row['label']} of {row['file']} is below 0")
        if int(row["label"]) >= _MOST_CLASSES:
            raise ValueError(f"label {row['label']} of {row['file']}: expected numbers of classes, from 0 on")
        names[int(row["label"])] = row.get("name") or row["label"]
        if row.get("imagenet1k_index"):
            indices[int(row["label"])] = int(row["imagenet1k_index"])
    count = max(names, default=-1) + 1
    imagenet = [indices[label] for label in range(count)] if count and len(indices) == count else None
    return {"classes": [names.get(label, str(label)) for label in range(count)], "imagenet": imagenet}


def _boxed(files: Files, base: str, rows: list[dict[str, str]], split: str, name: str) -> Data:
    rows = _of_split(rows, split)
    column = next((key for key in (rows[0] if rows else {}) if key.startswith(_BOXES)), _BOXES)
    items = [Item(row["file"], int(row["label"]), boxes=json.loads(row[column] or "[]")) for row in rows]
    return FileData(files, base, name, "", items, truth="boxes", **_classes(rows))


def _labelled(files: Files, base: str, rows: list[dict[str, str]], split: str, name: str) -> Data:
    chosen = _of_split(rows, split)
    masks = bool(chosen) and "mask" in chosen[0]
    distractors = frozenset({2} if masks else ())
    items = [
        Item(row["file"], int(row["label"]), mask=row.get("mask") or None, distractors=distractors) for row in chosen
    ]
    return FileData(files, base, name, "", items, truth="masks" if masks else "", **_classes(rows))


def _segmented(files: Files, base: str, rows: list[dict[str, str]], split: str, name: str) -> Data:
    """Images without labels; the object is the union of all segments of things."""
    things: dict[str, set[int]] = {}
    for row in rows:
        chosen = things.setdefault(row["id"], set())
        if row["is_thing"] == "1":
            chosen.add(int(row["segment_value"]))
    names = {
        PurePosixPath(file).stem: file.removeprefix(base)
        for file in pictures(files.names)
        if file.startswith(f"{base}images/")
    }
    items = [
        Item(names.get(id, f"images/{id}.jpg"), mask=f"segments/{id}.png", values=frozenset(values))
        for id, values in things.items()
    ]
    return FileData(files, base, name, "", items, truth="masks", note=_THINGS)


def _sorted_by_class(files: Files, base: str, name: str) -> Data:
    """Images in class folders, or all in one place; "val" of a tree that is split."""
    if not any(file.startswith(f"{base}train/") for file in files.names):
        split = ""
    else:
        split = "val/" if any(file.startswith(f"{base}val/") for file in files.names) else ""
    names = [file.removeprefix(base) for file in pictures(files.names) if file.startswith(base + split)]
    if not names:
        raise ValueError(f"open_data({name!r}): it holds no images.")
    folders = {file: file.removeprefix(split).partition("/") for file in names}
    classes = sorted({first for first, _, rest in folders.values() if rest})
    labels = {each: index for index, each in enumerate(classes)}
    items = [Item(file, labels[first] if rest else None) for file, (first, _, rest) in folders.items()]
    return FileData(files, base, name, "", items, classes=classes)


def _check_boxes(item: Item) -> None:
    """Refuse what is no list of boxes; a table of thousands may hold one of those."""
    for box in item.boxes if isinstance(item.boxes, list) else [item.boxes]:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(each, int | float) for each in box)
        # NaN compares as false
        if not (numbers and -math.inf < box[0] < box[2] < math.inf and -math.inf < box[1] < box[3] < math.inf):
            raise ImageError(f"{item.key}: expected boxes [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {box!r}.")


def _where(values: np.ndarray, chosen: frozenset[int]) -> torch.Tensor:
    return torch.from_numpy(np.isin(values, sorted(chosen)).astype(np.float32))


class ImageNetSegmentation(Data):
    """The images of gtsegs_ijcv.mat and their binary masks; there are no labels.

    ``/value/img`` and ``/value/gt`` are (images, 1) arrays of references: the first to an image (3, columns, rows), the
    second to a (1, 1) array of references to a mask (columns, rows) of 0 and 1. MATLAB stores columns first.

    Args:
        path: of the file.
        name: to display.

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

    def _picture(self, item: Item, range: tuple[float, float] | None) -> "Image":
        from PIL import Image

        pixels = self._read(item.key, "img")
        if pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
            raise ImageError(f"{self.name}: {item.key}: expected an image (3, columns, rows), got {pixels.shape}.")
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(2, 1, 0).astype(np.uint8)))

    def _regions(self, item: Item, picture: "Image", transform: Transform) -> Regions:
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
