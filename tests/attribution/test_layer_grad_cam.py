"""LayerGradCam against GradCAM's formula on tokens, and against captum's own where channels come first."""

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_attn.attribution import LayerGradCam
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import SIZE, images, vim, vmamba
from tests.attribution.vit.test_vit import build


def expected(model, module, x, classes, at_input, relu=True):
    """(batch, *tokens) by autograd at a module of the untouched model, features last."""
    seen = []
    hook = (lambda _, args: seen.append(args[0])) if at_input else (lambda _, args, output: seen.append(output))
    handle = (module.register_forward_pre_hook if at_input else module.register_forward_hook)(hook)
    with torch.enable_grad():
        chosen = model(x)[torch.arange(len(x)), classes].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(chosen, seen)
    axes = tuple(range(1, gradient.ndim - 1))
    cam = (gradient.mean(axes, keepdim=True) * seen[0].detach()).sum(-1)
    return cam.clamp(min=0) if relu else cam


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", ["vim", "vit"])
def test_tokens_of_the_last_mixer(name, relu):
    model = vim() if name == "vim" else build("class token")[0]
    module = model.layers[-1].mixer if name == "vim" else model.blocks[-1].attn
    x, classes = images(), torch.tensor([1, 0, 4])
    cam = expected(model, module, x, classes, True, relu)
    patches = cam[:, [*range(7), *range(8, 16)]] if name == "vim" else cam[:, 1:]
    method = LayerGradCam(model, relu=relu)
    grid = method.attribute(x, classes, grid=True)
    assert grid.std() > 0
    torch.testing.assert_close(grid, patches.view(3, 1, 5, 3), rtol=1e-9, atol=1e-12)
    pixels = method.attribute(x, classes)
    truth = F.interpolate(grid, SIZE, mode="bilinear")
    torch.testing.assert_close(pixels, truth)


@pytest.mark.parametrize("generation", ["v0", "v05_noz"])
def test_the_last_stage_of_vmamba(generation):
    model = vmamba(generation=generation)
    x, classes = images(), torch.tensor([1, 0, 4])
    cam = expected(model, model.layers[-1], x, classes, False).unsqueeze(1)
    assert cam.shape == (3, 1, 3, 2)
    layout = model.layout(*SIZE, 2)
    torch.testing.assert_close(LayerGradCam(model).attribute(x, classes), layout.to_pixels(cam, SIZE))
    assert LayerGradCam(model).attribute(x, classes, grid=True).shape == (3, 1, 10, 6)
    finest = expected(model, model.layers[0].blocks[0], x, classes, False).unsqueeze(1)
    grid = LayerGradCam(model, layer="layers.0.blocks.0").attribute(x, classes, grid=True)
    torch.testing.assert_close(grid, finest)


def test_channels_first_are_captums_own():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, stride=2)
    model = nn.Sequential(convolution, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = images(2)
    own = captum.attr.LayerGradCam(model, convolution).attribute(x, 1, relu_attributions=True)
    truth = captum.attr.LayerAttribution.interpolate(own, SIZE, "bilinear").detach()
    torch.testing.assert_close(LayerGradCam(model, layer="0").attribute(x, 1), truth)
    with pytest.raises(UnsupportedModelError, match="no layer that can be traced"):
        LayerGradCam(model).attribute(x)


def test_functions_are_targets():
    model, x = vmamba(), images(2)
    both = LayerGradCam(model).attribute(x, lambda y: y[:, 3])
    torch.testing.assert_close(both, LayerGradCam(model).attribute(x, 3))
    torch.testing.assert_close(both, LayerGradCam(model).attribute(x, lambda y: y[:, 3].sum()))


def test_the_model_is_as_it_was():
    model, x = vim(depth=2), images(2)
    modules = dict(model.named_modules())
    maps = LayerGradCam(model).attribute(x, 1)
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(LayerGradCam(model).attribute(x, 1), maps)
    with torch.inference_mode():
        torch.testing.assert_close(LayerGradCam(model).attribute(x.clone(), 1), maps)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = vim(depth=1)
        self.unused = nn.Identity()
        self.pair = Pair()

    def forward(self, x):
        return self.body(self.pair(x)[0])


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("body.layer", ValueError, r"layer='body\.layer'\): no such module. Did you mean 'body\.layers'"),
        ("unused", UnsupportedModelError, r"layer='unused'\): Idle does not call it; choose another layer"),
        (
            "body.head",
            ValueError,
            r"layer='body\.head'\): it returns \(2, 5\), neither \(batch, tokens, features\) nor",
        ),
        ("pair", TypeError, "the layer gives tuple, not a tensor"),
        ("body.layers.0.mixer.conv1d", ValueError, r"whose place in the image is not known; choose another layer="),
    ],
)
def test_layers_that_give_no_map(layer, error, message):
    with pytest.raises(error, match=message):
        LayerGradCam(Idle(), layer=layer).attribute(images(2))
