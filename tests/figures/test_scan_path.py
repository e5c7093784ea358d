from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from mamba_attn import figures, orders
from mamba_attn.figures import png
from mamba_attn.figures.colours import PATH
from mamba_attn.figures.route_geometry import jumps

GRID = (7, 9)
IMAGE = np.random.default_rng(0).integers(0, 256, (14, 27, 3), dtype=np.uint8)  # patches of 2 x 3 pixels
SNAKE = np.array([0, 1, 2, 5, 4, 3, 6, 7, 8])  # on 3 x 3, no jump


def lines(figure, panel="x"):
    """(rows, columns, colour, width) of every line."""
    found = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "lines"]
    return [(trace.y, trace.x, trace.line.color, trace.line.width) for trace in found if trace.xaxis == panel]


def moves(drawn):
    """The moves that lines show, as pairs of (row, column), sorted."""
    found = []
    for rows, columns, *_ in drawn:
        points = list(zip(rows, columns, strict=True))
        found += [pair for pair in pairwise(points) if not np.isnan(pair).any()]
    return sorted((tuple(map(int, a)), tuple(map(int, b))) for a, b in found)


def expected_moves(order, width):
    points = [divmod(int(patch), width) for patch in order]
    return sorted(pairwise(points))


def markers(figure, *, frames):
    found = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers"]
    return [trace for trace in found if (trace.marker.symbol == "square-open") == frames]


def ends(figure):
    return markers(figure, frames=False)


def cells(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


@pytest.mark.parametrize("name", orders.ORDERS)
@pytest.mark.parametrize("grid", [(7, 9), (16, 16), (1, 5), (5, 1)])
def test_every_move_is_drawn_once(name, grid):
    order = orders.order(name, *grid)
    assert moves(lines(figures.scan_path(order, grid))) == expected_moves(order, grid[1])


def test_the_pointer_reads_step_row_and_column():
    order = orders.spiral(*GRID)
    (trace,) = cells(figures.scan_path(order, GRID))
    np.testing.assert_array_equal(trace.z, orders.inverse(order).view(GRID))
    assert trace.hovertemplate == "step %{z}, row %{y}, column %{x}<extra></extra>"
    part = orders.sub_grid(*GRID, slice(1, None, 2), slice(0, None, 2))
    (trace,) = cells(figures.scan_path(part, GRID))
    assert np.isfinite(trace.z).sum() == len(part)
    assert trace.z[1][0] == 0
    assert not trace.hoverongaps


def test_colours_run_from_the_first_step_to_the_last():
    figure = figures.scan_path(np.arange(64), (1, 64), colours=["#000000", "#0000ff"])
    blues = [int(colour[4:-1].split(",")[2]) for *_, colour, _ in lines(figure)]
    assert blues == sorted(blues)
    assert len(set(blues)) == 32
    assert blues[0] < 8
    assert blues[-1] > 247
    (marks,) = ends(figure)
    assert marks.marker.symbol == ("circle", "square")
    assert marks.marker.color == (0, 63)
    assert (marks.marker.cmin, marks.marker.cmax) == (0, 63)
    assert [colour for _, colour in marks.marker.colorscale] == ["#000000", "#0000ff"]
    assert marks.marker.showscale
    (marks,) = ends(figures.scan_path(np.arange(64), (1, 64)))
    assert [colour for _, colour in marks.marker.colorscale] == PATH


@pytest.mark.parametrize("name", ["raster", "hilbert", "random"])
def test_long_routes_stay_a_few_traces(name):
    assert len(figures.scan_path(orders.order(name, 56, 56), (56, 56)).data) <= 68


def test_circle_and_square_stand_at_the_ends():
    (marks,) = ends(figures.scan_path(SNAKE, (3, 3)))
    assert list(zip(marks.y, marks.x, strict=True)) == [(0, 0), (2, 2)]
    (marks,) = ends(figures.scan_path(SNAKE, (3, 3), step=4))
    assert list(zip(marks.y, marks.x, strict=True)) == [(0, 0), (1, 2)]
    assert marks.marker.color == (0, 3)
    assert (marks.marker.cmin, marks.marker.cmax) == (0, 8)  # colours do not depend on step


@pytest.mark.parametrize("step", range(1, 10))
def test_the_first_steps_alone_are_drawn(step):
    figure = figures.scan_path(SNAKE, (3, 3), step=step, image=np.zeros((3, 3, 3)))
    halo, *rest = lines(figure)
    assert moves([halo]) == moves(rest) == expected_moves(SNAKE[:step], 3)
    assert np.isfinite(cells(figure)[0].z).sum() == step
    whole = lines(figures.scan_path(SNAKE, (3, 3)))
    assert [colour for *_, colour, _ in rest] == [colour for *_, colour, _ in whole][: len(rest)]


def test_jumps_are_thin():
    order = orders.raster(*GRID)
    far = jumps(np.stack(np.divmod(order.numpy(), 9), axis=1))
    assert np.flatnonzero(far).tolist() == [8, 17, 26, 35, 44, 53]
    drawn = lines(figures.scan_path(order, GRID))
    thick = max(width for *_, width in drawn)
    thin = [line for line in drawn if line[-1] < thick / 2]
    assert moves(thin) == [((row, 8), (row + 1, 0)) for row in range(6)]
    assert jumps(np.array([[0, 0], [0, 1], [0, 2], [0, 4], [0, 7]])).tolist() == [False, False, False, False]
    assert jumps(np.array([[0, 0], [0, 1], [0, 2], [0, 4], [0, 8]])).tolist() == [False, False, False, True]
    assert jumps(np.array([[0, 0], [0, 1], [0, 2], [0, 4]])).tolist() == [False, False, False]
    part = orders.sub_grid(16, 16, slice(0, None, 2), slice(None, None, 2))
    assert jumps(np.stack(np.divmod(part.numpy(), 16), axis=1)).sum() == 7  # ends of rows; not each move of two


def test_an_image_fills_the_grid():
    figure = figures.scan_path(orders.raster(*GRID), GRID, image=IMAGE, size=210)
    image = figure.data[0]
    assert image.type == "image"
    assert (image.dy, image.dx) == pytest.approx((1 / 2, 1 / 3))
    assert (image.y0, image.x0) == pytest.approx((-1 / 4, -1 / 3))
    layout = figure.layout
    assert layout.yaxis.scaleratio == pytest.approx(2 / 3)
    assert layout.width - layout.margin.l - layout.margin.r == round(210 * 27 / 14)
    assert layout.height - layout.margin.t - layout.margin.b == 210
    assert cells(figure)[0].opacity == 0
    without = figures.scan_path(orders.raster(*GRID), GRID, size=210)
    assert [trace.type for trace in without.data].count("image") == 0
    assert cells(without)[0].opacity > 0
    assert without.layout.width - without.layout.margin.l - without.layout.margin.r == 270
    for drawn in (figure, without):
        assert drawn.layout.xaxis.range == (-0.5, 8.5)
        assert drawn.layout.yaxis.range == (6.5, -0.5)  # row 0 on top
        assert drawn.layout.yaxis.scaleanchor == "x"


def test_routes_stand_side_by_side():
    routes = orders.cross("spiral", 4, 8)
    figure = figures.scan_path(routes, (4, 8), titles=["a", "b", "c", "d"], columns=2, image=np.zeros((8, 16, 3)))
    assert [note.text for note in figure.layout.annotations] == ["a", "b", "c", "d"]
    for index, panel in enumerate(("x", "x2", "x3", "x4")):
        halo, *rest = lines(figure, panel)
        assert moves([halo]) == moves(rest) == expected_moves(routes[index], 8)
    assert [trace.marker.showscale for trace in ends(figure)] == [True, False, False, False]
    assert [trace.xaxis for trace in figure.data if trace.type == "image"] == ["x", "x2", "x3", "x4"]
    assert figure.layout.xaxis3.domain[0] == 0
    assert figure.layout.yaxis3.domain[1] < figure.layout.yaxis.domain[0]
    numbered = figures.scan_path(routes, (4, 8))
    assert [note.text for note in numbered.layout.annotations] == [f"route {n}" for n in (1, 2, 3, 4)]
    assert not figures.scan_path(routes[0], (4, 8)).layout.annotations
    with pytest.raises(ValueError, match="scan_path: expected one title per panel, got 4 panels, 1 titles"):
        figures.scan_path(routes, (4, 8), titles=["a"])


def test_marked_patches_are_framed():
    figure = figures.scan_path(SNAKE, (3, 3), marks=iter([3, 8]))
    frames = markers(figure, frames=True)
    assert len({frame.marker.color for frame in frames}) == 2  # dark on light
    for frame in frames:
        assert list(zip(frame.y, frame.x, strict=True)) == [(1, 0), (2, 2)]


def test_paths_are_pure(monkeypatch):
    def shown(*args, **kwargs):
        raise AssertionError("shown")

    monkeypatch.setattr(go.Figure, "show", shown)
    order, default = SNAKE.copy(), plotly.io.templates.default
    figure = figures.scan_path(order, (3, 3), title="title")
    assert isinstance(figure, go.Figure)
    assert figure.layout.title.text == "title"
    assert plotly.io.templates.default == default
    np.testing.assert_array_equal(order, SNAKE)
    for same in (torch.tensor(SNAKE), SNAKE.tolist(), SNAKE.astype(np.uint8)):
        assert figures.scan_path(same, (3, 3), title="title").to_json() == figure.to_json()
    monkeypatch.setattr(plotly.io.templates, "default", "plotly_dark")
    assert figures.scan_path(order, (3, 3), title="title").to_json() == figure.to_json()


DRAW = {"scan_path": figures.scan_path, "scan_path_rgb": png.scan_path_rgb}


@pytest.mark.parametrize("name", DRAW)
def test_what_is_no_path_is_refused(name):
    draw = DRAW[name]
    for outside in (9, -1):
        with pytest.raises(
            ValueError, match=rf"{name}\(order\): entry 1 is patch {outside}, but a 3x3 grid has the patches 0\.\.8"
        ):
            draw([0, outside], (3, 3))
    for order, text in (
        ([0.0, 1.0], r"\(2,\) of float64"),
        ([], r"\(0,\) of"),
        (np.zeros((1, 1, 1), int), r"of int64"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\(order\): expected raster indices of patches.* got .*{text}"):
            draw(order, (3, 3))
    for step in (0, 10, -1):
        with pytest.raises(ValueError, match=rf"{name}\(step={step}\): expected 1\.\.9, the route's steps"):
            draw(SNAKE, (3, 3), step=step)
    with pytest.raises(ValueError, match=rf"{name}\(grid=\(0, 3\)\): a grid has at least one row and one column"):
        draw(SNAKE, (0, 3))
    with pytest.raises(ValueError, match=rf"{name}\(marks\): entry 0 is patch 9, but a 3x3 grid"):
        draw(SNAKE, (3, 3), marks=[9])
    with pytest.raises(ValueError, match=rf"{name}\(image\): \(3, 3\) cells do not tile an image of \(14, 27\)"):
        draw(SNAKE, (3, 3), image=IMAGE)
    with pytest.raises(ValueError, match=rf"{name}\(image\): expected an image \(rows, columns, 3\)"):
        draw(SNAKE, (3, 3), image=IMAGE[..., 0])


def test_one_step_is_a_path_too():
    figure = figures.scan_path([4], (3, 3))
    assert lines(figure) == []
    assert not ends(figure)[0].marker.showscale
    assert png.scan_path_rgb([4], (3, 3), size=90)[45, 45].tolist() == channels(PATH[0])


def channels(colour):
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def test_the_png_shows_moves_cells_and_ends():
    drawn = png.scan_path_rgb(SNAKE, (3, 3), size=300, step=5, colours=["#000000", "#ff0000"])
    assert drawn.shape == (300, 300, 3)
    assert drawn.dtype == np.uint8
    red = drawn[50, 100]  # between steps 0 and 1, on the line
    assert red.tolist() == [0, 0, 0]
    assert drawn[100, 250].tolist() == [64, 0, 0]  # step 2 of 8 to 3
    assert (drawn[50, 50] == 0).all()  # the circle
    assert drawn[150, 150].tolist() == [128, 0, 0]  # the square, step 4
    assert (drawn[150, 50] == 240).all()  # not visited yet
    assert (drawn[210:] == 240).all()
    assert drawn[10, 10].tolist() == [180, 180, 180]  # cell of step 0, a quarter black


def test_the_png_lies_over_its_image():
    blue = np.zeros((14, 27, 3), dtype=np.uint8)
    blue[..., 2] = 200
    drawn = png.scan_path_rgb(orders.raster(*GRID), GRID, image=blue, step=9, size=210, marks=[6 * 9 + 8])
    assert drawn.shape == (210, 405, 3)
    assert (drawn[60:180, :350] == (0, 0, 200)).all()
    assert (drawn[15, 35:370] != (0, 0, 200)).any(axis=1).all()  # the first row's line
    frame = drawn[180:, 360:].reshape(-1, 3).tolist()
    assert [0x22] * 3 in frame
    assert [255] * 3 in frame
    assert (drawn[195, 382] == (0, 0, 200)).all()  # open


def test_ends_stay_inside_the_png():
    drawn = png.scan_path_rgb(np.arange(56 * 56), (56, 56), size=112)
    white = (drawn == 255).all(axis=2)
    for corner in (white[:16, :16], white[-16:, -16:]):
        rows, columns = np.nonzero(corner)
        assert np.ptp(rows) >= 8
        assert np.ptp(columns) >= 8
