import pytest
import torch
from captum.attr import Attribution
from torch import nn

from mamba_attn.attribution import AttentionRollout, MambaAttribution, RawAttention, TokenAttribution
from mamba_attn.errors import NonFiniteError, UnknownLayerError, UnsupportedModelError
from tests.attribution.cases import MODELS, SIZE, images, vim, vmamba

ALL = pytest.mark.parametrize("method", [RawAttention, AttentionRollout, MambaAttribution])
BOTH = pytest.mark.parametrize("method", [RawAttention, AttentionRollout])


@ALL
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("signed", [False, True])
def test_one_map_per_image_at_its_size_and_positive_unless_signed(method, name, signed):
    maps = method(MODELS[name](), signed=signed).attribute(images())
    assert maps.shape == (3, 1, *SIZE)
    assert maps.isfinite().all()
    assert maps.std() > 0
    assert signed or (maps >= 0).all()


@ALL
@pytest.mark.parametrize("name", ["middle", "vmamba"])
def test_permuting_the_batch_permutes_the_maps(method, name):
    model, order = MODELS[name](), torch.tensor([2, 0, 1])
    maps = method(model).attribute(images())
    torch.testing.assert_close(method(model).attribute(images()[order]), maps[order], rtol=0, atol=1e-14)
    assert (maps[0] - maps[1]).abs().max() > 1e-6


@ALL
def test_grid_is_the_patch_grid_and_the_map_is_interpolated_from_it(method):
    model = vim(stride=4)
    grid, maps = method(model).attribute(images(), grid=True), method(model).attribute(images())
    assert grid.shape == (3, 1, 9, 5)  # (40 - 8) / 4 + 1 patches down, (24 - 8) / 4 + 1 across
    # the centre of patch (r, c) lies between the pixels 4 r + 3 and 4 r + 4, 1/8 of a step from each: per axis, the
    # mean of the pixels at a centre has 7/8 of the patch and 1/16 of either neighbour
    rows, columns = 4 * torch.arange(9) + 3, 4 * torch.arange(5) + 3
    corners = torch.stack([maps[:, :, rows + i][..., columns + j] for i in (0, 1) for j in (0, 1)]).mean(0)
    taps = torch.tensor([1 / 16, 7 / 8, 1 / 16], dtype=torch.float64)
    expected = nn.functional.conv2d(grid, torch.outer(taps, taps)[None, None])
    torch.testing.assert_close(corners[..., 1:-1, 1:-1], expected, rtol=0, atol=1e-14)


@BOTH
@pytest.mark.parametrize("target", [None, 3, [0, 4, 2], torch.tensor([0, 4, 2]), torch.tensor(3)])
def test_targets_are_taken_in_every_form_and_do_not_matter(method, target):
    model = vim(depth=1)
    torch.testing.assert_close(
        method(model).attribute(images(), target=target), method(model).attribute(images()), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, r"target=5\): expected class indices in 0\.\.4"),
        ([0, 1, -1], r"expected class indices in 0\.\.4"),
        ([0, 1], "one for each of the 3 images"),
        (torch.zeros(3, 1, dtype=torch.long), "one for each of the 3 images"),
        (torch.tensor([0.0, 1.0, 2.0]), "as integers"),
        (torch.tensor([True, False, True]), "as integers"),
    ],
)
def test_targets_that_are_no_classes(target, message):
    with pytest.raises(ValueError, match=message):
        RawAttention(vim(depth=1)).attribute(images(), target=target)


@ALL
@pytest.mark.parametrize("shape", [(40, 24), (0, 3, 40, 24)])
def test_inputs_that_are_no_batch(method, shape):
    with pytest.raises(ValueError, match=r"attribute\(inputs\(.*\)\): expected images \(batch, colours, "):
        method(vim(depth=1)).attribute(torch.zeros(shape, dtype=torch.float64))


@ALL
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_of_the_model_or_the_inputs_changes(method, training, grad):
    model = vim(drop_path=0.0).train(training)
    inputs = images().requires_grad_(grad)
    before, state = inputs.detach().clone(), {name: value.clone() for name, value in model.state_dict().items()}
    maps = method(model).attribute(inputs)
    assert not maps.requires_grad
    assert inputs.grad is None
    assert inputs.requires_grad == grad
    assert torch.equal(inputs, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training == training  # hooks, attributes and gradients are compared after every test


@ALL
def test_layers_are_chosen_by_pattern(method):
    model = vim()
    one, every = method(model, layers=["layers.1.mixer"]), method(model, layers=["layers.?.mixer"])
    assert (one.attribute(images()) - every.attribute(images())).abs().max() > 1e-8
    torch.testing.assert_close(every.attribute(images()), method(model).attribute(images()), rtol=0, atol=0)
    with pytest.raises(UnknownLayerError, match=r"'layers\.9\.mixer' fits no layer"):
        method(model, layers=["layers.9.mixer"]).attribute(images())


def test_several_grids_have_no_common_grid():
    with pytest.raises(ValueError, match=r"grid=True\): the layers are on several grids \(10x6, 5x3, 3x2\)"):
        RawAttention(vmamba()).attribute(images(), grid=True)
    assert RawAttention(vmamba(), layers=["layers.1.*"]).attribute(images(), grid=True).shape == (3, 1, 5, 3)


def test_captum_knows_the_methods():
    assert issubclass(TokenAttribution, Attribution)
    assert RawAttention(vim(depth=1)).get_name() == "Raw Attention"
    with pytest.raises(TypeError, match="abstract"):
        TokenAttribution(vim(depth=1))


def test_models_that_cannot_be_explained():
    # the tests' own type check speaks before the sentence that users get
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function|violates type hint .*Module"):
        RawAttention(lambda x: x)
    with pytest.raises(UnsupportedModelError, match="no layer that can be traced"):
        RawAttention(nn.Linear(2, 2)).attribute(images())
    broken = vim(depth=1)
    with torch.no_grad():
        broken.pos_embed[:] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mixer"):
        AttentionRollout(broken).attribute(images())
