"""Tiny models with random weights, and tiny collections."""

import torch

from mamba_attn import models
from mamba_attn.analytics import Request
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets import open_data
from tests.datasets.cases import CLASSES, class_folders

__all__ = ["CLASSES", "class_folders", "folder_of", "request", "subject"]
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
    options = {"batch": 2, "interval": 0.0, **options}
    return Request(subject(name, seed, **(model_options or {})), open_data(selector), **options)
