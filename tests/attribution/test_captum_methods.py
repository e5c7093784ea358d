"""captum's methods behind our contract: captum's own numbers, reduced by hand."""

import captum.attr
import pytest
import torch
from torch import nn

from mamba_attn.attribution import InputXGradient, IntegratedGradients, Occlusion, Saliency
from mamba_attn.errors import NonFiniteError, UnsupportedModelError
from tests.attribution.cases import SIZE, images, vim, vmamba
from tests.attribution.test_contract import Segmenter, _livelier
from tests.attribution.vit.test_vit import build

ALL = pytest.mark.parametrize("method", [IntegratedGradients, InputXGradient, Saliency, Occlusion])
WINDOW = (3, 9, 8)


def model_of(name):
    return {"vim": lambda: vim(depth=2), "vmamba": vmamba, "vit": lambda: build("class token")[0]}[name]()


def ready(images):
    return images.clone().requires_grad_()


@pytest.mark.parametrize("name", ["vim", "vmamba", "vit"])
@pytest.mark.parametrize("target", [None, 2, [0, 4, 1]])
def test_integrated_gradients_are_captums(name, target):
    model, x = model_of(name), images()
    classes = model(x).argmax(1) if target is None else torch.tensor(target).expand(3)
    truth = captum.attr.IntegratedGradients(model).attribute(ready(x), target=classes, n_steps=4).detach()
    method = IntegratedGradients(model, n_steps=4)
    torch.testing.assert_close(method.attribute(x, target), truth.sum(1, keepdim=True), rtol=1e-9, atol=1e-12)
    absolute = IntegratedGradients(model, n_steps=4, internal_batch_size=1, colours="absolute")
    torch.testing.assert_close(absolute.attribute(x, target), truth.abs().sum(1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_integrated_gradients_options_pass_through():
    model, x = vim(depth=1), images(2)
    options = {"n_steps": 3, "method": "riemann_trapezoid", "baselines": 0.5}
    local = captum.attr.IntegratedGradients(model, multiply_by_inputs=False)
    truth = local.attribute(ready(x), target=1, **options).detach().sum(1, keepdim=True)
    ours = IntegratedGradients(model, multiply_by_inputs=False, **options).attribute(x, 1)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["vim", "vmamba", "vit"])
def test_gradients_are_captums(name):
    model, x = model_of(name), images()
    product = captum.attr.InputXGradient(model).attribute(ready(x), target=[1, 0, 3]).detach()
    torch.testing.assert_close(InputXGradient(model).attribute(x, [1, 0, 3]), product.sum(1, keepdim=True))
    ours = InputXGradient(model, colours="absolute").attribute(x, [1, 0, 3])
    torch.testing.assert_close(ours, product.abs().sum(1, keepdim=True))
    gradient = captum.attr.Saliency(model).attribute(ready(x), target=[1, 0, 3], abs=False).detach()
    torch.testing.assert_close(Saliency(model).attribute(x, [1, 0, 3]), gradient.abs().sum(1, keepdim=True))
    torch.testing.assert_close(Saliency(model, abs=False).attribute(x, [1, 0, 3]), gradient.sum(1, keepdim=True))


def test_occlusion_is_captums_and_a_difference_of_logits():
    model, x = vim(depth=1), images(2)
    truth = captum.attr.Occlusion(model).attribute(x, WINDOW, (3, 5, 4), target=[1, 0], baselines=0.3).detach()
    method = Occlusion(model, sliding_window_shapes=WINDOW, strides=(3, 5, 4), baselines=0.3, perturbations_per_eval=4)
    torch.testing.assert_close(method.attribute(x, [1, 0]), truth.mean(1, keepdim=True))
    # a window that is the image: how far the logit falls when nothing is left
    whole = Occlusion(model, sliding_window_shapes=(3, *SIZE)).attribute(x, 1)
    fall = model(x)[:, 1] - model(torch.zeros_like(x))[:, 1]
    torch.testing.assert_close(whole.double(), fall.detach().view(2, 1, 1, 1).expand_as(whole), rtol=1e-6, atol=1e-7)
    # the default: windows of an eighth of the shorter side, half of it apart
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    default = captum.attr.Occlusion(small).attribute(x[:1], (3, 3, 3), (3, 1, 1), target=1).detach()
    torch.testing.assert_close(Occlusion(small).attribute(x[:1], 1), default.mean(1, keepdim=True))
    square = Occlusion(model, sliding_window_shapes=9, strides=5).attribute(x, 1)
    equal = Occlusion(model, sliding_window_shapes=(3, 9, 9), strides=(3, 5, 5)).attribute(x, 1)
    torch.testing.assert_close(square, equal)


def fast(method):
    options = {IntegratedGradients: {"n_steps": 2}, Occlusion: {"sliding_window_shapes": 20, "strides": 10}}
    return options.get(method, {})


@ALL
@pytest.mark.parametrize("batch", [1, 2])
def test_dense_outputs_and_functions(method, batch):
    model, x = _livelier(Segmenter()), images(batch)
    options = fast(method)
    tuples = method(model, **options).attribute(x, [(1, 2, 0), (3, 4, 2)][:batch])
    for image, found, (category, row, column) in zip(x, tuples, [(1, 2, 0), (3, 4, 2)], strict=False):
        one = method(model, **options).attribute(image[None], lambda y, c=category, i=row, j=column: y[:, c, i, j])
        torch.testing.assert_close(found[None], one, rtol=1e-9, atol=1e-12)
    masks = torch.rand(batch, 5, 3).double()  # every image has its own: the function must see just these images
    masked = method(model, **options).attribute(x, lambda y: (y[:, 1] * masks).sum((1, 2)))
    for image, found, mask in zip(x, masked, masks, strict=True):
        one = method(model, **options).attribute(image[None], lambda y, mask=mask: (y[:, 1] * mask).sum())
        torch.testing.assert_close(found[None], one, rtol=1e-9, atol=1e-12)


def test_occlusion_needs_a_number_of_each_image():
    with pytest.raises(ValueError, match="one number for 2 images; covering a window needs one of each"):
        Occlusion(vim(depth=1)).attribute(images(2), lambda y: y.sum())


@ALL
@pytest.mark.parametrize(("name", "grid", "step", "offset"), [("vim", (9, 5), 4, 4), ("vmamba", (10, 6), 4, 0.5)])
def test_the_grid_has_the_means_over_the_nearest_pixels(method, name, grid, step, offset):
    model = vim(depth=1, stride=4) if name == "vim" else vmamba(depths=(1, 1))
    x, explainer = images(2), method(model, **fast(method))
    maps, cells = explainer.attribute(x, 1), explainer.attribute(x, 1, grid=True)
    assert cells.shape == (2, 1, *grid)
    sums, counts = torch.zeros(2, 1, *grid).double(), torch.zeros(grid)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            cell = []
            for pixel, count in zip((row, column), grid, strict=True):
                distances = [abs(pixel + 0.5 - (index * step + offset)) for index in range(count)]
                cell.append(max(i for i, d in enumerate(distances) if d == min(distances)))  # the later of two as near
            sums[:, :, cell[0], cell[1]] += maps[:, :, row, column]
            counts[cell[0], cell[1]] += 1
    torch.testing.assert_close(cells.double(), sums / counts, rtol=1e-6, atol=1e-7)  # captum's occlusion is float32


@ALL
def test_any_model_is_explained_and_a_grid_needs_a_known_one(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), images(2).float()
    explainer = method(model, **fast(method))
    assert explainer.attribute(x).shape == (2, 1, *SIZE)
    assert explainer.attribute(x, expand=True).shape == x.shape
    with pytest.raises(UnsupportedModelError, match="no layer that can be traced"):
        explainer.attribute(x, grid=True)


@ALL
def test_nothing_changes_and_nothing_is_left(method):
    model, x = vim(depth=1), images(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = method(model, **fast(method)).attribute(x, 1)
    assert not maps.requires_grad
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    with torch.inference_mode():
        torch.testing.assert_close(method(model, **fast(method)).attribute(x.clone(), 1), maps)


@ALL
def test_bad_input(method):
    model = vim(depth=1)
    explainer = method(model, **fast(method))
    with pytest.raises(ValueError, match=r"pixel=\(3, 3\)\): this method reads no token's row; leave pixel out"):
        explainer.attribute(images(1), pixel=(3, 3))
    with pytest.raises(ValueError, match=r"expected class indices in 0\.\.4"):
        explainer.attribute(images(1), 5)
    with pytest.raises(NonFiniteError, match="the value to explain is NaN or Inf"):
        explainer.attribute(images(1) * torch.nan)
    if method is not Occlusion:
        with pytest.raises(ValueError, match=r"colours='absolut'\): no such reduction. Did you mean 'absolute'"):
            method(model, colours="absolut")
