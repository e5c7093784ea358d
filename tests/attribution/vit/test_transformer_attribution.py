"""TransformerAttribution against arXiv 2103.15679, eq. 5 and 6, by autograd through the probabilities."""

import pytest
import torch

from mamba_attn import models
from mamba_attn.attribution import TransformerAttribution
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import images
from tests.attribution.vit.test_vit import MODELS, SIZE, build


def expected(model, inputs, tokens, target):
    """Per image, the mean of the query's rows of the product less the identity, patches only."""
    maps = []
    for image in inputs:
        seen = []

        def keep(_, args, seen=seen):
            args[0].retain_grad()
            seen.append(args[0])

        handles = [block.attn.attn_drop.register_forward_pre_hook(keep) for block in model.blocks]
        for block in model.blocks:
            block.attn.fused_attn = False
        with torch.enable_grad():
            logits = model(image[None])[0]
            (logits.max() if target is None else logits[target]).backward()
        for handle, block in zip(handles, model.blocks, strict=True):
            handle.remove()
            block.attn.fused_attn = True
        model.zero_grad()
        relevance = torch.eye(seen[0].shape[-1], dtype=inputs.dtype)
        factor = 15 if len(tokens) == 15 else 1  # a pool over the patches gives each a share of the gradient
        for each in seen:  # R <- R + mean_h((grad * A)^+) R
            relevance = relevance + factor * (each.grad * each).clamp(min=0).mean(1)[0].detach() @ relevance
        row = relevance[tokens].mean(0)
        row[tokens] -= 1 / len(tokens)
        maps.append(row[-15:].view(1, 5, 3))
    return torch.stack(maps)


@pytest.mark.changes_model("grad", "attributes")
@pytest.mark.parametrize("target", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_product_of_the_published_equations(name, target):
    model, tokens = build(name)
    x = images(3, SIZE)
    truth = expected(model, x, tokens, target)
    actual = TransformerAttribution(model).attribute(x, target, grid=True)
    assert float(truth.abs().max()) > 0
    torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))


def test_classes_queries_and_batches():
    model, _ = build("class token")
    x = images(2, SIZE)
    method = TransformerAttribution(model)
    both = method.attribute(x, [1, 4])
    assert both.shape == (2, 1, *SIZE)
    assert bool((both >= 0).all())
    torch.testing.assert_close(both.flip(0), method.attribute(x.flip(0), [4, 1]), rtol=1e-9, atol=1e-15)
    assert not torch.allclose(both, method.attribute(x, [2, 0]))
    assert not torch.allclose(method.attribute(x, 1, pixel=(3, 3)), method.attribute(x, 1))


def test_scans_are_refused_with_what_to_use():
    model = models.create("vim_micro", image_size=16, depth=2, embed_dim=16, num_classes=3)
    with pytest.raises(UnsupportedModelError, match=r"is defined for softmax attention, .*Mamba"):
        TransformerAttribution(model).attribute(torch.randn(1, 3, 16, 16))
