"""Tiny models with random weights, and tiny collections."""

import numpy as np
import torch

from mamba_attn import models
from mamba_attn.analytics import AttentionStore, Request
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets import open_data
from tests.datasets.cases import CLASSES, class_folders

__all__ = ["CLASSES", "class_folders", "content", "folder_of", "request", "same", "subject"]
OPTIONS = {
    "vim_micro": {"image_size": (24, 40), "depth": 2, "embed_dim": 16, "d_state": 2, "num_classes": 3},
    "vmamba_micro": {"image_size": (24, 40), "depths": (1, 2), "dims": 8, "num_classes": 3},
    "vit_micro": {"image_size": (24, 40), "depth": 2, "embed_dim": 16, "num_classes": 3},
}


def subject(name="vim_micro", seed=0, **options):
    torch.manual_seed(seed)
    options = {**OPTIONS[name], **options}
    model = models.create(name, **options)
    return LoadedModel(
        model, models.transform(name, options["image_size"]), list(CLASSES), name=name, spec=name, options=options
    )


def folder_of(tmp_path, count=3, name="photos"):
    """Images of three classes, ``count`` of each; their selector."""
    return str(class_folders(tmp_path / name, count))


def request(selector, name="vim_micro", seed=0, model_options=None, **options):
    options = {"batch": 2, "part": 4, **options}  # seven images are two parts
    return Request(subject(name, seed, **(model_options or {})), open_data(selector), **options)


def content(folder):
    """Every number of a store, by name."""
    store = AttentionStore.open(folder)
    found = {"keys": np.array([image.key for image in store.images])}
    for layer in store.layers:
        for route in ("sum", *range(layer.routes)):
            found[f"{layer.name} mean {route}"] = store.mean(layer, route)
            found[f"{layer.name} variance {route}"] = store.variance(layer, route)
            for image in store.images[:3]:
                if image.kept:
                    found[f"{layer.name} {image.key} {route}"] = store.matrix(layer, image, route)
        found[f"{layer.name} moments"] = np.stack(store.state_moments(layer))
        found[f"{layer.name} features"] = store.features(layer)
    return found | {f"{image.key} pixels": store.pixels(image) for image in store.images}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
