import base64
import io

import numpy as np
import pytest
from PIL import Image

from mamba_attn import figures
from mamba_attn.figures import png
from mamba_attn.figures.picture import data_uri, encoded

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (12, 18, 3), dtype=np.uint8)
MAPS = [RANDOM.random(shape) for shape in ((12, 18), (4, 6), (6, 6), (3, 9), (1, 1))]
TITLES = ["pixels", "patches", "wide patches", "tall patches", "one"]


def of_kind(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


@pytest.mark.parametrize("kind", ["noise", "ramp"])  # stored as it is, and by what the pixels before predict
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 3), (64, 65)])
def test_the_png_inside_holds_every_pixel(shape, kind):
    noise = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
    ramp = np.add.outer(np.add.outer(np.arange(shape[0]) * 3, np.arange(shape[1]) * 2), [0, 90, 250])
    image = noise if kind == "noise" else ramp.astype(np.uint8)
    head, _, data = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    read = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (read.format, read.mode) == ("PNG", "RGB")
    np.testing.assert_array_equal(np.asarray(read), image)


def test_every_map_lies_over_the_whole_image():
    figure = figures.layer_grid(IMAGE, MAPS, TITLES, columns=3)
    images, heats = of_kind(figure, "image"), of_kind(figure, "heatmap")
    assert [note.text for note in figure.layout.annotations] == TITLES
    assert [trace.xaxis for trace in images] == [trace.xaxis for trace in heats] == ["x", "x2", "x3", "x4", "x5"]
    for image, heat, values in zip(images, heats, MAPS, strict=True):
        np.testing.assert_array_equal(heat.z, values.astype(np.float32))
        for start, step, pixels, cells in (
            (image.y0, image.dy, 12, values.shape[0]),
            (image.x0, image.dx, 18, values.shape[1]),
        ):  # cell 0 begins at -0.5 and the last one ends at cells - 0.5; so must the image
            assert start - step / 2 == pytest.approx(-0.5)
            assert start + (pixels - 0.5) * step == pytest.approx(cells - 0.5)
    assert figures.layer_grid(IMAGE, MAPS, TITLES, opacity=0.3).data[-1].opacity == 0.3


def test_images_keep_their_proportions_where_patches_are_not_square():
    layout = figures.layer_grid(IMAGE, MAPS, TITLES, size=120).layout
    ratios = [layout[f"yaxis{n}"].scaleratio for n in ("", 2, 3, 4, 5)]
    assert ratios == pytest.approx([1, 1, 2 / 3, 2, 2 / 3])  # a patch's height over its width
    width = layout.width - layout.margin.l - layout.margin.r
    assert (layout.xaxis.domain[1] - layout.xaxis.domain[0]) * width == pytest.approx(180, abs=1)
    height = layout.height - layout.margin.t - layout.margin.b
    assert height == 120


def test_panels_have_their_own_range_or_share_one():
    maps = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[-8.0, 0.0], [1.0, 2.0]])]
    own = of_kind(figures.layer_grid(IMAGE, maps, ["a", "b"]), "heatmap")
    assert [(trace.zmin, trace.zmax, trace.showscale) for trace in own] == [(-4, 4, False), (-8, 8, False)]
    shared = of_kind(figures.layer_grid(IMAGE, maps, ["a", "b"], shared=True), "heatmap")
    assert [(trace.zmin, trace.zmax, trace.showscale) for trace in shared] == [(-8, 8, True), (-8, 8, False)]


def test_the_image_is_stored_as_a_png_and_not_as_numbers():
    flat = np.full((256, 256, 3), 180, dtype=np.uint8)
    figure = figures.layer_grid(flat, [np.ones((8, 8))] * 24, [str(layer) for layer in range(24)])
    assert len(figure.to_json()) < 100_000  # 24 times 196 608 numbers, otherwise
    assert len(figures.overlay(flat, np.ones((256, 256))).data[0].source) < 2_000


DRAW = {"layer_grid": figures.layer_grid, "layer_grid_rgb": png.layer_grid_rgb}


@pytest.mark.parametrize("name", DRAW)
def test_what_does_not_fit_is_refused(name):
    draw = DRAW[name]
    with pytest.raises(
        ValueError, match=rf"{name}\(maps\[1\]\): \(5, 6\) cells do not tile an image of \(12, 18\) pixels"
    ):
        draw(IMAGE, [MAPS[0], np.ones((5, 6))], ["a", "b"])
    with pytest.raises(ValueError, match=rf"{name}\(maps\[0\]\): \(18, 12\) cells do not tile"):
        draw(IMAGE, [MAPS[0].T], ["a"])
    with pytest.raises(ValueError, match=rf"{name}\(maps\[0\]\): expected a \(rows, columns\) array"):
        draw(IMAGE, [MAPS[0][None]], ["a"])
    with pytest.raises(ValueError, match=rf"{name}\(image\): expected an image \(rows, columns, 3\)"):
        draw(IMAGE[..., 0], MAPS, TITLES)
    with pytest.raises(ValueError, match=r"got 5 panels(,| and) 1 "):
        draw(IMAGE, MAPS, ["a"])
    with pytest.raises(ValueError, match=r"got 0 panels"):
        draw(IMAGE, [], [])
    with pytest.raises(ValueError, match=r"\(columns=-1\): expected at least one column"):
        draw(IMAGE, MAPS, TITLES, columns=-1)


def test_the_sheet_shows_the_overlays_in_reading_order():
    sheet = png.layer_grid_rgb(IMAGE, MAPS[:3], ["", "", ""], columns=2, opacity=1, size=12)
    assert sheet.shape == (2 * (12 + 16 + 22), 2 * 18 + 24, 3)
    patches = MAPS[1].repeat(3, 0).repeat(3, 1)
    np.testing.assert_array_equal(sheet[8:20, 8:26], png.matrix_rgb(MAPS[0]))
    np.testing.assert_array_equal(sheet[8:20, 34:52], png.matrix_rgb(patches))
    np.testing.assert_array_equal(sheet[58:70, 8:26], png.matrix_rgb(MAPS[2].repeat(2, 0).repeat(3, 1)))
    assert (sheet[50:, 26:] == 255).all()
    mixed = png.layer_grid_rgb(IMAGE, [MAPS[1]], [""], opacity=0.25, size=12)
    np.testing.assert_array_equal(mixed[8:20, 8:26], png.overlay_rgb(IMAGE, patches, opacity=0.25))


def test_the_sheet_can_share_one_range():
    maps = [np.array([[0.0, 1.0]]), np.array([[0.0, 2.0]])]
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    options = {"opacity": 1, "colours": ["#000000", "#c8c8c8"], "size": 2}
    for shared, expected in ((False, 200), (True, 100)):
        sheet = png.layer_grid_rgb(image, maps, ["", ""], shared=shared, **options)
        assert sheet[8:10, 8:10, 0].tolist() == [[0, expected]] * 2
        assert sheet[8:10, 18:20, 0].tolist() == [[0, 200]] * 2


def test_a_photo_is_stored_small():
    rows, columns = np.mgrid[:200, :300]
    smooth = np.stack([rows, columns * 0.8, 127 + 120 * np.sin(rows / 30 + columns / 40)], axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "PNG")
    assert len(encoded(smooth)) < 1.1 * len(file.getvalue())
