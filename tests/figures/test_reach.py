import numpy as np
import pytest

from mamba_attn import figures
from mamba_attn.figures import png

RNG = np.random.default_rng(0)
MAPS = [RNG.random((20, 30)), RNG.random((4, 6))]
OPTIONS = {
    "marks": [(9.5, 14.5), None], "layers": ["a", "b", "c"],
    "series": {"reads": [1.0, float("nan"), 3.0], "nothing": [float("nan")] * 3}, "levels": {"field": 2.0},
}  # fmt: skip


def test_maps_marks_and_chart():
    figure = figures.reach(MAPS, ["gradient", "rollout"], title="T", **OPTIONS)
    heats = [trace for trace in figure.data if trace.type == "heatmap"]
    for heat, values in zip(heats, MAPS, strict=True):
        np.testing.assert_allclose(heat.z, values, rtol=1e-6)
    (mark,) = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers"]
    assert (mark.x, mark.y) == ((14.5,), (9.5,))
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    assert set(by_name) == {"reads", "field"}
    np.testing.assert_array_equal(by_name["reads"].y, [1, np.nan, 3])
    assert list(by_name["reads"].text) == ["a", "b", "c"]
    assert list(by_name["field"].y) == [2, 2, 2]
    assert by_name["field"].line.dash != "solid"
    assert by_name["field"].line.color != by_name["reads"].line.color
    assert [note.text for note in figure.layout.annotations] == ["gradient", "rollout"]
    assert figure.layout.title.text == "T"
    assert figure.layout.yaxis.range == (19.5, -0.5)  # row 0 on top
    assert figure.layout.yaxis3.title.text == "mean distance in pixels"


def test_without_layers_there_are_maps_alone():
    figure = figures.reach(MAPS, ["", ""])
    assert [trace.type for trace in figure.data] == ["heatmap", "heatmap"]
    assert "yaxis3" not in figure.layout.to_plotly_json()
    assert png.reach_rgb(MAPS, ["", ""]).shape[0] < png.reach_rgb(MAPS, ["", ""], **OPTIONS).shape[0]


def test_as_png():
    own = [np.full((4, 8), 0.25), np.full((2, 2), 1.0)]
    own[0][0, 0] = 1
    rgb = png.reach_rgb(own, ["one", "two"], title="T", size=100, **{**OPTIONS, "marks": None})
    assert rgb.dtype == np.uint8
    assert rgb.shape[2] == 3
    top, left = 12 + 26 + 22, 12
    assert tuple(rgb[top + 5, left + 5]) == (252, 255, 164)  # Inferno's last colour
    assert tuple(rgb[top + 90, left + 190]) == (0, 0, 4)
    assert not np.array_equal(rgb, png.reach_rgb(own, ["one", "two"], title="T", size=100,
                                                 **{**OPTIONS, "marks": [(2, 3), None]}))  # fmt: skip
    chart = rgb[top + 100 + 30 :]
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert (np.abs(chart.astype(int) - colour).max(-1) < 8).any()


def test_many_layers_and_long_names():
    names = [f"layer {number}" for number in range(100)]
    series = {"x" * 200: list(range(100))}
    rgb = png.reach_rgb(MAPS, ["y" * 300, ""], layers=names, series=series)
    assert rgb.shape[1] < 900
    figures.reach(MAPS, ["y" * 300, ""], layers=names, series=series)


@pytest.mark.parametrize("draw", [figures.reach, png.reach_rgb])
@pytest.mark.parametrize(
    ("maps", "titles", "options", "sentence"),
    [
        ([], [], {}, "expected one title per map, and one mark per map if any; got 0 maps"),
        (MAPS, ["one"], {}, "got 2 maps, 1 titles, no marks"),
        (MAPS, ["one", "two"], {"marks": [(1, 1)]}, "1 marks"),
        (
            MAPS,
            ["one", "two"],
            {"layers": ["a"], "series": {"s": [1, 2]}},
            "expected one distance per layer, 1; 's' differs",
        ),
        ([np.ones(3)], ["one"], {}, r"reach.*\(maps\[0\]\): expected a \(rows, columns\) array"),
    ],
)
def test_refusals(draw, maps, titles, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(maps, titles, **options)


def test_the_legend_stands_right_below_the_axis_and_nothing_is_blank():
    many = {f"line {number}": [1.0, 2.0, 3.0] for number in range(7)}
    drawn = figures.reach(MAPS, ["a", "b"], layers="abc", series=many)
    margin, legend = drawn.layout.margin, drawn.layout.legend
    area = drawn.layout.height - margin.t - margin.b
    below = -legend.y * area
    assert 40 <= below <= 60  # the ticks and the axis' title
    assert 80 <= margin.b - below <= 100  # four lines of two
