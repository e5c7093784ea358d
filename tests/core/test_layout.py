"""The token frame: which token is which patch, and where patches lie in the image."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mamba_attn import trace
from mamba_attn.attribution.attention_rollout import to_finer
from mamba_attn.core.layout import TokenLayout
from tests.attribution.cases import vim
from tests.integrations.small_mambavision import windows_of

SIDE = st.integers(1, 7)


def test_vim_layout():
    layout = TokenLayout(grid=(14, 14), patch_size=16, class_tokens=(98,))
    assert layout.tokens == 197
    assert layout.step == 16
    assert layout.patches.tolist() == [*range(98), *range(99, 197)]


def test_patches_skip_class_tokens_and_registers():
    layout = TokenLayout(grid=(2, 3), class_tokens=(0, 4), registers=(8,))
    assert layout.tokens == 9
    assert layout.patches.tolist() == [1, 2, 3, 5, 6, 7]


@given(SIDE, SIDE, st.data())
def test_to_grid_drops_what_is_not_a_patch(height, width, data):
    tokens = height * width + 2
    extra = data.draw(st.lists(st.integers(0, tokens - 1), unique=True, min_size=2, max_size=2))
    layout = TokenLayout(grid=(height, width), class_tokens=(extra[0],), registers=(extra[1],))
    values = torch.full((2, 3, tokens), float("nan"))
    values[..., layout.patches] = torch.arange(2 * 3 * height * width, dtype=torch.float32).view(2, 3, -1)
    grid = layout.to_grid(values)
    assert grid.shape == (2, 3, height, width)
    assert torch.equal(grid.flatten(), torch.arange(2 * 3 * height * width, dtype=torch.float32))


@given(SIDE, SIDE, st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]))
def test_to_pixels_is_bilinear_interpolation_where_patches_tile(height, width, patch_size, dtype):
    layout = TokenLayout(grid=(height, width), patch_size=patch_size)
    values = torch.rand(2, 3, height, width, dtype=dtype)
    pixels = layout.to_pixels(values)
    size = (height * patch_size, width * patch_size)
    expected = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    assert pixels.dtype == dtype
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


@given(SIDE, SIDE, st.integers(0, 4), st.integers(1, 6))
def test_overlapping_patches_keep_their_centres(height, width, half, stride):
    patch_size = 2 * half + 1  # odd: a centre is a pixel
    layout = TokenLayout(grid=(height, width), patch_size=patch_size, stride=stride)
    values = torch.rand(height, width, dtype=torch.float64)
    pixels = layout.to_pixels(values)
    assert pixels.shape == ((height - 1) * stride + patch_size, (width - 1) * stride + patch_size)
    rows = torch.arange(height) * stride + half
    columns = torch.arange(width) * stride + half
    torch.testing.assert_close(pixels[rows][:, columns], values, rtol=0, atol=1e-12)
    for row in range(height):
        for column in range(width):
            patch = layout.patches[row * width + column]
            assert layout.token_at(int(rows[row]), int(columns[column])) == patch


def test_to_pixels_is_linear_between_centres_and_constant_outside():
    layout = TokenLayout(grid=(1, 2), patch_size=2, stride=4)
    pixels = layout.to_pixels(torch.tensor([[0.0, 1.0]]), size=(2, 8))
    # centres at pixel positions 1 and 5, pixels at 0.5, 1.5, ...
    expected = torch.tensor([0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1]).expand(2, 8)
    torch.testing.assert_close(pixels, expected)


def test_to_pixels_keeps_nan_out_of_other_images():
    values = torch.rand(2, 3, 3)
    values[0] = float("nan")
    assert TokenLayout(grid=(3, 3), patch_size=4).to_pixels(values)[1].isfinite().all()


@pytest.mark.parametrize(
    ("row", "column", "token"),
    [(0, 0, 0), (15, 15, 0), (15, 16, 1), (16, 15, 4), (16, 31.9, 5), (31, 63, 8), (20, 40, 7)],
)
def test_token_at_with_a_class_token_in_the_middle(row, column, token):
    layout = TokenLayout(grid=(2, 4), patch_size=16, class_tokens=(6,))
    assert layout.token_at(row, column) == token


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))
def test_token_at_is_the_patch_that_holds_the_pixel_where_patches_tile(height, width, patch_size):
    layout = TokenLayout(grid=(height, width), patch_size=patch_size)
    for row in range(height * patch_size):
        for column in range(width * patch_size):
            assert layout.token_at(row, column) == row // patch_size * width + column // patch_size


LAYOUT = TokenLayout(grid=(2, 3), patch_size=4, class_tokens=(0,))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: TokenLayout(grid=(0, 3)), r"TokenLayout\(grid=\(0, 3\), .*\): grid, patch_size and stride must be at"),
        (lambda: TokenLayout(grid=(2, 3), patch_size=0), r"patch_size=0, .* must be at least 1"),
        (lambda: TokenLayout(grid=(2, 3), stride=0), r"stride=0\): grid, patch_size and stride must be at least 1"),
        (lambda: TokenLayout(grid=(2, 3), class_tokens=(7,)), r"class_tokens=\(7,\) .* 0\.\.6 of a 2x3 grid with 1"),
        (lambda: TokenLayout(grid=(2, 3), registers=(-1,)), r"registers=\(-1,\) must be distinct token indices"),
        (lambda: TokenLayout(grid=(2, 3), class_tokens=(1,), registers=(1,)), r"must be distinct token indices"),
        (
            lambda: TokenLayout((2, 3), window=0),
            r"window=0, .* must be at least 1, and windows cannot hold",
        ),
        (
            lambda: TokenLayout((2, 3), window=2, class_tokens=(0,)),
            r"class_tokens=\(0,\), .* windows cannot hold",
        ),
        (
            lambda: TokenLayout((2, 3), window=2, registers=(0,)),
            r"registers=\(0,\)\): .* windows cannot hold",
        ),
        (
            lambda: TokenLayout((2, 3), window=2, columns_first=True),
            r"columns_first=True, .* or be numbered by columns",
        ),
        (lambda: LAYOUT.to_grid(torch.zeros(2, 6)), r"to_grid\(values\(2, 6\)\): expected 7 tokens in the last axis"),
        (lambda: LAYOUT.to_grid(torch.zeros(2, 6)), r"\(grid 2x3 and 1 other tokens\)"),
        (lambda: LAYOUT.token_at(8, 0), r"token_at: row 8 is outside the 8 pixels that the patches cover"),
        (lambda: LAYOUT.token_at(0, -1), r"token_at: column -1 is outside the 12 pixels that the patches cover"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@given(SIDE, SIDE, st.integers(1, 8))
def test_windows_cut_the_padded_grid(height, width, side):
    layout = TokenLayout((height, width), window=side)
    assert layout.padded == (math.ceil(height / side) * side, math.ceil(width / side) * side)
    assert layout.tokens == layout.padded[0] * layout.padded[1]
    windows = layout.windows()
    assert torch.equal(windows, windows_of(layout))
    assert windows.flatten().sort().values.tolist() == list(range(layout.tokens))
    rows, columns = layout.patches // layout.padded[1], layout.patches % layout.padded[1]
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (r, c) for r in range(height) for c in range(width)
    ]


@given(SIDE, SIDE, st.integers(1, 5), st.integers(1, 3))
def test_windows_there_and_back(height, width, side, axis):
    layout = TokenLayout((height, width), window=side)
    shape = [3, 2, 4, 2]
    shape[axis] = layout.tokens
    x = torch.randn(shape)
    cut = layout.to_windows(x, axis)
    order = layout.windows()
    assert cut.shape[0] == 3 * len(order)
    for number, window in enumerate(cut):
        assert torch.equal(window, x[number // len(order)].index_select(axis - 1, order[number % len(order)]))
    assert torch.equal(layout.from_windows(cut, axis), x)


def test_without_windows_all_tokens_are_in_one():
    layout = TokenLayout((2, 3), class_tokens=(2,))
    assert layout.windows().tolist() == [list(range(7))]
    assert layout.padded == (2, 3)
    x = torch.randn(2, 7, 4)
    assert layout.to_windows(x, 1) is layout.from_windows(x, 1) is x


def test_padding_lies_outside_the_image():
    padded, plain = TokenLayout((3, 5), 4, window=4), TokenLayout((3, 5), 4)
    values = torch.rand(2, padded.tokens)
    grid = values.view(2, 4, 8)[:, :3, :5]
    assert torch.equal(padded.to_grid(values), grid)
    assert torch.equal(padded.to_pixels(grid), plain.to_pixels(grid))
    for row in range(12):
        for column in range(20):
            assert padded.token_at(row, column) == row // 4 * 8 + column // 4
    with pytest.raises(ValueError, match="row 12 is outside the 12 pixels that the patches cover"):
        padded.token_at(12, 0)


def test_windows_remembered_in_inference_mode_serve_training():
    with torch.inference_mode():
        TokenLayout((6, 4), window=2).windows()
    x = torch.randn(1, 24, 2, requires_grad=True)
    TokenLayout((6, 4), window=2).to_windows(x, 1).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_an_offset_moves_the_centres():
    layout = TokenLayout(grid=(3, 2), patch_size=4, offset=0.5)
    ramp = torch.arange(6.0).view(3, 2)
    pixels = layout.to_pixels(ramp)
    assert pixels.shape == (12, 8)
    assert torch.equal(pixels[::4, ::4], ramp)  # a centre is the middle of its pixel
    torch.testing.assert_close(pixels[2, 0], torch.tensor(1.0))  # half way between rows 0 and 1
    assert layout.token_at(0, 0) == layout.token_at(1, 1) == 0
    assert layout.token_at(3, 3) == 3
    assert TokenLayout(grid=(3, 2), patch_size=4).token_at(3, 3) == 0


LAYOUTS = {
    "class token": TokenLayout((3, 5), patch_size=4, class_tokens=(7,)),
    "registers": TokenLayout((3, 5), patch_size=4, stride=2, class_tokens=(0,), registers=(3, 17)),
    "patches alone": TokenLayout((3, 5), patch_size=4),
    "one row": TokenLayout((1, 5), patch_size=4, class_tokens=(0,)),
    "padded windows": TokenLayout((3, 5), patch_size=4, window=2),
}


@pytest.mark.parametrize("size", [None, (13, 21)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pixels_of_tokens_are_those_of_their_map(name, size):
    layout = LAYOUTS[name]
    values = torch.randn(2, 3, layout.tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = layout.to_pixels(layout.to_grid(values), size)
    assert torch.equal(layout.to_pixels(values, size), expected)
    assert torch.equal(layout.to_pixels(values[..., layout.patches], size), expected)
    torch.testing.assert_close(layout.to_pixels(values[0, 0], size), expected[0, 0], rtol=0, atol=1e-14)


def test_pixels_of_a_row_of_attention():
    model, images = vim(), torch.randn(2, 3, 40, 24, dtype=torch.float64)
    with torch.no_grad(), trace(model) as record:
        model(images)
    layer = record[0]
    pixels = layer.layout.to_pixels(layer.row(0), (40, 24))
    assert torch.equal(pixels, layer.layout.to_pixels(layer.layout.to_grid(layer.row(0)), (40, 24)))
    assert pixels.std() > 0


@pytest.mark.parametrize("shape", [(2, 14), (5, 3), (17,), (), (2, 3, 4)])
def test_pixels_say_what_they_are_made_of(shape):
    message = (
        f"to_pixels(values{shape}): expected a map (..., 3, 5) on the patch grid, (..., 16) with one number per "
        "token, or (..., 15) with one number per patch."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        LAYOUTS["class token"].to_pixels(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"on the patch grid, or \(\.\.\., 15\) with one number per patch\.$"):
        LAYOUTS["patches alone"].to_pixels(torch.zeros(shape))


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_pixels_of_no_image(size):
    with pytest.raises(ValueError, match=r"to_pixels\(size=.*\): expected \(rows, columns\) of the image"):
        LAYOUTS["one row"].to_pixels(torch.zeros(1, 5), size)


GRIDS = [(11,), (3, 5), (2, 3, 5), (2, 3, 2, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("classes", [(), (2,)])
def test_a_grid_of_any_rank_holds_its_patches_in_raster_order(grid: tuple[int, ...], classes: tuple[int, ...]) -> None:
    layout = TokenLayout(grid=grid, class_tokens=classes)
    values = torch.full((2, layout.tokens), float("nan"))
    values[:, layout.patches] = torch.arange(2 * math.prod(grid), dtype=torch.float32).view(2, -1)
    assert torch.equal(layout.to_grid(values), torch.arange(2 * math.prod(grid), dtype=torch.float32).view(2, *grid))


@pytest.mark.parametrize("grid", GRIDS[:3])
def test_to_pixels_interpolates_each_axis_by_itself(grid: tuple[int, ...]) -> None:
    layout = TokenLayout(grid=grid, patch_size=4)
    values = torch.rand(2, 3, *grid, dtype=torch.float64)
    mode = ("linear", "bilinear", "trilinear")[len(grid) - 1]
    expected = F.interpolate(values, size=tuple(4 * n for n in grid), mode=mode, align_corners=False)
    torch.testing.assert_close(layout.to_pixels(values), expected, rtol=0, atol=1e-12)


def test_a_video_has_patches_of_few_frames_and_many_pixels() -> None:
    layout = TokenLayout(grid=(4, 3, 5), patch_size=(2, 16, 8), stride=(1, 16, 8), class_tokens=(0,))
    assert layout.covered == (5, 48, 40)
    assert (layout.steps, layout.centres) == ((1, 16, 8), (1.0, 8.0, 4.0))
    assert layout.to_pixels(torch.rand(2, 61)).shape == (2, 5, 48, 40)
    assert layout.token_at(0, 0, 0) == 1
    assert layout.token_at(4.5, 47, 39) == 60
    assert layout.token_at(2, 20, 9) == 1 + (2 * 3 + 1) * 5 + 1


def test_windows_of_a_volume_are_cubes() -> None:
    layout = TokenLayout(grid=(3, 2, 5), window=2)
    assert (layout.padded, layout.tokens, layout.windows().shape) == ((4, 2, 6), 48, (6, 8))
    frame = torch.arange(48).view(4, 2, 6)
    assert torch.equal(layout.windows()[4], frame[2:, :, 2:4].flatten())
    x = torch.randn(3, 2, 48)
    assert torch.equal(layout.from_windows(layout.to_windows(x, 2), 2), x)
    assert torch.equal(layout.to_grid(x), x.view(3, 2, 4, 2, 6)[:, :, :3, :, :5])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: TokenLayout(grid=()), r"TokenLayout\(grid=\(\), .*must be at least 1"),
        (
            lambda: TokenLayout(grid=(2, 3, 4), patch_size=(2, 2)),
            r"patch_size=\(2, 2\)\): expected one number, or one per",
        ),
        (lambda: TokenLayout(grid=(2, 3, 4)).token_at(1, 1), r"token_at\(1, 1\): expected 3 numbers"),
        (lambda: TokenLayout(grid=(2, 3, 4)).token_at(2, 0, 0), r"place\[0\] 2 is outside the 2 pixels"),
        (lambda: TokenLayout(grid=(2, 3, 4)).to_pixels(torch.ones(24), (4, 4)), r"size=\(4, 4\)\): expected 3 numbers"),
    ],
)
def test_bad_input_for_grids_of_any_rank(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_patches_that_are_numbered_by_columns():
    layout = TokenLayout((2, 3), 4, class_tokens=(2,), columns_first=True)
    assert layout.patches.tolist() == [0, 3, 5, 1, 4, 6]
    values = torch.randn(2, 7)
    on_grid = torch.cat([values[:, :2], values[:, 3:]], 1).view(2, 3, 2).mT
    assert torch.equal(layout.to_grid(values), on_grid)
    assert layout.token_at(5, 9) == 6
    other = TokenLayout((2, 3), 4, class_tokens=(2,))
    assert torch.equal(other.to_grid(to_finer(values, other, layout)), on_grid)
