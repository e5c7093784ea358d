"""The effective receptive field: by its definition, of every kind of model; what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

from mamba_attn import models, trace
from mamba_attn.erf.fields import Features, ReceptiveField, receptive_field
from mamba_attn.errors import NonFiniteError, TraceError, UnknownLayerError, UnsupportedModelError
from mamba_attn.models.vim import VisionMamba
from tests.attribution.cases import SIZE, images, vim, vmamba
from tests.integrations import small_mambavision
from tests.integrations.small_vim import Backbone, Vim


def by_definition(model, module, image, token_of, sign="positive"):
    """(rows, columns): own hook on a module, own sums; token_of picks (features,) of its output."""
    kept = []
    handle = module.register_forward_hook(lambda m, i, o: kept.append(o))
    x = image[None].clone().requires_grad_()
    model(x)
    handle.remove()
    torch.relu(token_of(kept[0])).sum().backward()
    gradient = x.grad[0]
    return (torch.relu(gradient) if sign == "positive" else gradient.abs()).sum(0)


def gradient_of(field):
    return torch.from_numpy(field.gradient)


@pytest.mark.parametrize("sign", ["positive", "absolute"])
def test_vim_behind_its_last_norm(sign):
    model, x = vim(), images(3)
    field = receptive_field(model, x, sign=sign, reach=False)
    token = model.layout(*SIZE).patches[2 * 3 + 1]  # a grid of 5 x 3
    truth = [by_definition(model, model.norm_f, each, lambda o: o[0, token], sign) for each in x]
    torch.testing.assert_close(gradient_of(field), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)
    assert field.gradient.shape == SIZE
    assert field.centre == (20, 12)
    assert (field.layer, field.images, field.skipped) == ("layers.2.mixer", 3, [])
    assert field.reader == "the patch in the middle"
    assert field.reach is None


@pytest.mark.parametrize("layer", ["layers.0.mixer", "layers.1.mixer", "layers.2.mixer"])
def test_vim_behind_any_block(layer):
    model, x = vim(class_token="first"), images(2)
    field = receptive_field(model, x, pixel=(9, 20), layer=layer, reach=False)
    number = int(layer.split(".")[1])
    module = model.norm_f if number == 2 else model.layers[number]
    truth = [by_definition(model, module, each, lambda o: o[0, 1 + 1 * 3 + 2]) for each in x]
    torch.testing.assert_close(gradient_of(field), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)
    assert field.centre == (12, 20)
    assert field.layer == layer


def test_vmamba_behind_its_last_norm_and_inside():
    model, x = vmamba(), images(2, (40, 56))
    field = receptive_field(model, x, reach=False)
    norm = next(module for module in model.classifier.modules() if isinstance(module, nn.LayerNorm))
    grid = model.layout(40, 56, 2).grid
    truth = [by_definition(model, norm, each, lambda o: o[0, grid[0] // 2, grid[1] // 2]) for each in x]
    torch.testing.assert_close(gradient_of(field), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)
    assert field.layer == "layers.2.blocks.0.op"
    inside = receptive_field(model, x, pixel=(17, 33), layer="layers.1.blocks.0.op", reach=False)
    truth = [by_definition(model, model.layers[1].blocks[0], each, lambda o: o[0, 2, 4]) for each in x]
    torch.testing.assert_close(gradient_of(inside), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)


def test_vit_and_its_class_token():
    model = models.create("vit_micro", image_size=SIZE, patch_size=8, embed_dim=16, num_heads=2, depth=2).double()
    x = images(2)
    for query, token in ((None, 1 + 2 * 3 + 1), ("class", 0)):
        field = receptive_field(model, x, query, reach=False)
        truth = [by_definition(model, model.norm, each, lambda o, token=token: o[0, token]) for each in x]
        torch.testing.assert_close(gradient_of(field), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)
    assert field.reader == "the class token"
    assert field.centre == (20, 12)


def test_blocks_with_their_residual_beside():
    """Official Vim's blocks return two tensors; their sum is the stream, and no module norms it here."""
    torch.manual_seed(0)
    model = Backbone([Vim(8), Vim(8)], (3, 5), {"cls_token": (7,)}).double().eval()
    x = images(2, (12, 20))
    field = receptive_field(model, x, pixel=(5, 9), reach=False)
    truth = [by_definition(model, model.layers[1], each, lambda o: (o[0] + o[1])[0, 8]) for each in x]
    torch.testing.assert_close(gradient_of(field), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)


def test_windows_and_channels_first():
    model, x = small_mambavision.build(), small_mambavision.images((56, 72))
    field = receptive_field(model, x, reach=False)
    truth = [by_definition(model, model.norm, each, lambda o: o[0, :, 2, 2]) for each in x]  # a grid of 4 x 5
    torch.testing.assert_close(gradient_of(field), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)


def test_a_box_is_the_mean_of_its_tokens():
    model, x = vim(class_token=None), images(2)
    field = receptive_field(model, x, box=(8, 0, 24, 16), reach=False)  # columns 1, 2 of rows 0, 1
    truth = [by_definition(model, model.norm_f, each, lambda o: o[0, [1, 2, 4, 5]]) / 4 for each in x]
    torch.testing.assert_close(gradient_of(field), torch.stack(truth).mean(0), rtol=1e-9, atol=1e-12)
    assert field.centre == (8, 16)
    assert field.reader == "the marked box"


def test_without_mixing_the_field_is_the_patch():
    model = vim(class_token=None)
    with torch.no_grad():
        for block in model.layers:
            block.mixer.out_proj.weight.zero_()
    field = receptive_field(model, images(4), pixel=(30, 5), sign="absolute", reach=False)
    inside = np.zeros(SIZE, dtype=bool)
    inside[24:32, 0:8] = True
    assert not field.gradient[~inside].any()
    assert (field.gradient[inside] > 0).all()
    assert field.rectangle(0.99)[0] <= 8
    assert 0 < field.distance < 4 * 2**0.5


def test_batches_do_not_matter_and_order_does_not():
    model, x = vim(), images(3)
    whole = receptive_field(model, x, reach=False)
    parts = receptive_field(model, iter([x[2:], x[:2]]), reach=False)
    np.testing.assert_allclose(parts.gradient, whole.gradient, rtol=1e-9)
    with torch.inference_mode():
        np.testing.assert_allclose(receptive_field(model, x, reach=False).gradient, whole.gradient, rtol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_with_nan_are_left_out_and_counted(bad):
    model, x = vim(), images(4)
    spoilt = x.clone()
    spoilt[1, 0, 3, 3], spoilt[3, 2] = bad, bad
    field = receptive_field(model, [spoilt[:2], spoilt[2:]])
    truth = receptive_field(model, x[[0, 2]])
    np.testing.assert_allclose(field.gradient, truth.gradient, rtol=1e-9)
    assert field.skipped == [1, 3]
    assert field.images == 2
    np.testing.assert_allclose(field.reach.rollout, truth.reach.rollout, rtol=1e-9)
    with pytest.raises(NonFiniteError, match="all 2 images gave NaN or Inf"):
        receptive_field(model, spoilt[[1, 3]])


def test_nothing_stays_on_the_model():
    model = vim().requires_grad_(False)
    before = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    receptive_field(model, images(1), reach=False)
    with pytest.raises(ValueError, match="pixel"):
        receptive_field(model, images(1), pixel=(99, 0))
    after = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    assert before == after
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def field(gradient, centre):
    return ReceptiveField(np.asarray(gradient, dtype=float), centre, "", "", 1, [], None)


def published_rectangle(data, thresh):
    """The rule of arXiv 2203.06717 in our words: growing odd squares about the middle pixel of a square."""
    side = len(data)
    for half in range(1, side // 2):
        own = slice(side // 2 - half, side // 2 + 1 + half)
        if data[own, own].sum() / data.sum() > thresh:
            return 2 * half + 1, ((2 * half + 1) / side) ** 2
    return None


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.99])
def test_rectangles_of_a_gaussian_are_the_published_ones(share):
    away = (np.arange(101) - 50) / 12
    gaussian = np.exp(-(away[:, None] ** 2 + away**2) / 2)
    side, area = field(gaussian, (50.5, 50.5)).rectangle(share)
    assert (side, area) == pytest.approx(published_rectangle(gaussian, share))


def test_rectangles_at_the_border_of_an_image_that_is_not_square():
    even = field(np.ones((10, 20)), (5, 10))
    assert even.rectangle(0) == (2, 4 / 200)
    assert even.rectangle(0.5) == (12, 120 / 200)
    corner = field(np.ones((10, 20)), (0.5, 0.5))
    assert corner.rectangle(0.1) == (9, 25 / 200)
    assert corner.rectangle(0.999)[1] == 1
    with pytest.raises(ValueError, match=r"rectangle\(share=1\): expected 0 <= share < 1"):
        even.rectangle(1)
    with pytest.raises(ValueError, match="a field that is not zero"):
        field(np.zeros((4, 4)), (2, 2)).rectangle(0.5)


def test_distance_and_what_is_shown():
    point = np.zeros((9, 9))
    point[1, 4] = 2
    assert field(point, (4.5, 4.5)).distance == 3
    assert np.isnan(field(np.zeros((3, 3)), (1, 1)).distance)
    shown = field([[32.0, 1.0], [0.0, 32.0]], (1, 1)).shown()
    np.testing.assert_allclose(shown, [[1, 0.5], [0, 1]])
    assert not field(np.zeros((3, 3)), (1, 1)).shown().any()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"sign": "negative"}, ValueError, r"receptive_field\(sign='negative'\): expected one of"),
        ({"pixel": (40, 3)}, ValueError, "outside the image of 40 x 24 pixels"),
        ({"pixel": (4, 3), "box": (0, 0, 9, 9)}, ValueError, "both choose the rows to read"),
        ({"query": "class", "pixel": (4, 3)}, ValueError, "give only one of query, pixel and box"),
        ({"query": "middle"}, ValueError, "query='middle'.: expected 'class'"),
        ({"images": images(1)[0]}, ValueError, r"images\(3, 40, 24\) of torch.float64.: expected normalised images"),
        ({"images": []}, ValueError, "expected at least one image, got none"),
        ({"images": [images(1), images(1, (24, 40))]}, ValueError, "24 x 40 pixels after 40 x 24"),
        ({"layer": "layers.2.mixr"}, UnknownLayerError, r"'layers.2.mixr'.*Did you mean 'layers\.2\.mixer'"),
    ],
)
def test_refusals(options, error, sentence):
    with pytest.raises(error, match=sentence):
        receptive_field(vim(), **{"images": images(1), "reach": False, **options})


def test_refusals_of_models():
    with pytest.raises(ValueError, match=r"query='class'\): there is no class token"):
        receptive_field(vmamba(), images(1), "class")
    with pytest.raises(UnsupportedModelError, match="Conv2d"):
        receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3)), images(1))

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = VisionMamba(image_size=SIZE, patch_size=8, embed_dim=8, depth=1).layers[0].mixer

        def forward(self, x):
            return self.mixer(x.flatten(2).mT[..., :8].mean(-1, keepdim=True).expand(-1, -1, 8)).mean(1)

    with pytest.raises(TraceError, match="place in the image is not known"):
        receptive_field(Sequence().double(), images(1))


def test_a_model_inside_another_and_hooks_of_its_own():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vim(class_token=None)

        def forward(self, x):
            return self.inner(x)

    model, seen = Wrapped(), []
    model.inner.norm_f.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    found = receptive_field(model, images(1), reach=False)
    assert found.layer == "inner.layers.2.mixer"
    assert seen == [(1, 15, 16)]
    np.testing.assert_array_equal(found.gradient, receptive_field(model.inner, images(1), reach=False).gradient)
    parallel = nn.DataParallel(model)
    np.testing.assert_array_equal(found.gradient, receptive_field(parallel, images(1), reach=False).gradient)


def test_a_layer_whose_tokens_nothing_returns():
    model = vim()
    with trace(model) as record:
        model(images(1))
    with Features(model) as features:
        pass
    with pytest.raises(UnsupportedModelError, match=r"no module after layers\.2\.mixer returns its 16 tokens; choose"):
        features.of(record.layers[-1])


def test_two_numbers_of_a_query_are_still_a_pixel():
    model = vim()
    with pytest.warns(
        DeprecationWarning, match=r"receptive_field\(query=\(9, 20\)\): query is deprecated; write pixel="
    ):
        found = receptive_field(model, images(2), (9, 20), reach=False)
    np.testing.assert_allclose(found.gradient, receptive_field(model, images(2), pixel=(9, 20), reach=False).gradient)
