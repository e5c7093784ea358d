"""transformers' image models, saved in a folder: their stores build them again, and features are no classes."""

import pytest
import torch

import mamba_attn
from mamba_attn.analytics import AttentionStore
from mamba_attn.datasets.data import open_data
from tests.datasets.cases import class_folders

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # fmt: skip


@pytest.mark.parametrize(("kind", "classes"), [("ForImageClassification", ["red", "green", "boat"]), ("Model", [])])
def test_a_store_builds_its_model_again(kind, classes, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8,
        id2label=dict(enumerate(["red", "green", "boat"])),
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"ViT{kind}")(config).save_pretrained(tmp_path / "net")
    found = mamba_attn.load(f"hf:{tmp_path / 'net'}", mean=(0.5,) * 3, std=(0.5,) * 3, size=(32, 32))
    photos = open_data(str(class_folders(tmp_path / "photos", 1, ["red", "green", "blue"])))
    mamba_attn.collect(found, photos, tmp_path / "store")
    store = AttentionStore.open(tmp_path / "store")  # without the model
    assert store.subject.fingerprint == found.fingerprint
    assert (found.classes, store.subject.classes) == (classes, classes)
    assert {image.label: image.correct for image in store.images}["blue"] is None  # no class of the model
    assert all((image.predicted is None) == (not classes) for image in store.images)
