"""Raw attention and rollout of timm's ViTs, against their formulas."""

from functools import partial

import pytest
import timm
import torch

from mamba_attn.attribution import AttentionRollout, MambaAttribution, RawAttention
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import _livelier, images

SIZE = (40, 24)
OPTIONS = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_classes": 5}
MODELS = {  # name, options, tokens of the default query
    "class token": ("vit_tiny_patch16_224", {}, [0]),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, [0, 1]),
    "pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 2}, range(3, 18)),
}


def build(name):
    architecture, options, tokens = MODELS[name]
    model = _livelier(timm.create_model(architecture, **OPTIONS, **options))
    return model, list(tokens)


def probabilities(model, inputs):
    """Heads averaged, of every layer, by hooks on the untouched model without fused kernels."""
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean(1)))
    with torch.no_grad():
        model(inputs)
    for block in model.blocks:
        block.attn.fused_attn = True
        block.attn.attn_drop._forward_pre_hooks.clear()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_raw_attention_is_the_mean_over_layers_of_the_heads_mean(name):
    model, tokens = build(name)
    x = images(2, SIZE)
    expected = torch.stack([layer[:, tokens].mean(1) for layer in probabilities(model, x)]).mean(0)[:, -15:]
    actual = RawAttention(model).attribute(x, grid=True)
    torch.testing.assert_close(actual, expected.view(2, 1, 5, 3), rtol=1e-9, atol=1e-12)
    last = RawAttention(model, layers=["blocks.2.attn"]).attribute(x, grid=True)
    expected = probabilities(model, x)[2][:, tokens].mean(1)[:, -15:]
    torch.testing.assert_close(last, expected.view(2, 1, 5, 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_the_product_of_attention_plus_identity(name, signed):
    model, tokens = build(name)
    x = images(2, SIZE)
    product = torch.eye(1, dtype=torch.float64)
    for layer in probabilities(model, x):
        step = torch.eye(layer.shape[-1], dtype=torch.float64) + layer
        product = (step if signed else step / 2) @ product if product.ndim > 2 else (step if signed else step / 2)
    expected = product[:, tokens].mean(1)
    if not signed:
        torch.testing.assert_close(expected.sum(1), torch.ones(2, dtype=torch.float64))
    actual = AttentionRollout(model, signed=signed).attribute(x, grid=True)
    torch.testing.assert_close(actual, expected[:, -15:].view(2, 1, 5, 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
def test_a_query_reads_its_patch(method):
    model, _ = build("class token")
    x = images(2, SIZE)
    default, patch = method(model).attribute(x), method(model).attribute(x, pixel=(20, 3))
    assert default.shape == (2, 1, *SIZE)
    assert not torch.allclose(default, patch)
    mean = torch.stack([layer[:, 1 + 2 * 3] for layer in probabilities(model, x)]).mean(0)[:, 1:]
    raw = RawAttention(model).attribute(x, pixel=(20, 3), grid=True)
    torch.testing.assert_close(raw, mean.view(2, 1, 5, 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        *(partial(MambaAttribution, rule=rule) for rule in ("gradient_x_attention", "paper", "published_code")),
        partial(MambaAttribution, rollout=False),
        *(
            partial(kind, convention=name)
            for kind in (MambaAttribution, RawAttention, AttentionRollout)
            for name in ("hidden_mamba", "implicit_unified")
        ),
    ],
)
def test_what_is_defined_for_scans_alone_is_refused(method):
    model, _ = build("class token")
    named = r"^\w+(\(\w+='\w+'\))? is defined for selective scans, and blocks\.0\.attn, .* are softmax attention"
    with pytest.raises(UnsupportedModelError, match=named):
        method(model).attribute(images(2, SIZE))


def test_vmambas_own_analysis_is_refused():
    with pytest.raises(ValueError, match="VMamba's own analysis map, and VisionTransformer is of the family timm ViT"):
        AttentionRollout(build("class token")[0], convention="vmamba_analysis").attribute(images(2, SIZE))
