import numpy as np
import pytest

from benchmarks.kernel.roofline import roof, roofline, roofline_rgb, short
from mamba_attn.figures.colours import CATEGORIES

INTENSITY, RATE = [0.5, 80.0, 500.0], [2e9, 4e10, 5e9]
OPTIONS = {
    "groups": ["ours", "ours", "loops"], "bandwidth": 1e10, "rates": {"matrix": 1e12, "exponentials": 2e10},
    "floors": [4e9, 8e10, 6e10], "estimated": [False, False, True],
}  # fmt: skip
LABELS = ["a", "b", "c"]


def by_name(figure):
    return {trace.name: trace for trace in figure.data}


def test_points_stand_where_they_were_measured_and_say_what_they_are():
    figure = roofline(INTENSITY, RATE, LABELS, title="T", **OPTIONS)
    traces = by_name(figure)
    assert list(traces["ours"].x) == INTENSITY[:2]
    assert list(traces["ours"].y) == RATE[:2]
    assert list(traces["ours"].text) == ["a", "b"]
    assert list(traces["ours"].customdata) == ["2 Gop/s", "40 Gop/s"]
    assert "%{text}" in traces["ours"].hovertemplate
    assert "ours" not in traces["loops (extrapolated)"].hovertemplate
    assert list(traces["cheapest known way"].y) == OPTIONS["floors"]
    assert figure.layout.title.text == "T"
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert figure.layout.xaxis.title.text == "operations per byte moved"


def test_what_was_extrapolated_is_open():
    traces = by_name(roofline(INTENSITY, RATE, LABELS, **OPTIONS))
    assert not traces["ours"].marker.symbol.endswith("-open")
    assert traces["loops (extrapolated)"].marker.symbol.endswith("-open")
    assert traces["ours"].marker.color != traces["loops (extrapolated)"].marker.color
    colours = {traces["ours"].marker.color, traces["loops (extrapolated)"].marker.color}
    assert colours == set(CATEGORIES[:2])


def test_ceilings_meet_at_their_ridges():
    figure = roofline(INTENSITY, RATE, LABELS, **OPTIONS)
    traces = by_name(figure)
    slope, flat = traces["copy, 10 GB/s"], traces["exponentials, 20 Gop/s"]
    assert [y / x for x, y in zip(slope.x, slope.y, strict=True)] == pytest.approx([1e10, 1e10])
    assert (slope.x[1], slope.y[1]) == (100, 1e12)  # the highest ridge
    assert (flat.x[0], *flat.y) == (2, 2e10, 2e10)
    assert flat.x[1] > max(INTENSITY)
    assert slope.showlegend
    assert [note.text for note in figure.layout.annotations] == ["matrix, 1 Top/s", "exponentials, 20 Gop/s"]


def test_everything_lies_on_the_axes():
    its = roof("x", INTENSITY, RATE, OPTIONS["groups"], None, 1e10, OPTIONS["rates"], [1e3, 1e15])
    assert its.x[0] < 0.5 < 500 < its.x[1]
    assert its.y[0] < 1e3 < 1e15 < its.y[1]
    for ceiling in its.ceilings:
        for x, y in (ceiling.start, ceiling.stop):
            assert its.x[0] <= x <= its.x[1] * 1.001
            assert its.y[0] * 0.999 <= y <= its.y[1]


def test_the_picture_shows_the_same():
    rgb = roofline_rgb(INTENSITY, RATE, title="T", size=500, **OPTIONS)
    assert rgb.shape == (500, 775, 3)
    colours = {tuple(pixel) for pixel in rgb.reshape(-1, 3)}
    for colour in CATEGORIES[:2]:
        assert tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) in colours
    without = roofline_rgb(INTENSITY, RATE, title="T", size=500, **{**OPTIONS, "floors": None})
    assert without.shape == rgb.shape
    assert (without != rgb).any()
    assert (rgb[:, -1] == 255).all()  # white to the edge: nothing is cut
    left = rgb[:, : 775 - 250].reshape(-1, 3)
    assert len(np.unique(left, axis=0)) > 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bandwidth": 0.0}, "positive numbers everywhere"),
        ({"rates": {}}, "at least one ceiling"),
        ({"groups": ["ours"]}, "3 labels and 1 groups"),
        ({"estimated": [True]}, "3 groups and 1 marks"),
        ({"floors": [1.0, -1.0, 1.0]}, "positive numbers everywhere"),
        ({"floors": [1.0]}, "floor per point"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        roofline(INTENSITY, RATE, LABELS, **{**OPTIONS, **change})
    if "groups" not in change:
        with pytest.raises(ValueError, match=sentence):
            roofline_rgb(INTENSITY, RATE, **{**OPTIONS, **change})


def test_rates_for_people():
    assert [short(value, "B/s") for value in (5.0, 1.5e4, 4.3e12, 2e16)] == ["5 B/s", "15 kB/s", "4.3 TB/s", "20 PB/s"]
