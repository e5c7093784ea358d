"""ViTs of transformers, given as objects: where their tokens stand is measured, class tokens and registers apart."""

from typing import Any

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn import TokenLayout
from mamba_attn.attribution import RawAttention

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # fmt: skip

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8,
    "image_size": 40, "num_labels": 3,
}  # fmt: skip
Places = tuple[int, ...]
MODELS: dict[str, tuple[str, str, dict[str, Any], Places, Places]] = {  # more of its config; class tokens, registers
    "eager": ("ViTForImageClassification", "ViTConfig", {"attn_implementation": "eager"}, (0,), ()),
    "sdpa": ("ViTForImageClassification", "ViTConfig", {"attn_implementation": "sdpa"}, (0,), ()),
    "distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}, (0, 1), ()),
    "registers": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {"num_register_tokens": 3},
        (0,), (1, 2, 3),
    ),
    "a class token of one axis": ("CLIPVisionModel", "CLIPVisionConfig", {}, (0,), ()),
    "BEiT": ("BeitForImageClassification", "BeitConfig", {}, (0,), ()),
    "patches alone": ("SiglipVisionModel", "SiglipVisionConfig", {"vision_use_head": False}, (), ()),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A small one, with weights that are far from uniform attention."""
    model, config, more, _, _ = MODELS[name]
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **more)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return built


@pytest.mark.parametrize("name", MODELS)
def test_where_the_tokens_stand(name: str) -> None:
    model, (*_, classes, registers) = build(name), MODELS[name]
    with torch.no_grad(), mamba_attn.trace(model) as record:
        model(torch.randn(2, 3, 40, 40))
    assert len(record.layers) == 2
    for layer in record.layers:
        layout = layer.layout
        assert (layout.grid, layout.class_tokens, layout.registers) == ((5, 5), classes, registers)
        assert layout.patch_sizes == layout.steps == (8, 8)
        assert layout.tokens == layer.tokens


def test_an_image_of_another_size() -> None:
    model = build("sdpa")
    with torch.no_grad(), mamba_attn.trace(model) as record:
        model(torch.randn(1, 3, 24, 56), interpolate_pos_encoding=True)
    assert record.layers[1].layout == TokenLayout((3, 7), (8, 8), (8, 8), class_tokens=(0,))


def test_the_class_token_is_what_is_read() -> None:
    model, x = build("registers"), torch.randn(1, 3, 40, 40)
    with torch.no_grad(), mamba_attn.trace(model) as record:
        model(x)
    rows = RawAttention(model).rows(x)
    for layer in record.layers:
        torch.testing.assert_close(rows[layer.name], layer.attention()[:, 0])


@pytest.mark.filterwarnings("ignore:.*its transform is not known:UserWarning")
@pytest.mark.parametrize("name", ["sdpa", "registers"])
def test_explain_takes_the_object(name: str) -> None:
    model = build(name)
    (found,) = mamba_attn.explain(model, torch.rand(1, 3, 40, 40))
    assert len(found.maps) == 4
    assert found.reader == "the class token"
    assert all(its.shape == (40, 40) and its.std() > 0 for its in found.maps.values())
