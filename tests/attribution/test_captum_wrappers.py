"""Captum's contract, by captum's own wrappers and metrics around our methods."""

import subprocess
import sys

import captum.attr
import pytest
import torch
from captum.attr import FeatureAblation, LayerAttribution, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from mamba_attn.attribution import (
    IntegratedGradients,
    LayerGradCam,
    MambaAttribution,
    Occlusion,
    RawAttention,
    Saliency,
    catalogue,
)
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import SIZE, images, vim
from tests.attribution.test_contract import EVERY, FAST, Chosen
from tests.attribution.vit.test_vit import build

MODELS = {"scans": lambda: vim(depth=1, class_token=None), "softmax": lambda: build("pooled")[0]}
SAMPLES, SPREAD = 2, 0.3


class Weighted(nn.Module):
    """Logits times a number of each image, the model's second argument."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, weight, label=None):
        return self.model(x) * weight[:, None]


def noisy(x):
    """What NoiseTunnel makes of images, from the same random numbers."""
    shape = (len(x) * SAMPLES, *x.shape[1:])
    return x.repeat_interleave(SAMPLES, dim=0) + torch.normal(0, torch.tensor(SPREAD).repeat(shape))


@EVERY
def test_every_method_under_the_noise_tunnel(model, name):
    model, x = MODELS[model](), images(2)
    method = catalogue.build(name, model, **FAST.get(name, {}))
    torch.manual_seed(7)
    each = method.attribute(noisy(x), [1, 1, 3, 3]).unflatten(0, (2, SAMPLES))
    truth = {
        "smoothgrad": each.mean(1),
        "smoothgrad_sq": each.square().mean(1),
        "vargrad": each.square().mean(1) - each.mean(1).square(),
    }
    for kind, expected in truth.items():
        torch.manual_seed(7)
        found = NoiseTunnel(method).attribute(
            x, nt_type=kind, nt_samples=SAMPLES, stdevs=SPREAD, target=torch.tensor([1, 3])
        )
        assert found.shape == (2, 1, *SIZE)
        tolerance = {"rtol": 1e-6, "atol": 1e-9 * float(each.square().max() + each.abs().max())}
        torch.testing.assert_close(found.to(expected), expected, **tolerance)
    assert name == "centre" or float(truth["vargrad"].max()) > 0


@EVERY
def test_every_method_passes_further_arguments_on(model, name):
    outer, x, weight = Weighted(MODELS[model]()), images(2), torch.tensor([0.5, 3.0], dtype=torch.float64)
    method = catalogue.build(name, outer, **FAST.get(name, {}))
    if name == "transformer_attribution_lrp":
        with pytest.raises(UnsupportedModelError, match="but this is Weighted"):  # for timm's ViTs as they are
            method.attribute(x, 1, additional_forward_args=weight)
        return
    found = method.attribute(x, [1, 3], additional_forward_args=(weight, "label"))
    held = catalogue.build(
        name, Chosen(outer.model, lambda y: y * weight.repeat(len(y) // 2)[:, None]), **FAST.get(name, {})
    )
    truth = held.attribute(x, [1, 3])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))


def test_further_arguments_grow_with_the_batch():
    model, x = Weighted(vim(depth=1)), images(2)
    weight = torch.tensor([0.5, 3.0], dtype=torch.float64)
    several = Occlusion(model, sliding_window_shapes=20, strides=20).attribute(
        x, 1, additional_forward_args=weight, perturbations_per_eval=3
    )
    one = Occlusion(model, sliding_window_shapes=20, strides=20).attribute(x, 1, additional_forward_args=weight)
    torch.testing.assert_close(several, one)
    torch.manual_seed(7)
    each = Saliency(model).attribute(noisy(x), 1, additional_forward_args=weight.repeat_interleave(SAMPLES))
    torch.manual_seed(7)
    found = NoiseTunnel(Saliency(model)).attribute(
        x, nt_samples=SAMPLES, stdevs=SPREAD, target=1, additional_forward_args=weight
    )
    torch.testing.assert_close(found, each.unflatten(0, (2, SAMPLES)).mean(1))


def test_captums_arguments_stand_in_the_call_too():
    model, x = vim(depth=1), images(2)
    method = IntegratedGradients(model)
    chosen = {"baselines": 0.5, "n_steps": 3, "method": "riemann_trapezoid", "internal_batch_size": 2}
    maps, delta = method.attribute(x, 1, **chosen, return_convergence_delta=True)
    torch.testing.assert_close(maps, IntegratedGradients(model, **chosen).attribute(x, 1))
    ready = x.clone().requires_grad_()
    truth, gap = captum.attr.IntegratedGradients(model).attribute(
        ready, target=1, **chosen, return_convergence_delta=True
    )
    torch.testing.assert_close(maps, truth.detach().sum(1, keepdim=True))
    torch.testing.assert_close(delta, gap.detach())
    assert (method.n_steps, method.baselines) == (50, None)  # for this call alone
    expanded = method.attribute(x, 1, **chosen, expand=True)
    torch.testing.assert_close(method.compute_convergence_delta(expanded, 0.5, x, target=1), delta)
    torch.testing.assert_close(
        Saliency(model).attribute(x, 1, abs=False), Saliency(model, abs=False).attribute(x, 1), rtol=0, atol=0
    )
    torch.testing.assert_close(
        LayerGradCam(model).attribute(x, 1, relu_attributions=False), LayerGradCam(model, relu=False).attribute(x, 1)
    )


def test_the_noise_tunnel_returns_the_delta_of_methods_that_have_one():
    model, x = vim(depth=1), images(2)
    tunnel = NoiseTunnel(IntegratedGradients(model))
    assert tunnel.has_convergence_delta()
    assert tunnel.multiplies_by_inputs
    maps, delta = tunnel.attribute(x, nt_samples=3, target=1, n_steps=2, return_convergence_delta=True)
    assert maps.shape == (2, 1, *SIZE)
    assert delta.shape == (6,)
    assert not NoiseTunnel(RawAttention(model)).has_convergence_delta()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_steps": 3}, r"attribute\(n_steps=\.\.\.\): this method has no n_steps\. Methods with it: IntegratedGr"),
        ({"baselines": 0}, "Methods with it: IntegratedGradients, Occlusion"),
        ({"return_convergence_delta": True}, "no return_convergence_delta. Methods with it: IntegratedGradients"),
        ({"taget": 3}, r"this method has no taget\. Did you mean 'target'"),
    ],
)
def test_arguments_that_a_method_does_not_have(arguments, message):
    with pytest.raises(TypeError, match=message):
        RawAttention(vim(depth=1)).attribute(images(1), **arguments)


def test_no_delta_wanted_is_no_argument():
    model, x = vim(depth=1), images(1)
    assert torch.equal(
        RawAttention(model).attribute(x, return_convergence_delta=False), RawAttention(model).attribute(x)
    )


def test_places_per_image_need_one_per_noisy_image():
    method = RawAttention(vim(depth=1))
    with pytest.raises(ValueError, match=r"a list of 2; expected one \(row, column\) for all images, or a list of one"):
        NoiseTunnel(method).attribute(images(2), nt_samples=3, pixel=[(1, 1), (2, 2)])
    assert NoiseTunnel(method).attribute(images(2), nt_samples=3, pixel=(1, 1)).shape == (2, 1, *SIZE)


def test_maps_on_the_grid_are_interpolated_by_captum():
    maps = RawAttention(vim(depth=1)).attribute(images(2), grid=True)
    assert LayerAttribution.interpolate(maps, SIZE, "bilinear").shape == (2, 1, *SIZE)


def test_captums_metrics_with_further_arguments():
    model, x = Weighted(vim(depth=1)), images(2)
    weight = torch.tensor([0.5, 3.0], dtype=torch.float64)
    method = MambaAttribution(model)
    expanded = method.attribute(x, 1, additional_forward_args=weight, expand=True)

    def perturb(inputs):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    found = infidelity(model, perturb, x, expanded, additional_forward_args=weight, target=1, n_perturb_samples=3)
    assert found.isfinite().all()
    changes = sensitivity_max(
        method.attribute, x, n_perturb_samples=3, target=[1, 0], expand=True, additional_forward_args=weight
    )
    assert changes.shape == (2,)
    assert (changes > 0).all()


def test_captums_ablation_of_our_models_patches():
    model, x = vim(depth=1), images(2)
    patches = torch.arange(15).view(5, 3).repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None]
    found = FeatureAblation(model).attribute(x, target=1, feature_mask=patches, perturbations_per_eval=5)
    covered = x.clone()
    covered[:, :, 16:24, 8:16] = 0
    fall = (model(x) - model(covered))[:, 1].detach()
    torch.testing.assert_close(found[:, 0, 20, 10], fall.to(found), rtol=1e-5, atol=1e-7)


def test_it_works_without_the_type_checks_of_these_tests():
    code = (
        "import torch; from captum.attr import NoiseTunnel; from mamba_attn.models import create;"
        "from mamba_attn.attribution import RawAttention; model = create('vim_tiny', image_size=32, depth=1).eval();"
        "print(tuple(NoiseTunnel(RawAttention(model)).attribute(torch.randn(1, 3, 32, 32), nt_samples=2).shape))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "(1, 1, 32, 32)"
