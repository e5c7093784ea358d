"""Tiny models with random weights as files, beside the collections of the tests of datasets."""

from tests.datasets.cases import CLASSES, boxes_zip, class_folders, digits_zip, encoded, picture, segments_zip
from tests.explanations.cases import VIM, VIT, save

__all__ = ["CLASSES", "MODELS", "boxes_zip", "class_folders", "digits_zip", "encoded", "picture", "segments_zip",
           "weights"]  # fmt: skip
MODELS = {"vim_micro": VIM, "vit_micro": VIT}


def weights(folder, names=MODELS, classes=CLASSES):
    """``NAME=FILE,...`` as --models takes it."""
    folder.mkdir(exist_ok=True)
    return ",".join(f"{name}={save(folder / name, name, MODELS[name], classes)}" for name in names)
