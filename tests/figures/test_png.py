import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_attn import figures
from mamba_attn.figures import png
from mamba_attn.figures.colours import DIVERGING, SEQUENTIAL

IMAGE = np.zeros((2, 3, 3), dtype=np.uint8)
IMAGE[:, :, 1] = 100


def rgb(colour):
    if colour.startswith("#"):
        return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return [int(part) for part in colour[4:-1].split(",")]


def test_ends_and_middles_have_the_lists_colours():
    values = np.linspace(0, 9, 10).reshape(2, 5)  # ten colours in Inferno
    assert png.matrix_rgb(values).reshape(10, 3).tolist() == [rgb(colour) for colour in SEQUENTIAL]
    signed = png.matrix_rgb(np.array([[-2.0, 0.0, 2.0]]))
    assert signed[0].tolist() == [rgb(DIVERGING[index]) for index in (0, 4, 8)]


def test_colours_between_are_interpolated_and_beyond_clipped():
    values = np.array([[-5.0, 0.0, 0.25, 1.0, 7.0]])
    shown = png.matrix_rgb(values, signed=False, limits=(0, 1), colours=["#000000", "#c80064"])
    assert shown[0].tolist() == [[0, 0, 0], [0, 0, 0], [50, 0, 25], [200, 0, 100], [200, 0, 100]]


def test_what_is_not_finite_is_grey():
    shown = png.matrix_rgb(np.array([[np.nan, 1.0, np.inf, 2.0]]))
    assert shown[0, [0, 2]].tolist() == [[128] * 3] * 2
    assert shown[0, [1, 3]].tolist() == [rgb(SEQUENTIAL[0]), rgb(SEQUENTIAL[-1])]


def test_overlay_mixes_image_and_colours():
    values = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    mixed = png.overlay_rgb(IMAGE, values, opacity=0.25, colours=["#000000", "#ffffff"])
    assert mixed[0, 0].tolist() == [0, 75, 0]
    assert mixed[0, 1].tolist() == [64, 139, 64]
    assert np.array_equal(png.overlay_rgb(IMAGE, values, opacity=0), IMAGE)
    with pytest.raises(ValueError, match=r"the map is \(3, 2\) pixels, the image \(2, 3\)"):
        png.overlay_rgb(IMAGE, values.T)


def test_overlay_takes_what_torch_has():
    values = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    expected = figures.overlay_rgb(IMAGE, values.numpy())
    assert (expected.dtype, expected.shape) == (np.uint8, (2, 3, 3))
    pixels = torch.tensor(IMAGE).permute(2, 0, 1)  # (3, 2, 3)
    tall = torch.cat([pixels, pixels], dim=2)  # (3, 2, 6): no axis of three but the first
    wide = figures.overlay_rgb(tall, values.repeat(1, 2))
    assert np.array_equal(wide[:, :3], expected)
    for image in (tall / 255, (tall / 255).bfloat16().requires_grad_(), (tall / 255).double()):
        assert np.abs(figures.overlay_rgb(image, values.repeat(1, 2).requires_grad_()) - wide.astype(int)).max() <= 1


def test_a_normalised_image_is_refused_with_what_to_do():
    normalised = torch.randn(3, 4, 5)
    with pytest.raises(ValueError, match=r"overlay_rgb\(image\): .* 0\.\.1 \(before normalisation\), got float32 in -"):
        figures.overlay_rgb(normalised, np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"undo what the model's transform did: image \* std \+ mean"):
        figures.overlay_rgb(normalised, np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5\); pass images\[0\] of a batch"):
        figures.overlay_rgb(torch.rand(2, 3, 4, 5), np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"overlay_rgb\(values\): .* pass a single map, e\.g\. maps\[0, 0\]"):
        figures.overlay_rgb(torch.rand(3, 4, 5), np.ones((1, 1, 4, 5)))


def test_charts_leave_matplotlibs_state_alone_and_take_names_as_they_are():
    code = """
import matplotlib, sys
from mamba_attn.figures import png
backend = matplotlib.rcParams._get_backend_or_none()
png.scan_path_rgb([0, 1], (1, 2), size=40)
png.reach_rgb([[[1, 2]]], ["$x"], layers=["a"], series={"_$y^{": [1.0]}, title="$")
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams._get_backend_or_none() == backend
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_without_matplotlib_the_charts_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"charts as PNG need matplotlib: pip install 'mamba_attn\[viz\]'"):
        png.scan_path_rgb([0, 1], (1, 2))


def test_panels_stand_side_by_side_with_captions():
    wide, square = np.full((10, 20, 3), 50, np.uint8), np.full((10, 10, 3), 80, np.uint8)
    sheet = png.side_by_side([wide, square], ["wide", "a square panel with a caption that is too long"], height=50)
    assert sheet.shape == (50 + 16 + 22 + 13, 100 + 50 + 24, 3)  # the second caption takes two lines
    assert (sheet[8:58, 8:108] == 50).all()
    assert (sheet[8:58, 116:166] == 80).all()
    assert (sheet[:8] == 255).all()
    for left, right in ((8, 108), (116, 166)):
        assert (sheet[60:, left:right] < 128).any()  # ink
    assert (sheet[60:, 108:116] == 255).all()
    assert (sheet[60:, 166:] == 255).all()
    empty = png.side_by_side([wide], [""], height=50)
    assert (empty[60:] == 255).all()
    assert png.side_by_side([wide], ["x"], height=5).shape[0] == 10 + 16 + 22  # never made smaller
    with pytest.raises(ValueError, match="one caption per panel, got 1 panels and 2 captions"):
        png.side_by_side([wide], ["a", "b"])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("dress 40%", ["dress 40%"]),
        ("dress 40% (wrong, label: shirt)", ["dress 40% (wrong,", "label: shirt)"]),
        ("vit: dress 40% (wrong, label: longsleeve)", ["vit: dress 40%", "(wrong, label: longs…"]),
        ("anunbrokenwordofmanyletters", ["anunbrokenwordofmany…"]),
        ("a anunbrokenwordofmanyletters", ["a", "anunbrokenwordofmany…"]),
        ("", [""]),
    ],
)
def test_captions_break_between_words_and_are_cut_in_their_second_line(text, lines):
    assert png._lines(text, 21, len) == lines


def test_panels_wrap_into_rows():
    panels = [np.full((10, 10, 3), shade, np.uint8) for shade in (10, 20, 30)]
    sheet = png.side_by_side(panels, ["", "", ""], height=10, columns=2)
    row = 10 + 16 + 22
    assert sheet.shape == (2 * row, 2 * 10 + 24, 3)
    assert (sheet[8:18, 8:18] == 10).all()
    assert (sheet[8:18, 26:36] == 20).all()
    assert (sheet[row + 8 : row + 18, 8:18] == 30).all()
    assert (sheet[row:, 18:] == 255).all()
    assert np.array_equal(
        png.side_by_side(panels, ["a", "b", "c"], columns=5), png.side_by_side(panels, ["a", "b", "c"])
    )
    for columns in (0, -2):
        with pytest.raises(ValueError, match=rf"side_by_side\(columns={columns}\): expected at least one column"):
            png.side_by_side(panels, ["", "", ""], columns=columns)


def test_files_hold_the_array(tmp_path):
    png.save_png(tmp_path / "a.png", IMAGE)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), IMAGE)
