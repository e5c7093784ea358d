"""iGOS++ against its formula, one image at a time, and what it is for: without what it marks, the class is lost."""

import zlib

import pytest
import torch
import torch.nn.functional as F

from mamba_attn import models
from mamba_attn.attribution import IGOSPlusPlus
from mamba_attn.core.blur import blurred

SIZE = (24, 40)
SMALL = {"image_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return models.vim.VisionMamba(**SMALL).eval().double()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(4)
    return torch.randn(3, 3, *SIZE, dtype=torch.float64)


def large(mask):
    return F.interpolate(mask[None, None], size=SIZE, mode="bilinear", align_corners=True)[0, 0]


def loss_of(model, image, target, masks, noise, path, sparsity, smoothness):
    """Of one image, term by term."""
    blur = blurred(image)

    def mean(image, other, mask):
        parts = [(k + 1) / path * mask for k in range(path)]
        shown = torch.stack([m * image + (1 - m) * other + n for m, n in zip(parts, noise, strict=True)])
        return model(shown).softmax(1)[:, target].mean()

    deletes, inserts = masks
    both = deletes * inserts
    loss = sum(mean(image, blur, large(m)) - mean(blur, image, large(n))
               for m, n in ((deletes, inserts), (both, both))) / 2  # fmt: skip

    rough = torch.zeros(())
    for axis in (0, 1):
        edges = torch.exp(-(image.diff(dim=axis + 1) ** 2) / 0.01).mean(0)
        rough = rough + (both.diff(dim=axis) ** 2).mean() / 2 + (edges * large(both).diff(dim=axis) ** 2).mean() / 2
    return loss + sparsity * (1 - both).abs().mean() + smoothness * rough


def by_the_formula(model, image, target, steps, path, cells, sparsity, smoothness, rate):
    seed = zlib.crc32(image.float().numpy().tobytes())
    draw, masks, length = torch.Generator().manual_seed(seed), torch.ones(2, *cells, dtype=torch.float64), rate
    rest = path, sparsity, smoothness
    for _ in range(steps):
        noise = 0.2 * torch.randn((path, 3, *SIZE), generator=draw).double()
        masks.requires_grad_()
        loss = loss_of(model, image, target, masks, noise, *rest)
        (gradient,) = torch.autograd.grad(loss, masks)
        masks, length = masks.detach(), min(rate, 5 * length)
        while True:
            moved = (masks - length * gradient).clamp(0, 1)
            with torch.no_grad():
                fallen = loss - loss_of(model, image, target, moved, noise, *rest)
            if fallen >= 1e-4 * length * (gradient**2).sum() or length < 1e-5:
                break
            length *= 0.2
        masks = moved
    return large(1 - masks.prod(0))


@pytest.mark.parametrize(("steps", "path"), [(1, 1), (3, 4)])
def test_it_is_the_formula_of_its_docstring(model, images, steps, path):
    options = {"sparsity": 0.001, "smoothness": 0.02, "rate": 500.0}
    found = IGOSPlusPlus(model, steps=steps, path=path, cells=4, **options).attribute(images, target=[1, 0, 4])
    for its, image, target in zip(found[:, 0], images, (1, 0, 4), strict=True):
        expected = by_the_formula(model, image, target, steps, path, (4, 7), **options)
        assert float(expected.max()) > 0.05  # something is taken away
        torch.testing.assert_close(its, expected, atol=1e-6, rtol=0)


def test_many_images_and_long_paths_are_split(model, images):
    method = IGOSPlusPlus(model, steps=1, path=11, cells=4, sparsity=0.001, smoothness=0.02)
    together = method.attribute(images, target=1)
    assert torch.equal(method.attribute(images, target=1), together)
    torch.testing.assert_close(method.attribute(images[1:2], target=1), together[1:2], atol=1e-9, rtol=0)
    assert method.attribute(images, target=1, grid=True).shape == (3, 1, 3, 5)


def test_what_it_takes_away_the_class_is_lost_without(images):
    class Corner(torch.nn.Module):
        """Two classes, told apart by the mean of the upper left quarter."""

        def forward(self, x):
            mean = x[:, :, :12, :20].mean((1, 2, 3))
            return 6 * torch.stack([mean, -mean], dim=1)

    x = 0.1 * images.float()
    x[:, :, :12, :20] += 1.5
    found = IGOSPlusPlus(Corner(), cells=6).attribute(x)
    inside, outside = found[:, :, :10, :16].mean(), found[:, :, 14:, 24:].mean()
    assert float(inside) > 2 * float(outside)


def test_the_predicted_class_and_outputs_without_classes(model, images):
    method = IGOSPlusPlus(model, steps=1, path=2, cells=4)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    assert torch.equal(method.attribute(images), method.attribute(images, target=predicted))
    by_function = method.attribute(images, target=lambda output: output[:, 2])
    assert by_function.shape == (3, 1, *SIZE)

    class One(torch.nn.Module):
        def forward(self, x):
            return model(x)[:, 2]

    torch.testing.assert_close(IGOSPlusPlus(One(), steps=1, path=2, cells=4).attribute(images), by_function)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, r"steps=0.*at least 1"),
        ({"path": 0}, r"path=0.*at least 1"),
        ({"cells": 1}, r"cells=1.*at least 2"),
        ({"sparsity": -1.0}, r"sparsity=-1.0.*from 0 on"),
        ({"smoothness": float("nan")}, r"smoothness=nan.*from 0 on"),
        ({"rate": float("inf")}, r"rate=inf.*from 0 on"),
    ],
)
def test_options_that_it_refuses(model, options, words):
    with pytest.raises(ValueError, match=words):
        IGOSPlusPlus(model, **options)


def test_inputs_that_it_refuses(model, images):
    with pytest.raises(ValueError, match="reads no token's row"):
        IGOSPlusPlus(model).attribute(images, pixel=(1, 1))
    with pytest.raises(ValueError, match="expected images"):
        IGOSPlusPlus(model).attribute(torch.randn(1, 3, 4, *SIZE, dtype=torch.float64))
