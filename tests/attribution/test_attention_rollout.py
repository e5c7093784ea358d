import pytest
import torch
from torch import nn

from mamba_attn.attribution import AttentionRollout
from mamba_attn.attribution._stages import Downsampling, downsamplings, to_finer
from mamba_attn.attribution.attention_rollout import roll_out
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.layout import TokenLayout
from mamba_attn.tracing import trace
from tests.attribution.cases import MODELS, SIZE, averaging, images, matrices, pooled, vim, vmamba

V3 = Downsampling((3, 3), (2, 2), (1, 1))


def record_of(model, inputs, **options):
    with torch.no_grad(), trace(model, **options) as record:
        model(inputs)
    return record.layers


def dense_rollout(model, inputs, signed):
    """The whole product, (batch, last tokens, first tokens)."""
    product, before = None, None
    for layout, matrix in matrices(model, inputs):
        step = torch.eye(layout.tokens) + (matrix if signed else matrix.clamp(min=0))
        step = step if signed else step / step.sum(-1, keepdim=True)
        if product is None:
            product = step
        else:
            if before != layout.grid:
                product = averaging(model, before, layout.grid) @ product
            product = step @ product
        before = layout.grid
    return product


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("signed", [False, True])
def test_against_the_dense_product(name, signed):
    model, inputs = MODELS[name](), images()
    product = dense_rollout(model, inputs, signed)
    layers = record_of(model, inputs)
    last = list(layers[-1].layout.class_tokens) or list(range(layers[-1].layout.tokens))
    row = product[:, last].mean(1)
    layout = layers[0].layout
    expected = layout.to_pixels(layout.to_grid(row), SIZE).unsqueeze(1)
    actual = AttentionRollout(model, signed=signed).attribute(inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["middle", "pooled", "vmamba"])
def test_signed_in_float32_equals_the_dense_product(name):
    model, inputs = MODELS[name](), images()
    product = dense_rollout(model, inputs, signed=True)
    layers = record_of(model.float(), inputs.float())
    row = torch.randn(3, layers[-1].scan.tokens)
    expected = (row.double().unsqueeze(1) @ product).squeeze(1)
    actual = roll_out(layers, row, downsamplings(model, layers), signed=True)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_law_9_rows_sum_to_one(name):
    model, inputs = MODELS[name](), images(batch=2)
    layers = record_of(model, inputs)
    between = downsamplings(model, layers)
    tokens = layers[-1].scan.tokens
    with torch.no_grad():
        product = torch.stack(
            [roll_out(layers, unit.expand(2, -1), between) for unit in torch.eye(tokens, dtype=torch.float64)], dim=1
        )
    assert product.shape == (2, tokens, layers[0].scan.tokens)
    assert (product >= 0).all()
    torch.testing.assert_close(product.sum(-1), torch.ones(2, tokens, dtype=torch.float64), rtol=0, atol=1e-12)


def test_layers_left_out_act_as_the_identity():
    model, inputs = vmamba(), images()
    # stages 0 and 2 alone: both downsampling layers lie between
    pattern = ["layers.0.*", "layers.2.*"]
    layers = record_of(model, inputs, layers=pattern)
    (first, A), _, _, (last, C) = matrices(model, inputs)
    steps = [torch.eye(layout.tokens) + matrix.clamp(min=0) for layout, matrix in ((first, A), (last, C))]
    A, C = (step / step.sum(-1, keepdim=True) for step in steps)
    down = averaging(model, (5, 3), (3, 2)) @ averaging(model, (10, 6), (5, 3))
    expected = (C @ down @ A).mean(1)
    row = roll_out(layers, torch.full((3, 6), 1 / 6, dtype=torch.float64), downsamplings(model, layers))
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fine", "coarse"), [((7, 4), (4, 2)), ((8, 5), (4, 3)), ((1, 2), (1, 1))])
@pytest.mark.parametrize("between", [[V3], []])
def test_downsampling_is_its_averaging_matrix(fine, coarse, between):
    coarse_tokens = coarse[0] * coarse[1]
    row = torch.eye(coarse_tokens, dtype=torch.float64)
    matrix = to_finer(row, TokenLayout(fine), TokenLayout(coarse), between)
    expected = pooled(fine, coarse, 3, padding=1) if between else pooled(fine, coarse, 2, ceil_mode=True)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-14)


def test_overlapping_windows_leave_no_lattice():
    even = torch.full((1, 16), 1 / 16, dtype=torch.float64)
    finer = to_finer(even, TokenLayout((8, 8)), TokenLayout((4, 4)), [V3]).view(8, 8)
    inside = finer[2:5, 2:5]  # away from the border
    torch.testing.assert_close(inside, torch.full((3, 3), 1 / 64, dtype=torch.float64), rtol=1e-12, atol=0)


def test_strided_convolutions_between_layers_are_found():
    layers = record_of(vmamba(), images())
    assert downsamplings(vmamba(), layers) == [[V3], [], [V3]]
    model = vmamba(generation="v0", mlp_ratio=0.0)
    assert downsamplings(model, record_of(model, images())) == [[], [], []]
    padded = vmamba()
    padded.layers[0].downsample[1] = nn.Conv2d(8, 16, 3, 2, 1, dilation=2)  # not a window of neighbours
    assert downsamplings(padded, layers) == [[], [], [V3]]


def test_grids_that_cannot_be_averaged():
    row, small, large = torch.ones(1, 4), TokenLayout((2, 2)), TokenLayout((4, 4))
    with pytest.raises(UnsupportedModelError, match="from a grid of 2x2 to one of 4x4: only patches, on grids that sh"):
        to_finer(torch.ones(1, 16), small, large, [])
    with pytest.raises(UnsupportedModelError, match="name the layers of one stage with layers="):
        to_finer(row, TokenLayout((4, 4), class_tokens=(0,)), small, [])


def test_one_image_of_another_size_and_a_class_token_in_the_frame():
    model = vim(depth=2)
    assert AttentionRollout(model).attribute(images(1, (33, 17))).shape == (1, 1, 33, 17)
    layers = record_of(model, images(1))
    row = roll_out(layers, torch.eye(16, dtype=torch.float64)[:1], [[]])
    assert 0 < AttentionRollout(model).attribute(images(1), grid=True).sum() < row.sum()  # the class token keeps some
