"""Tiny collections of every kind."""

import csv
import io
import json
import zipfile

import numpy as np
from PIL import Image

CLASSES = ["red", "green", "blue"]


def picture(seed, rows=40, columns=32):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def table(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def boxes_zip(path, count=6, part="boxes"):
    """Images with boxes, of three classes; the last image has none."""
    rows = []
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(count):
            name = f"images/{index}.png"
            archive.writestr(f"{part}/{name}", encoded(picture(index)))
            found = [[4, 8, 20, 24]] if index < count - 1 else []
            rows.append({"file": name, "label": index % 3, "name": CLASSES[index % 3],
                         "boxes_xyxy_in_32": json.dumps(found)})  # fmt: skip
        archive.writestr(f"{part}/boxes.csv", table(rows))
    return path


def digits_zip(path, count=4, part="digits"):
    """A square that is the object and one that is the distractor, in train/ and val/."""
    rows = []
    mask = np.zeros((40, 32), np.uint8)
    mask[8:16, 4:12], mask[24:32, 20:28] = 1, 2
    with zipfile.ZipFile(path, "a") as archive:
        for split in ("train", "val"):
            for index in range(count):
                stem = f"{split}/{index}"
                archive.writestr(f"{part}/{stem}.jpg", encoded(picture(index), "JPEG"))
                archive.writestr(f"{part}/{stem}.png", encoded(mask))
                rows.append({"file": f"{stem}.jpg", "mask": f"{stem}.png", "label": index % 3})
        archive.writestr(f"{part}/labels.csv", table(rows))
    return path


def segments_zip(path, part="masks"):
    """A thing and some stuff; the second image has no thing."""
    mask = np.zeros((40, 32), np.uint8)
    mask[:10], mask[10:20, :16] = 5, 3
    rows = []
    with zipfile.ZipFile(path, "a") as archive:
        for id, thing in (("a", 1), ("b", 0)):
            archive.writestr(f"{part}/images/{id}.jpg", encoded(picture(1), "JPEG"))
            archive.writestr(f"{part}/segments/{id}.png", encoded(mask))
            rows += [{"id": id, "segment_value": 5, "is_thing": 0}, {"id": id, "segment_value": 3, "is_thing": thing}]
        archive.writestr(f"{part}/segments.csv", table(rows))
    return path


def class_folders(folder, count=3, classes=CLASSES):
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.png").write_bytes(encoded(picture(10 * place + index)))
    return folder
