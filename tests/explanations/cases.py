"""Small models with random weights as files, and images, for the command."""

import json
import shutil

import torch
from safetensors.torch import save_file

from mamba_attn import images, models

CLASSES = ["dress", "hat", "[red]not markup[/red]"]
VIM = {"image_size": 32, "depth": 2, "embed_dim": 16, "d_state": 2, "num_classes": 3}
VMAMBA = {"image_size": [64, 32], "depths": [1, 1, 1], "dims": 16, "num_classes": 3}
VIT = {"image_size": 32, "depth": 3, "embed_dim": 32, "num_classes": 3}


def save(folder, name, options, classes=CLASSES):
    """Random weights and their card; the path of the weights."""
    torch.manual_seed(0)
    model = models.create(name, **options)
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "w.safetensors")
    (folder / "w.json").write_text(json.dumps({"options": options, "classes": classes}))
    return str(folder / "w.safetensors")


def photo(folder, name="a.jpg", which=0):
    """A copy of an image of the package."""
    folder.mkdir(exist_ok=True)
    return shutil.copyfile(images.samples()[which], folder / name)
