import base64
import copy
import importlib
import io
import pkgutil
import re
import subprocess
import sys
import types

import numpy as np
import plotly.colors
import plotly.graph_objects as go
import plotly.io
import pytest
from PIL import Image

from mamba_attn import figures
from mamba_attn.figures import theme
from mamba_attn.figures.colours import CIVIDIS, DIVERGING, PATH, SEQUENTIAL, VIRIDIS, Scale, to_rgb

POSITIVE = np.arange(12.0).reshape(3, 4) + 1
SIGNED = POSITIVE - 3  # -2 .. 9
IMAGE = np.full((3, 4, 3), 200, dtype=np.uint8)


def heat(figure, index=-1):
    return [trace for trace in figure.to_dict()["data"] if trace["type"] == "heatmap"][index]


def colours(trace):
    return [colour for _, colour in trace["colorscale"]]


def pixels(trace):
    """What an image trace shows."""
    head, _, data = trace.source.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        image.verify()  # the check sums
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


DRAW = {
    "overlay": lambda values, **options: figures.overlay(IMAGE, values, **options),
    "matrix": figures.matrix,
    "layer_grid": lambda values, **options: figures.layer_grid(IMAGE, [values], ["first"], **options),
    "depth_grid": lambda values, **options: figures.depth_grid([values], ["first"], **options),
}
EACH = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)


@EACH
def test_positive_data_fills_its_own_range(draw):
    trace = heat(draw(POSITIVE))
    assert (trace["zmin"], trace["zmax"]) == (1, 12)
    assert colours(trace) == SEQUENTIAL
    np.testing.assert_array_equal(draw(POSITIVE).data[-1].z, POSITIVE)


@EACH
def test_signed_data_is_centred_on_zero(draw):
    trace = heat(draw(SIGNED))
    assert (trace["zmin"], trace["zmax"]) == (-9, 9)
    assert colours(trace) == DIVERGING
    red, green, blue = bytes.fromhex(DIVERGING[-1][1:])
    assert red > green
    assert red > blue  # above zero is orange


@EACH
def test_range_sign_and_colours_can_be_given(draw):
    trace = heat(draw(POSITIVE, signed=True))
    assert (trace["zmin"], trace["zmax"]) == (-12, 12)
    trace = heat(draw(SIGNED, signed=False, limits=(0, 5), colours=["#000000", "#ffffff"]))
    assert (trace["zmin"], trace["zmax"]) == (0, 5)
    assert colours(trace) == ["#000000", "#ffffff"]
    with pytest.raises(ValueError, match=r"limits=\(5, 5\): expected \(low, high\) with low < high"):
        draw(POSITIVE, limits=(5, 5))
    with pytest.raises(ValueError, match=r"limits=\(-1, 2\): expected \(-high, high\), for signed values"):
        draw(SIGNED, limits=(-1, 2))


@EACH
def test_rows_go_down_and_cells_are_square(draw):
    layout = draw(POSITIVE).to_dict()["layout"]
    assert layout["yaxis"]["autorange"] == "reversed"
    assert layout["yaxis"]["scaleanchor"] == "x"


@EACH
def test_figures_are_pure(draw, monkeypatch):
    def shown(*args, **kwargs):
        raise AssertionError("shown")

    monkeypatch.setattr(go.Figure, "show", shown)
    default, before = plotly.io.templates.default, SIGNED.copy()
    figure = draw(SIGNED, title="title")
    assert isinstance(figure, go.Figure)
    assert figure.layout.title.text == "title"
    assert plotly.io.templates.default == default
    np.testing.assert_array_equal(before, SIGNED)
    monkeypatch.setattr(plotly.io.templates, "default", "plotly_dark")
    assert draw(SIGNED, title="title").to_dict()["layout"] == figure.to_dict()["layout"]


@EACH
@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((1, 3, 4)), np.full((3, 4), np.nan)])
def test_what_is_no_map_is_refused(draw, values):
    with pytest.raises(ValueError, match=r"expected a \(rows, columns\) array with at least one finite number"):
        draw(values)


@EACH
def test_nan_and_constants_do_not_break_the_range(draw):
    holes = np.where(POSITIVE > 11, np.nan, POSITIVE)
    assert heat(draw(holes))["zmax"] == 11
    for constant in (0.0, 3.0, -2.0):
        trace = heat(draw(np.full((3, 4), constant)))
        assert trace["zmin"] <= constant <= trace["zmax"]
        assert trace["zmin"] < trace["zmax"]


def test_overlay_keeps_the_image_and_demands_its_size():
    figure = figures.overlay(IMAGE / 255, POSITIVE, opacity=0.25)
    image, over = figure.data
    np.testing.assert_array_equal(pixels(image), IMAGE)
    assert (image.x0, image.dx, image.y0, image.dy) == (0, 1, 0, 1)
    assert over.opacity == 0.25
    with pytest.raises(ValueError, match=r"the map is \(4, 3\) pixels, the image \(3, 4\)"):
        figures.overlay(IMAGE, POSITIVE.T)
    np.testing.assert_array_equal(pixels(figures.overlay(IMAGE.transpose(2, 0, 1), POSITIVE).data[0]), IMAGE)
    with pytest.raises(ValueError, match=r"expected an image .* got \(1, 3, 4, 3\); pass images\[0\] of a batch"):
        figures.overlay(IMAGE[None], POSITIVE)
    with pytest.raises(ValueError, match=r"before normalisation\), got float64 in -1\.\.200"):
        figures.overlay(np.concatenate([IMAGE[:1] * 0.0 - 1, IMAGE[1:] * 1.0]), POSITIVE)


def test_matrix_marks_tokens_on_both_axes():
    lines = figures.matrix(POSITIVE, marks=[2]).to_dict()["layout"]["shapes"]
    assert [(line["x0"], line["x1"]) for line in lines if line.get("xref") == "x"] == [(2, 2)]
    assert [(line["y0"], line["y1"]) for line in lines if line.get("yref") == "y"] == [(2, 2)]


def test_depth_grid_lays_panels_out_in_reading_order():
    panels = [POSITIVE, POSITIVE * 2, SIGNED, np.ones((2, 2))]
    drawn = figures.depth_grid(panels, ["a", "b", "c", "d"], columns=3)
    np.testing.assert_array_equal(drawn.data[1].z, POSITIVE * 2)
    figure = drawn.to_dict()
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["a", "b", "c", "d"]
    domains = [figure["layout"][f"{axis}axis{n}"]["domain"][0] for n in (2, 3, 4) for axis in "xy"]
    assert domains[0] < domains[2] > domains[4] == 0.0
    assert domains[1] == domains[3] > domains[5]
    # one panel is negative: all are centred on zero, each with its own range
    assert [(trace["zmin"], trace["zmax"]) for trace in figure["data"]] == [(-12, 12), (-24, 24), (-9, 9), (-1, 1)]
    assert not any(trace["showscale"] for trace in figure["data"])


def test_depth_grid_can_share_one_range():
    figure = figures.depth_grid([POSITIVE, POSITIVE * 2], ["a", "b"], shared=True).to_dict()
    assert [(trace["zmin"], trace["zmax"], trace["showscale"]) for trace in figure["data"]] == [
        (1, 24, True),
        (1, 24, False),
    ]
    with pytest.raises(ValueError, match="expected one title per panel, got 2 panels, 1 titles"):
        figures.depth_grid([POSITIVE, POSITIVE], ["a"])
    with pytest.raises(ValueError, match="got 0 panels"):
        figures.depth_grid([], [])


def test_panels_have_the_size_that_was_asked_for():
    for count, columns, title in ((1, None, None), (10, None, "title"), (5, 2, None), (3, 7, None)):
        figure = figures.depth_grid([POSITIVE] * count, ["a"] * count, columns=columns, title=title, size=200)
        layout, across = figure.layout, min(columns or 6, count)
        wide = layout.width - layout.margin.l - layout.margin.r
        high = layout.height - layout.margin.t - layout.margin.b
        for n in range(1, count + 1):
            x, y = (layout[f"{axis}axis{n if n > 1 else ''}"] for axis in "xy")
            assert (x.domain[1] - x.domain[0]) * wide == pytest.approx(200, abs=1)
            assert (y.domain[1] - y.domain[0]) * high == pytest.approx(200, abs=1)
            assert y.scaleanchor == f"x{n if n > 1 else ''}"
        assert layout.margin.t >= (24 if title is None else 60)  # room for the captions of the first row
        assert wide == pytest.approx(200 * across + 12 * (across - 1), abs=1)
        assert not any(axis.visible for axis in [*figure.select_xaxes(), *figure.select_yaxes()])
    for columns in (0, -1):
        with pytest.raises(ValueError, match=rf"depth_grid\(columns={columns}\): expected at least one column"):
            figures.depth_grid([POSITIVE], ["a"], columns=columns)


def test_a_figure_as_html_brings_its_script_along():
    trajectory = np.random.default_rng(0).random((6, 4))
    drawn = [draw(POSITIVE) for draw in DRAW.values()]
    drawn += [
        figures.patch_view(POSITIVE),
        figures.reach([POSITIVE], ["a"]),
        figures.embedding(trajectory[:, :2], range(6)),
    ]
    for figure in [*drawn, copy.deepcopy(drawn[0])]:
        html = figure._repr_html_()
        assert not re.search(r"""<(script|link)[^>]+(src|href)=["']?(http|//)""", html)
        assert len(html) > 1_000_000


def test_a_notebook_without_nbformat_shows_it_too(monkeypatch):
    shown = []
    display = types.SimpleNamespace(display_html=lambda html, raw: shown.append((html, raw)))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(theme, "find_spec", lambda name: None)
    figures.matrix(POSITIVE)._ipython_display_()
    ((html, raw),) = shown
    assert raw
    assert "Plotly.newPlot(" in html


def test_modules_are_modules_and_the_names_do_not_depend_on_what_ran_before():
    code = """
import types, mamba_attn.figures as figures
before = dir(figures)
import mamba_attn.figures.png, mamba_attn.figures.heatmaps
assert dir(figures) == before == sorted(figures.__all__), dir(figures)
assert isinstance(figures.png, types.ModuleType)
assert not hasattr(figures, "no_such_name")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for found in pkgutil.iter_modules(figures.__path__):
        module = importlib.import_module(f"mamba_attn.figures.{found.name}")
        assert getattr(figures, found.name) is module


def test_the_colours_and_the_encoder_import_neither_plotly_nor_pillow():
    code = """
import sys, mamba_attn.figures.colours, mamba_attn.figures.picture
assert not {"plotly", "PIL", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_plotly_a_figure_says_what_to_install_and_arrays_are_drawn():
    code = """
import sys
sys.modules["plotly"] = sys.modules["PIL"] = None
import numpy as np
from mamba_attn import figures
assert figures.overlay_rgb(np.zeros((2, 3, 3)), np.ones((2, 3))).shape == (2, 3, 3)
try:
    figures.overlay
except ImportError as error:
    assert str(error) == "figures.overlay needs plotly: pip install 'mamba_attn[viz]'", error
else:
    raise AssertionError("not refused")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_lists_of_colours_are_plotlys():
    sequential = plotly.colors.sequential
    pairs = [
        (SEQUENTIAL, sequential.Inferno), (VIRIDIS, sequential.Viridis), (CIVIDIS, sequential.Cividis),
        (PATH, sequential.Plasma[:-1]),
    ]  # fmt: skip
    for ours, theirs in pairs:
        place = np.arange(len(ours))
        drawn = [to_rgb(place, Scale(0, len(ours) - 1, list(names))) for names in (ours, theirs)]
        np.testing.assert_array_equal(*drawn)
        assert len(ours) == len(theirs)
