"""Small data sets in the form that the trainer reads."""

import io
import zipfile

import numpy as np
from PIL import Image


def jpeg(array):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "JPEG")
    return data.getvalue()


def write_zip(path, classes, train_count, val_count, size):
    """A data set whose labels can be learnt from the colour."""
    random = np.random.default_rng(len(classes))
    rows = ["file,label,name"]
    with zipfile.ZipFile(path, "w") as archive:
        for label, name in enumerate(classes):
            for index in range(train_count + val_count):
                file = f"{'train' if index < train_count else 'val'}/{name}/{index}.jpg"
                array = random.integers(0, 40, (*size, 3)).astype(np.uint8) + np.uint8(60 * (label + 1))
                archive.writestr(file, jpeg(array))
                rows.append(f"{file},{label},{name}")
        archive.writestr("labels.csv", "\n".join(rows))
