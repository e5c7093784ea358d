"""Mask refinement against its formula, one image at a time, and what it is for: masks that keep and lose a class."""

import pytest
import torch
import torch.nn.functional as F

from mamba_attn import models
from mamba_attn.attribution import AttnLRP, FrozenContribution, MambaLRP, MaskRefinement
from mamba_attn.core.ranks import ranks
from mamba_attn.models.vit import vision_transformer

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


def by_the_formula(model, image, target, steps, fractions, fills):
    """The map of one image on its 3 x 5 cells; ``fills``: one colour image per step."""
    relevance = MambaLRP(model).attribute(image[None], target=target, grid=True)
    z = torch.from_numpy(ranks(relevance.flatten().numpy()) / 14).view(3, 5)
    mean, square, total = torch.zeros(3, 3, 5, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        z.requires_grad_()
        drawn = (torch.arange(fractions) + torch.rand(fractions, generator=draw)) / fractions
        loss = torch.zeros(())
        for q in (0.07 + 0.86 * drawn).tolist():
            mask = torch.sigmoid((z - torch.quantile(z.detach(), q)) / 0.06)
            mask = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
            kept = model((mask * image + (1 - mask) * fills[step - 1])[None]).softmax(1)[0, target]
            gone = model(((1 - mask) * image + mask * fills[step - 1])[None]).softmax(1)[0, target]
            loss = loss - kept.log() - (1 - gone).log()
        (gradient,) = torch.autograd.grad(loss / fractions, z)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        z = z.detach() - 0.05 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
        if step > steps // 2:
            total += z
    return total / (steps - steps // 2)


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_it_is_the_formula_of_its_docstring(model, images, steps):
    method = MaskRefinement(model, steps=steps, fractions=2, fills=("mean", "dark"))
    maps = method.attribute(images, target=[1, 0, 4], grid=True)
    for found, image, target in zip(maps[:, 0], images, (1, 0, 4), strict=True):
        mean, dark = (x.view(3, 1, 1).expand(3, *SIZE) for x in (image.mean((1, 2)), image.amin((1, 2))))
        expected = by_the_formula(model, image, target, steps, 2, [mean, dark] * 3)
        torch.testing.assert_close(found + 0.5, expected, atol=1e-5, rtol=0)


def test_without_steps_it_is_the_ranks_of_the_relevance(model, images):
    found = MaskRefinement(model, steps=0).attribute(images, target=2, grid=True)
    relevance = MambaLRP(model).attribute(images, target=2, grid=True)
    assert torch.equal(found.flatten(1).argsort(1), relevance.flatten(1).argsort(1))
    assert float(found.min()) == -0.5
    assert float(found.max()) == 0.5


def test_repeatable_alone_and_in_a_batch_and_of_the_class_that_is_predicted(model, images):
    method = MaskRefinement(model, steps=5)
    together = method.attribute(images)
    assert together.shape == (3, 1, *SIZE)
    assert torch.equal(method.attribute(images), together)
    assert torch.allclose(method.attribute(images[1:2]), together[1:2], atol=1e-4)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    for target in (predicted, predicted.tolist()):
        assert torch.equal(method.attribute(images, target=target), together)
    assert not torch.allclose(method.attribute(images, target=(predicted + 1) % 5), together, atol=0.1)


def test_it_keeps_and_loses_the_class_better_than_what_it_begins_with(model, images):
    with torch.no_grad():
        target = model(images).argmax(1)

    def gap(cells):
        """How much likelier the class is by the upper half of the cells than by the lower half."""
        upper = cells >= cells.flatten(1).quantile(0.5, dim=1).view(-1, 1, 1, 1)
        shown = F.interpolate(upper.double(), size=SIZE, mode="nearest")
        with torch.no_grad():
            kept, lost = (model(images * mask).log_softmax(1).gather(1, target[:, None]) for mask in (shown, 1 - shown))
        return float((kept - lost).mean())

    begun, refined = (
        gap(
            MaskRefinement(model, steps=steps, fills="mean").attribute(
                images - images.mean((2, 3), True), target, grid=True
            )
        )
        for steps in (0, 30)
    )
    assert refined > begun


def test_it_begins_with_the_relevance_that_fits_the_layers(images):
    torch.manual_seed(0)
    vit = vision_transformer(**SMALL, num_heads=2).eval()
    pixels = images.float()
    found = MaskRefinement(vit, steps=0).attribute(pixels, target=1, grid=True)
    expected = AttnLRP(vit).attribute(pixels, target=1, grid=True)
    assert torch.equal(found.flatten(1).argsort(1), expected.flatten(1).argsort(1))

    class Hybrid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit
            self.vim = models.vim.VisionMamba(**SMALL).eval()

        def forward(self, x):
            return self.vit(x) + self.vim(x)

    hybrid = Hybrid()
    found = MaskRefinement(hybrid, steps=0).attribute(pixels, target=1, grid=True)
    expected = FrozenContribution(hybrid).attribute(pixels, target=1, grid=True)
    assert torch.equal(found.flatten(1).argsort(1), expected.flatten(1).argsort(1))


def test_other_outputs_and_arguments(model, images):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, factor):
            return self.inner(x) * factor[:, None]

    plain = MaskRefinement(model, steps=3).attribute(images, target=2)
    ones = torch.ones(3, dtype=torch.float64)
    again = MaskRefinement(Scaled(), steps=3).attribute(images, target=2, additional_forward_args=ones)
    torch.testing.assert_close(again, plain, atol=1e-4, rtol=0)
    by_function = MaskRefinement(model, steps=3).attribute(images, target=lambda output: output[:, 2])
    assert by_function.shape == plain.shape
    assert not torch.equal(by_function, plain)


def test_gradients_of_the_model_are_left_alone(model, images):
    before = [parameter.grad for parameter in model.parameters()]
    with torch.inference_mode():
        MaskRefinement(model, steps=1).attribute(images[:1])
    assert all(parameter.grad is its for parameter, its in zip(model.parameters(), before, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_empty_start_needs_no_relevance(model, images):
    found = MaskRefinement(model, steps=0, start="none").attribute(images, target=1, grid=True)
    assert found.shape == (3, 1, 3, 5)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 0.01
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, r"steps=-1.*at least 0"),
        ({"fractions": 0}, r"fractions=0.*at least 1"),
        ({"start": "lrp"}, r"start='lrp'.*'relevance', 'none'"),
        ({"fills": "balck"}, "fills='balck'"),
        ({"fills": ()}, r"fills=\(\)"),
    ],
)
def test_options_that_it_refuses(model, options, words):
    with pytest.raises(ValueError, match=words):
        MaskRefinement(model, **options)


def test_inputs_that_it_refuses(model, images):
    with pytest.raises(ValueError, match="reads no token's row"):
        MaskRefinement(model).attribute(images, pixel=(1, 1))
    with pytest.raises(ValueError, match="expected images"):
        MaskRefinement(model).attribute(torch.randn(1, 3, 4, *SIZE, dtype=torch.float64))
