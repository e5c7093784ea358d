"""What all methods promise: targets of every kind, captum's metrics on expanded maps, and sentences for the rest."""

import numpy as np
import pytest
import torch
from captum.attr import visualization
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from mamba_attn.attribution import AttentionRollout, MambaAttribution, MambaLRP, RawAttention, catalogue
from mamba_attn.attribution.targets import target_indices, target_values
from mamba_attn.errors import NonFiniteError
from tests.attribution.cases import SIZE, _livelier, images, vim, vmamba
from tests.attribution.vit.test_vit import build

METRICS = pytest.mark.parametrize("method", [RawAttention, AttentionRollout, MambaAttribution, MambaLRP])
MODELS = {
    "scans": lambda: vim(depth=2, class_token=None),
    "softmax": lambda: build("pooled")[0],
}
FAST = {
    "occlusion": {"sliding_window_shapes": 20, "strides": 20},
    "integrated_gradients": {"n_steps": 2},
    "keep_and_remove_lrp": {"draws": 1},
    "mask_refinement": {"steps": 2},
    "igos_plus_plus": {"steps": 2, "path": 2, "cells": 6, "sparsity": 0.0, "smoothness": 0.0},
}
PROBABILITIES = (
    "mask_refinement",
    "igos_plus_plus",
)  # that ask how likely the class is, which one number of a function does not say
EVERY = pytest.mark.parametrize(
    ("model", "name"),
    [
        (model, name)
        for model, kind in (("scans", catalogue.SCANS), ("softmax", catalogue.SOFTMAX))
        for name, entry in catalogue.METHODS.items()
        if kind in entry.made_of or entry.made_of == catalogue.ANY
    ],
)


class Segmenter(nn.Module):
    """A linear layer on every token of a VMamba: logits (batch, classes, height, width)."""

    def __init__(self):
        super().__init__()
        self.body = vmamba(depths=(1, 1), num_classes=0)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body.forward_features(x)).movedim(3, 1)


class Chosen(nn.Module):
    """The same numbers as logits (batch, classes) of one place, or any function of the dense output."""

    def __init__(self, model, choose):
        super().__init__()
        self.model = model
        self.choose = choose

    def forward(self, x):
        return self.choose(self.model(x))


@pytest.fixture
def segmenter():
    return _livelier(Segmenter())


@METRICS
def test_expanded_maps_go_through_captums_metrics_and_pictures(method):
    model, x = vim(depth=2), images(2)
    explainer = method(model)
    maps, expanded = explainer.attribute(x, 1), explainer.attribute(x, 1, expand=True)
    assert expanded.shape == x.shape
    torch.testing.assert_close(expanded.sum(1, keepdim=True), maps, rtol=1e-12, atol=0)
    assert torch.equal(expanded[:, 0], expanded[:, 2])

    def perturb(inputs):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    infidelities = infidelity(model, perturb, x, expanded, target=1, n_perturb_samples=3)
    assert infidelities.shape == (2,)
    assert infidelities.isfinite().all()
    changes = sensitivity_max(explainer.attribute, x, n_perturb_samples=2, target=[1, 0], expand=True)
    assert changes.shape == (2,)
    assert (changes > 0).all()
    sign = "positive" if (maps >= 0).all() else "all"
    figure, _ = visualization.visualize_image_attr(
        expanded[0].movedim(0, 2).numpy(), x[0].movedim(0, 2).numpy(), sign=sign, use_pyplot=False
    )
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == SIZE
    assert np.corrcoef(drawn.ravel(), maps[0, 0].numpy().ravel())[0, 1] > 0.99


@EVERY
def test_shapes_and_queries_of_every_method(model, name):
    model, x, entry = MODELS[model](), images(2), catalogue.get(name)
    explainer = catalogue.build(name, model, **FAST.get(name, {}))
    maps = explainer.attribute(x, [1, 3])
    assert maps.shape == (2, 1, *SIZE)
    assert not maps.requires_grad
    assert explainer.attribute(x, [1, 3], grid=True).shape == (2, 1, 5, 3)
    (expanded,) = explainer.attribute((x,), torch.tensor([1, 3]), expand=True)
    assert expanded.shape == x.shape
    tolerance = {"rtol": 1e-6, "atol": 1e-8 * float(maps.abs().max())}
    torch.testing.assert_close(expanded.sum(1, keepdim=True), maps, **tolerance)
    for image, target, found in zip(x, (1, 3), maps, strict=True):  # no image sees another
        torch.testing.assert_close(explainer.attribute(image[None], target)[0], found, **tolerance)
    if name not in PROBABILITIES:
        torch.testing.assert_close(explainer.attribute(x, lambda y: y[[0, 1], [1, 3]]), maps, **tolerance)
    with pytest.raises(ValueError, match=rf"{entry.method.__name__}\.attribute\(target=\[1, 9\]\)"):
        explainer.attribute(x, [1, 9])
    if entry.reads_rows:
        assert not torch.equal(explainer.attribute(x, 1, pixel=(20, 12)), maps)
    else:
        with pytest.raises(ValueError, match=r"pixel=\(20, 12\)\): this method reads no token's row"):
            explainer.attribute(x, 1, pixel=(20, 12))


@pytest.mark.parametrize(
    "name", [name for name, entry in catalogue.METHODS.items() if entry.made_of[0] != catalogue.SOFTMAX]
)
def test_every_method_explains_dense_outputs(segmenter, name):
    x, options, each = images(2), FAST.get(name, {}), [(2, 3, 1), (0, 4, 2)]
    maps = catalogue.build(name, segmenter, **options).attribute(x, each)
    assert float(maps.abs().max()) > 0
    for image, found, (category, row, column) in zip(x, maps, each, strict=True):
        one = Chosen(segmenter, lambda y, row=row, column=column: y[:, :, row, column])
        truth = catalogue.build(name, one, **options).attribute(image[None], category)[0]
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8 * float(truth.abs().max()))


def test_a_tuple_of_one_comes_back_as_one():
    explainer, x = RawAttention(vim(depth=1)), images(2)
    (maps,) = explainer.attribute((x,))
    assert torch.equal(maps, explainer.attribute(x))


@pytest.mark.parametrize("target", [(2, 3, 1), [(2, 3, 1), (0, 4, 2), (3, 0, 0)]])
def test_tuples_index_dense_outputs(segmenter, target):
    x, each = images(3), target if isinstance(target, list) else [target] * 3
    maps = MambaAttribution(segmenter).attribute(x, target)
    assert float(maps.abs().max()) > 0
    for image, found, (category, row, column) in zip(x, maps, each, strict=True):
        one = Chosen(segmenter, lambda y, row=row, column=column: y[:, :, row, column])
        truth = MambaAttribution(one).attribute(image[None], category)[0]
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))


@pytest.mark.parametrize("total", [False, True])
def test_functions_of_the_output_are_targets(segmenter, total):
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[2:4, 1:] = True

    def inside(output):
        sums = (output[:, 1] * mask).sum((1, 2))
        return sums.sum() if total else sums

    maps = MambaAttribution(segmenter).attribute(images(2), inside)
    classified = Chosen(segmenter, lambda y: y[..., mask].sum(-1))
    truth = MambaAttribution(classified).attribute(images(2), 1)
    torch.testing.assert_close(maps, truth, rtol=1e-9, atol=1e-12 * float(truth.max()))


@pytest.mark.changes_model("forward")
def test_other_outputs_need_a_function():
    model = Chosen(vim(depth=1), lambda y: {"once": y, "twice": 2 * y})
    maps = MambaAttribution(model).attribute(images(2), lambda output: output["once"][:, 3])
    torch.testing.assert_close(maps, MambaAttribution(model.model).attribute(images(2), 3))
    with pytest.raises(ValueError, match=r"target=3\): the model returned dict \(.*Give a function of the output"):
        MambaAttribution(model).attribute(images(2), 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            None,
            r"returned \(2, 4, 5, 3\), not \(batch, classes\), so there is no predicted class; give target=",
        ),
        (1, r"needs 3 indices after the batch's, not 1; give target=\(class, row, column\)"),
        ([1, 2], "needs 3 indices"),
        ((1, 2), "needs 3 indices after the batch's, not 2"),
        ((4, 0, 0), r"expected indices in 0\.\.3, 0\.\.4, 0\.\.2"),
        ((0, 0, -1), "expected indices in"),
        ([(0, 0, 0)], "one for each of the 2 images"),
        ([(0, 0, 0), (0, 0)], "tuples with equally many indices"),
        ([(0, 0, 0), 1], "tuples with equally many indices"),
        (torch.ones(2), "as integers"),
        ("cat", "as integers"),
        (["cat", "dog"], "as integers"),
        ([None, None], "as integers"),
        (lambda y: y, r"the function returned torch.float32 \(2, 4, 5, 3\); expected a scalar, or one number for each"),
        (lambda y: y[:, 0, 0, 0] > 0, "the function returned torch.bool"),
        (lambda y: float(y.sum()), "the function returned float"),
    ],
)
def test_targets_that_a_dense_output_has_not(target, message):
    with pytest.raises(ValueError, match=r"^call\(target=.*" + message):
        target_values("call", torch.zeros(2, 4, 5, 3), target, 2)


def test_a_tuple_of_a_classs_index_is_that_class():
    output = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    assert target_values("call", output, None, 2).tolist() == [2, 3]
    assert target_values("call", output, 1, 2).tolist() == [2, 1]
    assert target_values("call", output, (1,), 2).tolist() == [2, 1]
    assert target_indices("call", output, [0, 1], 2).tolist() == [[0], [1]]
    with pytest.raises(ValueError, match="needs 1 indices after the batch's, not 2"):
        target_values("call", output, (0, 1), 2)  # a list is one class per image, a tuple is not


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
def test_maps_that_no_class_changes_need_no_target(method, segmenter):
    assert method(segmenter).attribute(images(2)).shape == (2, 1, *SIZE)
    with pytest.raises(ValueError, match=r"expected indices in 0\.\.3, 0\.\.4, 0\.\.2"):
        method(segmenter).attribute(images(2), (9, 0, 0))


def test_a_target_is_needed_where_no_class_is_predicted(segmenter):
    with pytest.raises(ValueError, match=r"MambaAttribution\.attribute\(target=None\): .* no predicted class; give"):
        MambaAttribution(segmenter).attribute(images(2))


def test_two_shapes_at_once():
    explainer = RawAttention(vim(depth=1))
    with pytest.raises(ValueError, match=r"grid=True, expand=True\): the inputs' shape is in pixels"):
        explainer.attribute(images(2), grid=True, expand=True)


def test_nan_is_named_where_it_begins():
    model = vim(depth=2)
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    assert MambaAttribution(model).attribute(images(1), 0).isfinite().all()
    with pytest.raises(NonFiniteError, match="the value to explain is NaN or Inf; check the model's head"):
        MambaAttribution(model).attribute(images(1), 1)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mixer"):
        MambaAttribution(model).attribute(images(1) * torch.nan, 0)


class _Broken(RawAttention):
    def _maps(self, images, target, query, size, grid):
        maps = super()._maps(images, target, query, size, grid)
        maps[1, 0, 0, 0] = torch.inf
        return maps


def test_maps_with_nan_name_their_images():
    with pytest.raises(NonFiniteError, match="the maps of images 1 contain NaN or Inf"):
        _Broken(vim(depth=1)).attribute(images(3))
