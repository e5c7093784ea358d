"""What stands in the place of removed pixels, and models that run without the tokens."""

import numpy as np
import pytest
import torch

from mamba_attn import knockout, models
from mamba_attn.evaluation import fills, perturbation
from mamba_attn.evaluation.token_drop import answers_without


def some(size=(24, 18)):
    torch.manual_seed(0)
    gone = torch.rand(3, *size) < torch.tensor([0.1, 0.5, 0.95]).view(3, 1, 1)
    return torch.randn(3, *size), gone


@pytest.mark.parametrize("fill", fills.FILLS)
def test_what_is_left_is_left_alone(fill):
    image, gone = some()
    found = fills.filled(image, gone, fill)
    kept = ~gone.unsqueeze(1).expand_as(found)
    assert torch.equal(found[kept], image.expand_as(found)[kept])
    assert not torch.equal(found, image.expand_as(found))


def test_each_imputed_pixel_is_the_weighted_mean_of_its_neighbours(monkeypatch):
    monkeypatch.setattr(fills, "_NOISE", 0)
    image, gone = some()
    for copy, missing in zip(fills.filled(image.double(), gone, "road"), gone, strict=True):
        for row, column in missing.nonzero().tolist()[::7]:
            total, values = 0.0, torch.zeros(3, dtype=torch.float64)
            for (down, right), weight in fills._NEIGHBOURS.items():
                i, j = row + down, column + right
                if 0 <= i < 24 and 0 <= j < 18:
                    total, values = total + weight, values + weight * copy[:, i, j]
            assert torch.allclose(copy[:, row, column], values / total, atol=1e-10)
    flat = torch.full((3, 24, 18), 0.7)
    assert torch.allclose(fills.filled(flat, gone, "road"), flat.expand(3, -1, -1, -1), atol=1e-6)


def test_noise_has_its_seed_and_its_size():
    image, gone = some()
    first, again, other = (fills.filled(image, gone, "road", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    changed = (first - other)[gone.unsqueeze(1).expand_as(first)]
    assert changed.std().item() == pytest.approx(0.01 * 2**0.5, rel=0.1)


def test_blur_is_a_gaussian_without_dark_edges():
    ones = torch.ones(3, 32, 48)
    everything = torch.ones(1, 32, 48, dtype=torch.bool)
    assert torch.allclose(fills.filled(ones, everything, "blur")[0], ones, atol=1e-6)
    dot = torch.zeros(3, 33, 49)
    dot[:, 16, 24] = 1
    blurred = fills.filled(dot, torch.ones(1, 33, 49, dtype=torch.bool), "blur")[0, 0].double().numpy()
    rows = np.arange(33)[:, None]
    variance = (blurred * (rows - 16) ** 2).sum() / blurred.sum()
    assert variance == pytest.approx((33 / 16) ** 2, rel=0.02)


def test_nothing_left_to_impute_from():
    with pytest.raises(ValueError, match="nothing is left"):
        fills.filled(torch.zeros(3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), "road")
    blank = fills.blank(torch.randn(2, 3, 8, 8), "road")
    assert torch.equal(blank, torch.zeros(2, 3, 8, 8))


VIM = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.mark.parametrize("class_token", ["middle", "first", None])
@pytest.mark.parametrize("order", ["raster", "spiral"])
def test_a_vim_without_tokens_is_a_scan_of_the_others(class_token, order):
    torch.manual_seed(0)
    model = models.vim.VisionMamba(**VIM, class_token=class_token, order=order).eval().double()
    images, gone = torch.randn(3, 3, 32, 48).double(), torch.zeros(3, 32, 48, dtype=torch.bool)
    with torch.no_grad():
        assert torch.allclose(answers_without(model, images, gone), model(images), rtol=0, atol=1e-12)
        gone[0, :8, :24], gone[1, 8:24, 40:] = True, True  # three patches, two patches
        found = answers_without(model, images, gone)
        tokens, layout = model.embed(images[:1]), model.layout(32, 48)
        left = [t for t in range(layout.tokens) if t not in layout.patches[:3].tolist()]
        routes = model.routes(layout)
        if routes is not None:
            routes = torch.tensor([[left.index(t) for t in route.tolist() if t in left] for route in routes])
        tokens = tokens[:, left]
        for layer in model.layers:
            tokens = layer(tokens, routes)
        tokens = model.norm_f(tokens)
        place = None if class_token is None else left.index(layout.class_tokens[0])
        expected = model.head(tokens.mean(1) if place is None else tokens[:, place])
        assert torch.allclose(found[:1], expected, atol=1e-12)
        assert torch.allclose(found[2:], model(images[2:]), rtol=0, atol=1e-12)


def test_a_vit_without_tokens_ignores_what_they_show():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = models.create("vit_micro", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    images, gone = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool)
    gone[:, :16, 8:24] = True
    with torch.no_grad():
        found = answers_without(model, images, gone)
        other = torch.where(gone.unsqueeze(1), torch.randn_like(images), images)
        assert torch.allclose(answers_without(model, other, gone), found, atol=1e-6)
        assert not torch.allclose(model(other), model(images), atol=1e-3)
        assert torch.allclose(answers_without(model, images, torch.zeros_like(gone)), model(images), atol=1e-6)
    assert not model.patch_drop._forward_hooks


def test_a_model_with_grids_loses_tokens_in_its_scans():
    torch.manual_seed(0)
    model = models.vmamba.VSSM(num_classes=5, dims=8, depths=(1, 1), d_state=1).eval().double()
    for name, weight in model.named_parameters():
        if "x_proj" in name:
            weight.data *= 100  # untrained, B and C are so small that D u is all of y
    images, gone = torch.randn(2, 3, 32, 48).double(), torch.zeros(2, 32, 48, dtype=torch.bool)
    gone[0, :16], gone[1, :, 24:] = True, True
    filled = images.masked_fill(gone.unsqueeze(1), 0)
    with torch.no_grad():
        found = answers_without(model, images, gone)
        assert not torch.allclose(found, model(filled), rtol=0, atol=1e-7)
        fine, coarse = torch.zeros(8, 12, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)
        fine[:4], coarse[:2] = True, True
        with knockout(model, layers=0, columns=fine.flatten()), knockout(model, layers=1, columns=coarse.flatten()):
            assert torch.allclose(found[:1], model(filled[:1]), rtol=0, atol=1e-12)


def test_perturbation_by_dropping():
    torch.manual_seed(0)
    model = models.vim.VisionMamba(**VIM).eval()
    images, maps = torch.randn(2, 3, 32, 48), torch.rand(2, 32, 48)
    clean = perturbation.clean_answers(model, images, "drop")
    found = perturbation.perturb(model, images, maps, clean.explained, cell=8, fill="drop")
    assert bool(found.probability.isfinite().all())
    assert found.probability.flatten().unique().numel() > 30
    with pytest.raises(ValueError, match="give the model itself, and cells"):
        perturbation.perturb(model, images, maps, clean.explained, cell=1, fill="drop")
