"""Models with several inputs: a map for each, from the layers that it alone reaches."""

import captum.attr
import pytest
import torch
from captum.metrics import infidelity
from torch import nn

from mamba_attn.attribution import (
    AttentionRollout,
    CentreMap,
    IntegratedGradients,
    LayerGradCam,
    MambaAttribution,
    MambaLRP,
    Occlusion,
    RawAttention,
    RelevanceAttentionRanks,
    Saliency,
    catalogue,
)
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import SIZE, images, vim, vmamba
from tests.attribution.test_contract import FAST, PROBABILITIES, Chosen

# refused in a sentence
UNSHARED = (
    "mamba_lrp",
    "keep_and_remove_lrp",
    "mask_refinement",
    "frozen_contribution",
    "relevance_attention_ranks",
    "grad_cam",
)


class Siamese(nn.Module):
    """One encoder for two images: the difference of the logits."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, first, second):
        return self.encoder(first) - 2 * self.encoder(second)


class Pair(nn.Module):
    """An encoder for each of two images of different sizes."""

    def __init__(self):
        super().__init__()
        self.left = vim(depth=2)
        self.right = vmamba(depths=(1, 1), generation="v0", mlp_ratio=0.0)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


class Stacked(nn.Module):
    """One encoder for the sum of two images."""

    def __init__(self):
        super().__init__()
        self.encoder = vim(depth=1)

    def forward(self, first, second):
        return self.encoder(first + second)


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9 * float(truth.abs().max()))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, entry in catalogue.METHODS.items()
        if name not in (*UNSHARED, *PROBABILITIES)
        and (catalogue.SCANS in entry.made_of or entry.made_of == catalogue.ANY)
    ],
)
def test_either_image_of_a_siamese_model_has_the_map_of_its_own_branch(name):
    encoder, first, second = vim(depth=2, class_token=None), images(2), images(4)[2:]
    method = catalogue.build(name, Siamese(encoder), **FAST.get(name, {}))
    maps = method.attribute((first, second), [1, 3])
    assert [each.shape for each in maps] == [(2, 1, *SIZE)] * 2
    for found, image, part in zip(maps, (first, second), (lambda y: y, lambda y: -2 * y), strict=True):
        close(found, catalogue.build(name, Chosen(encoder, part), **FAST.get(name, {})).attribute(image, [1, 3]))
    close(method.attribute(first, [1, 3], additional_forward_args=second), maps[0])


def test_inputs_of_different_sizes_and_families():
    model, left, right = Pair(), images(2), images(2, (24, 32))
    maps = MambaAttribution(model).attribute((left, right), 1)
    assert [each.shape for each in maps] == [(2, 1, 40, 24), (2, 1, 24, 32)]
    close(maps[0], MambaAttribution(model.left).attribute(left, 1))
    close(maps[1], MambaAttribution(model.right).attribute(right, 1))
    expanded = Saliency(model).attribute((left, right), 1, expand=True)
    assert [each.shape for each in expanded] == [left.shape, right.shape]
    assert Saliency(model).attribute((left, right), 1, grid=True)[1].shape[2:] == (6, 8)

    def perturb(inputs):
        noise = tuple(0.1 * torch.randn_like(each) for each in inputs)
        return noise, tuple(each - step for each, step in zip(inputs, noise, strict=True))

    assert infidelity(model, perturb, (left, right), expanded, target=1, n_perturb_samples=2).isfinite().all()


def test_integrated_gradients_walk_on_all_inputs_at_once():
    model, first, second = Stacked(), images(2), images(4)[2:]
    ready = tuple(each.clone().requires_grad_() for each in (first, second))
    truth, gap = captum.attr.IntegratedGradients(model).attribute(
        ready, (0.1, 0.2), target=1, n_steps=4, return_convergence_delta=True
    )
    found, delta = IntegratedGradients(model, n_steps=4).attribute(
        (first, second), 1, baselines=(0.1, 0.2), return_convergence_delta=True
    )
    for ours, theirs in zip(found, truth, strict=True):
        close(ours, theirs.detach().sum(1, keepdim=True))
    close(delta, gap.detach())


def test_inputs_that_share_layers_are_explained_one_by_one():
    model, first, second = Stacked(), images(2), images(4)[2:]
    with pytest.raises(ValueError, match=r"layers\.0\.mixer see several of the 2 inputs.*additional_forward_args"):
        RawAttention(model).attribute((first, second))
    found = RawAttention(model).attribute(first, additional_forward_args=second)
    close(found, RawAttention(model.encoder).attribute(first + second))


def test_methods_that_explain_a_whole_pass_say_so():
    model, first, second = Siamese(vim(depth=1)), images(1), images(2)[1:]
    for method in (MambaLRP, RelevanceAttentionRanks):
        with pytest.raises(ValueError, match=rf"^{method.__name__}.*#2 belong to other inputs of the model, .*use Mam"):
            method(model).attribute(first, 1, additional_forward_args=second)
    with pytest.raises(UnsupportedModelError, match="Siamese calls it 2 times in one forward pass"):
        LayerGradCam(model).attribute(first, 1, additional_forward_args=second)


def test_a_layer_is_asked_for_with_the_mode_and_buffers_as_they_were():
    model, first, second = Siamese(vim(depth=1, drop_path=0.0)).train(), images(2), images(4)[2:]
    model.encoder.norm_f.register_buffer("seen", torch.zeros(()), persistent=False)
    state, random = torch.get_rng_state(), [module.training for module in model.modules()]
    maps = AttentionRollout(model).attribute((first, second))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == random
    model.eval()
    for found, truth in zip(maps, AttentionRollout(model).attribute((first, second)), strict=True):
        close(found, truth)


def test_inputs_that_are_no_batches():
    model = Siamese(vim(depth=1))
    with pytest.raises(TypeError, match=r"attribute\(inputs=\(\)\): expected a tensor of images, or several"):
        RawAttention(model).attribute(())
    with pytest.raises(ValueError, match=r"batches of different sizes, \(2, 3, 40, 24\), \(1, 3, 40, 24\)"):
        RawAttention(model).attribute((images(2), images(1)))
    assert len(CentreMap(model).attribute((images(2), images(2)))) == 2
    found = Occlusion(model, sliding_window_shapes=20, strides=20).attribute((images(1), images(1)), 1)
    assert [each.shape for each in found] == [(1, 1, *SIZE)] * 2
