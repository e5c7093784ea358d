"""AttentionGradCAM against its formula, by hooks on the untouched model."""

import pytest
import torch

from mamba_attn.attribution import AttentionGradCAM
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import images, vmamba
from tests.attribution.vit.test_vit import MODELS, SIZE, build


def expected(model, image, tokens, target):
    seen = []
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.enable_grad():
        logits = model(image[None])
    handle.remove()
    attention.fused_attn = True
    (gradient,) = torch.autograd.grad(logits[0, target], seen)
    total = torch.zeros(15, dtype=image.dtype)
    heads = seen[0].shape[1]
    for head in range(heads):
        weight = torch.stack([gradient[0, head, token, -15:].mean() for token in tokens]).mean()
        row = torch.stack([seen[0][0, head, token, -15:] for token in tokens]).mean(0)
        total += weight * row.detach() / heads
    return total.clamp(min=0).view(1, 5, 3)


@pytest.mark.changes_model("attributes")
@pytest.mark.parametrize("name", MODELS)
def test_it_is_its_formula(name):
    model, tokens = build(name)
    x = images(3, SIZE)
    truth = torch.stack([expected(model, image, tokens, target) for image, target in zip(x, (1, 0, 4), strict=True)])
    assert float(truth.max()) > 0
    actual = AttentionGradCAM(model).attribute(x, [1, 0, 4], grid=True)
    torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-15)


def test_layers_and_queries():
    model, _ = build("class token")
    x = images(2, SIZE)
    last = AttentionGradCAM(model, layers=["blocks.2.attn"]).attribute(x, 1)
    torch.testing.assert_close(AttentionGradCAM(model).attribute(x, 1), last)
    first = AttentionGradCAM(model, layers=["blocks.0.attn"]).attribute(x, 1)
    both = AttentionGradCAM(model, layers=["blocks.[02].attn"]).attribute(x, 1)
    torch.testing.assert_close(both, (first + last) / 2)
    # in the last layer, the class token's row alone has a gradient
    assert AttentionGradCAM(model).attribute(x, 1, pixel=(3, 3)).abs().max() == 0
    assert AttentionGradCAM(model, layers=["blocks.1.attn"]).attribute(x, 1, pixel=(3, 3)).abs().max() > 0


def test_scans_are_refused():
    with pytest.raises(UnsupportedModelError, match="AttentionGradCAM is defined for softmax attention"):
        AttentionGradCAM(vmamba()).attribute(images(1))
