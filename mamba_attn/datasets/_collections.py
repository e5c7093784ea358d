"""The collections that folders and zips hold: with a table of boxes, labels or segments, or sorted by class."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mamba_attn.datasets._files import Files, pictures
from mamba_attn.datasets.regions import box_coverage, transformed_mask
from mamba_attn.datasets.samples import Data, Item, Regions
from mamba_attn.images import ImageError
from mamba_attn.models.transforms import EvaluationTransform

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val")
TABLES = ("boxes.csv", "segments.csv", "labels.csv")
_BOXES = "boxes_xyxy"  # the column's name begins so; the rest says in pixels of what
_THINGS = "the object is the union of all things (COCO's sense), whatever class is explained"


class FileData(Data):
    """Images that lie in a folder or a zip.

    Args:
        files: where they lie.
        base: what stands before every item's key and mask.
        args: of ``Data``.
        options: of ``Data``.
    """

    def __init__(self, files: Files, base: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._files, self._base = files, base

    def _picture(self, item: Item) -> "Image":
        return self._files.picture(self._base + item.key)

    def _regions(self, item: Item, picture: "Image", transform: EvaluationTransform) -> Regions:
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
        if (colours != colours[..., :1]).any():  # a palette's colours, say, are not its regions' numbers
            raise ImageError(f"{item.key}: its mask is in colours; expected 8-bit grey, the regions' numbers.")
        values = transformed_mask(mask, transform)
        return _where(values, item.values), _where(values, item.traps) if item.traps else None


def collection(files: Files, part: str, name: str, identity: str) -> Data:
    """Open the collection of a part.

    Args:
        files: a folder or zip.
        part: a folder in it, or a split of one, with slashes; "" for all of it.
        name: see ``Data``.
        identity: see ``Data``.

    Raises:
        ValueError: no such part, several to choose from, no images, a table that is none.
    """
    base = f"{part}/" if part else ""
    if part and not any(file.startswith(base) for file in files.names):
        raise ValueError(f"open_data({name!r}): there is no folder {part!r} in it. {_parts(files)}")
    folder, table = _table(files, part)
    if table is None:
        if any(file.startswith(base) and file.endswith(tuple(f"/{each}" for each in TABLES)) for file in files.names):
            raise ValueError(f"open_data({name!r}): it has several parts; name one. {_parts(files)}")
        return _sorted_by_class(files, base, name, identity)
    rows = _rows(files, folder + table)
    split = part.removeprefix(folder.rstrip("/")).strip("/")
    readers: dict[str, Callable[..., Data]] = {"boxes.csv": _boxed, "segments.csv": _segmented, "labels.csv": _labelled}
    try:
        data = readers[table](files, folder, rows, split, name, identity)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"open_data({name!r}): {folder}{table} is not such a table as was expected ({error!r})."
        ) from error
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
    return list(csv.DictReader(io.StringIO(files.text(name))))


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
        names[int(row["label"])] = row.get("name") or row["label"]
        if row.get("imagenet1k_index"):
            indices[int(row["label"])] = int(row["imagenet1k_index"])
    count = max(names, default=-1) + 1
    imagenet = [indices[label] for label in range(count)] if count and len(indices) == count else None
    return {"classes": [names.get(label, str(label)) for label in range(count)], "imagenet": imagenet}


def _boxed(files: Files, base: str, rows: list[dict[str, str]], split: str, name: str, identity: str) -> Data:
    rows = _of_split(rows, split)
    column = next((key for key in (rows[0] if rows else {}) if key.startswith(_BOXES)), _BOXES)
    items = [Item(row["file"], int(row["label"]), boxes=json.loads(row[column] or "[]")) for row in rows]
    return FileData(files, base, name, identity, items, truth="boxes", **_classes(rows))


def _labelled(files: Files, base: str, rows: list[dict[str, str]], split: str, name: str, identity: str) -> Data:
    chosen = _of_split(rows, split)
    masks = bool(chosen) and "mask" in chosen[0]
    traps = frozenset({2} if masks else ())
    items = [Item(row["file"], int(row["label"]), mask=row.get("mask") or None, traps=traps) for row in chosen]
    return FileData(files, base, name, identity, items, truth="masks" if masks else "", **_classes(rows))


def _segmented(files: Files, base: str, rows: list[dict[str, str]], split: str, name: str, identity: str) -> Data:
    """Images without labels; the object is the union of all segments of things."""
    things: dict[str, set[int]] = {}
    for row in rows:
        chosen = things.setdefault(row["id"], set())
        if row["is_thing"] == "1":
            chosen.add(int(row["segment_value"]))
    names = {PurePosixPath(file).stem: file.removeprefix(base) for file in pictures(files.names)
             if file.startswith(f"{base}images/")}  # fmt: skip
    items = [
        Item(names.get(id, f"images/{id}.jpg"), mask=f"segments/{id}.png", values=frozenset(values))
        for id, values in things.items()
    ]
    return FileData(files, base, name, identity, items, truth="masks", note=_THINGS)


def _sorted_by_class(files: Files, base: str, name: str, identity: str) -> Data:
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
    return FileData(files, base, name, identity, items, classes=classes)


def _check_boxes(item: Item) -> None:
    """Refuse what is no list of boxes; a table of thousands may hold one of those."""
    for box in item.boxes if isinstance(item.boxes, list) else [item.boxes]:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(each, int | float) for each in box)
        # NaN compares as false
        if not (numbers and -math.inf < box[0] < box[2] < math.inf and -math.inf < box[1] < box[3] < math.inf):
            raise ImageError(f"{item.key}: expected boxes [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {box!r}.")


def _where(values: np.ndarray, chosen: frozenset[int]) -> torch.Tensor:
    return torch.from_numpy(np.isin(values, sorted(chosen)).astype(np.float32))
