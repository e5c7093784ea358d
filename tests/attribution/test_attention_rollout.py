import pytest
import torch

from mamba_attn.attribution import AttentionRollout
from mamba_attn.attribution.attention_rollout import roll_out, to_finer
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import MODELS, SIZE, averaging, images, matrices, vim, vmamba


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
                product = averaging(before, layout.grid) @ product
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
    actual = roll_out(layers, row, signed=True)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_law_9_rows_sum_to_one(name):
    model, inputs = MODELS[name](), images(batch=2)
    layers = record_of(model, inputs)
    tokens = layers[-1].scan.tokens
    with torch.no_grad():
        product = torch.stack(
            [roll_out(layers, unit.expand(2, -1)) for unit in torch.eye(tokens, dtype=torch.float64)], dim=1
        )
    assert product.shape == (2, tokens, layers[0].scan.tokens)
    assert (product >= 0).all()
    torch.testing.assert_close(product.sum(-1), torch.ones(2, tokens, dtype=torch.float64), rtol=0, atol=1e-12)


def test_layers_left_out_act_as_the_identity():
    model, inputs = vmamba(), images()
    # stages 0 and 2 alone: twice halved, an odd side between
    pattern = ["layers.0.*", "layers.2.*"]
    layers = record_of(model, inputs, layers=pattern)
    (first, A), _, _, (last, C) = matrices(model, inputs)
    steps = [torch.eye(layout.tokens) + matrix.clamp(min=0) for layout, matrix in ((first, A), (last, C))]
    A, C = (step / step.sum(-1, keepdim=True) for step in steps)
    down = averaging((5, 3), (3, 2)) @ averaging((10, 6), (5, 3))
    expected = (C @ down @ A).mean(1)
    row = roll_out(layers, torch.full((3, 6), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fine", "coarse"), [((7, 4), (4, 2)), ((8, 5), (4, 3)), ((1, 2), (1, 1))])
def test_downsampling_is_its_averaging_matrix(fine, coarse):
    coarse_tokens = coarse[0] * coarse[1]
    row = torch.eye(coarse_tokens, dtype=torch.float64)
    matrix = to_finer(row, TokenLayout(fine, 4), TokenLayout(coarse, 8))
    torch.testing.assert_close(matrix, averaging(fine, coarse), rtol=0, atol=1e-14)


def test_padding_of_windows_takes_nothing_from_one_stage_to_the_other():
    finer, coarser = TokenLayout((5, 7), 4, window=4), TokenLayout((3, 4), 8, window=2)
    row = torch.rand(2, coarser.tokens, dtype=torch.float64)
    fine = to_finer(row, finer, coarser)
    expected = coarser.to_grid(row).flatten(1) @ averaging((5, 7), (3, 4))
    torch.testing.assert_close(finer.to_grid(fine).flatten(1), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(fine.sum(1), row[:, coarser.patches].sum(1), rtol=0, atol=1e-14)  # padding has none
    assert to_finer(row, coarser, coarser) is row


def test_other_windows_of_one_grid_are_another_frame():
    row = torch.rand(1, 24, dtype=torch.float64)
    coarser, finer = TokenLayout((3, 5), window=2), TokenLayout((3, 5), window=3)
    moved = to_finer(row, finer, coarser)
    assert moved.shape == (1, finer.tokens)
    assert torch.equal(finer.to_grid(moved), coarser.to_grid(row))


def test_patches_stay_where_they_are_between_layers_of_other_padding():
    coarser = TokenLayout((3, 5), class_tokens=(0,), registers=(16, 17))
    finer = TokenLayout((3, 5), class_tokens=(7,), registers=(16, 17, 18, 19, 20))
    row = torch.rand(2, 18, dtype=torch.float64)
    moved = to_finer(row, finer, coarser)
    assert torch.equal(finer.to_grid(moved), coarser.to_grid(row))
    assert torch.equal(moved[:, 7], row[:, 0])
    assert bool((moved[:, 16:] == 0).all())
    with pytest.raises(UnsupportedModelError, match="only patches, on grids that shrink"):
        to_finer(row, TokenLayout((3, 5)), coarser)  # a class token that was not there before


def test_blocks_are_as_equal_as_can_be_where_the_strides_do_not_tell():
    row = torch.eye(4, dtype=torch.float64)
    matrix = to_finer(row, TokenLayout((5, 1)), TokenLayout((4, 1)))
    expected = [[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    torch.testing.assert_close(matrix, torch.tensor(expected, dtype=torch.float64))


def test_an_even_row_stays_even():
    even = torch.full((1, 16), 1 / 16, dtype=torch.float64)
    finer = to_finer(even, TokenLayout((32, 32), 4), TokenLayout((4, 4), 32))
    torch.testing.assert_close(finer, torch.full((1, 1024), 1 / 1024, dtype=torch.float64))


def test_grids_that_cannot_be_averaged():
    row, small, large = torch.ones(1, 4), TokenLayout((2, 2)), TokenLayout((4, 4))
    with pytest.raises(UnsupportedModelError, match="from a grid of 2x2 to one of 4x4: only patches, on grids that sh"):
        to_finer(torch.ones(1, 16), small, large)
    with pytest.raises(UnsupportedModelError, match="name the layers of one stage with layers="):
        to_finer(row, TokenLayout((4, 4), class_tokens=(0,)), small)


def test_one_image_of_another_size_and_a_class_token_in_the_frame():
    model = vim(depth=2)
    assert AttentionRollout(model).attribute(images(1, (33, 17))).shape == (1, 1, 33, 17)
    layers = record_of(model, images(1))
    row = roll_out(layers, torch.eye(16, dtype=torch.float64)[:1])
    assert 0 < AttentionRollout(model).attribute(images(1), grid=True).sum() < row.sum()  # the class token keeps some
