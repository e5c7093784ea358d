"""The views of the explorer as figures: what they hold."""

import numpy as np
import pytest

from mamba_attn import figures
from mamba_attn.figures.colours import DIVERGING, VIRIDIS, categories
from mamba_attn.figures.patch_grid import outline
from mamba_attn.figures.points import highlighted

MAP = np.arange(12.0).reshape(3, 4)


def heat(figure):
    return next(trace for trace in figure.data if trace.type == "heatmap")


def test_a_map_keeps_its_values_and_takes_the_palette_of_its_sign():
    plain, signed = heat(figures.patch_view(MAP)), heat(figures.patch_view(MAP - 3))
    np.testing.assert_array_equal(plain.z, MAP)
    assert [colour for _, colour in plain.colorscale] == VIRIDIS
    assert [colour for _, colour in signed.colorscale] == DIVERGING
    assert signed.zmin == -signed.zmax < 0


def test_over_an_image_small_values_let_it_through():
    scale = heat(figures.patch_view(MAP - 3, image=np.zeros((6, 8, 3), np.uint8), opacity=0.8)).colorscale
    alpha = [float(colour.rstrip(")").split(",")[3]) for _, colour in scale]
    assert alpha[0] == alpha[-1] == 0.8
    assert min(alpha) == alpha[len(alpha) // 2] < 0.4


def test_the_frame_is_the_boundary_of_the_chosen_cells():
    def edges(cells):
        x, _ = outline(np.array(cells, dtype=int).reshape(-1, 2), (3, 4))
        return len(x) // 3

    assert edges([]) == 0
    assert edges([(1, 1)]) == 4
    assert edges([(0, 0), (0, 1), (1, 0), (1, 1)]) == 8  # none inside
    assert edges([(0, 0), (2, 3)]) == 8
    x, y = outline(np.array([(2, 3)]), (3, 4))
    assert {value for value in x if value is not None} == {2.5, 3.5}
    assert {value for value in y if value is not None} == {1.5, 2.5}


def test_a_path_is_drawn_to_its_step_and_no_further():
    order = np.arange(12)
    last = figures.patch_view(MAP, order=order, step=6).data[-1]
    assert (last.x[-1], last.y[-1]) == (1, 1)
    with pytest.raises(ValueError, match=r"step=13\): expected 1..12"):
        figures.patch_view(MAP, order=order, step=13)
    with pytest.raises(ValueError, match="patch 12"):
        figures.patch_view(MAP, marks=[12])


def test_points_of_kinds_are_traces_and_carry_their_numbers():
    figure = figures.embedding(np.eye(4)[:, :2], ["b", "a", "b", "a"], selected=[2])
    assert [trace.name for trace in figure.data] == ["b", "a"]
    assert [list(trace.customdata) for trace in figure.data] == [[0, 2], [1, 3]]
    assert [trace.selectedpoints for trace in figure.data] == [(1,), ()]
    assert highlighted(figure, [3, 0]) == [[0], [1]]
    assert highlighted(figure, []) == [None, None]


def test_points_of_numbers_are_one_trace_with_a_bar():
    (trace,) = figures.embedding(np.zeros((3, 2)), [1, 2, 3], colour_title="column").data
    assert trace.marker.colorbar.title.text == "column"
    assert list(trace.marker.color) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"got \(3, 2\), \{'colour': 2\}"):
        figures.embedding(np.zeros((3, 2)), [1, 2])


def test_kinds_have_different_colours():
    assert all(len(set(categories(count))) == count for count in (1, 8, 9, 24))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [-2, 0, 1, 4]),
        ({"sign": "positive"}, [0, 0, 1, 4]),
        ({"sign": "absolute"}, [2, 0, 1, 4]),
        ({"normalise": "largest"}, [-0.5, 0, 0.25, 1]),
        ({"normalise": "range"}, [0, 1 / 3, 0.5, 1]),
        ({"sign": "absolute", "normalise": "sum"}, [2 / 7, 0, 1 / 7, 4 / 7]),
        ({"log": True}, [-3 - np.log10(0.5), 0, 3 + np.log10(0.25), 3]),
    ],
)
def test_shown_values(options, expected):
    np.testing.assert_allclose(figures.shown([-2, 0, 1, 4], **options), expected)


def test_shown_zeros_stay_zeros_and_nan_stays_nan():
    for normalise in ("none", "largest", "range", "sum"):
        np.testing.assert_array_equal(figures.shown(np.zeros(3), normalise=normalise, log=True), np.zeros(3))
    assert np.isnan(figures.shown([np.nan, 1.0], normalise="largest", log=True)).tolist() == [True, False]
    with pytest.raises(ValueError, match="expected a sign of"):
        figures.shown([1], sign="minus")
