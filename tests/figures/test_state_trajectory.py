import numpy as np
import pytest
import torch

from mamba_attn import figures, models, trace
from mamba_attn.analytics.states import state_trajectory

PATH = np.array([[0.0, 1.0], [2.0, -1.0], [3.0, 0.5]])
NORMS = np.array([[1.0, 2.0, np.nan], [3.0, 4.0, 5.0]])
DISTANCES = {"raster": ([1, 2], [0.5, 1.5], [0.25, 0.0]), "sequence": ([1, 2, 3], [1.0, 2.0, 3.0], [0.0, 0.5, 1.0])}


def _by(figure, **wanted):
    return [its for its in figure.data if all(its.to_plotly_json().get(key) == value for key, value in wanted.items())]


def test_every_panel_shows_its_numbers():
    figure = figures.state_trajectory(PATH, NORMS, DISTANCES, explained=(0.5, 0.25), title="T")
    (path,) = _by(figure, mode="lines+markers")
    np.testing.assert_array_equal(np.stack([path.x, path.y], 1), PATH)
    np.testing.assert_array_equal(path.marker.color, [0, 1, 2])
    (heat,) = _by(figure, type="heatmap")
    np.testing.assert_array_equal(heat.z, NORMS)
    assert figure.layout.yaxis2.autorange == "reversed"  # row 0 on top
    for name, (distance, mean, deviation) in DISTANCES.items():
        band, line = _by(figure, legendgroup=name)
        np.testing.assert_array_equal(line.x, distance)
        np.testing.assert_array_equal(line.y, mean)
        upper, lower = band.y[: len(mean)], band.y[len(mean) :][::-1]
        np.testing.assert_allclose(upper - lower, 2 * np.array(deviation))
    assert _by(figure, name="raster")[0].line.dash != _by(figure, name="sequence")[0].line.dash
    assert figure.layout.xaxis.title.text == "component 1 (50%)"
    ends = {note.text: (note.x, note.y) for note in figure.layout.annotations if note.text in ("first", "last")}
    assert ends == {"first": (0.0, 1.0), "last": (3.0, 0.5)}
    assert figure.layout.title.text == "T"


def test_of_a_traced_layer():
    torch.manual_seed(0)
    model = models.create("vmamba_micro", depths=(1,), dims=8, num_classes=3, image_size=32).eval()
    with torch.no_grad(), trace(model) as record:
        model(torch.randn(1, 3, 24, 40))
    route = state_trajectory(record.layers[0], route=1)
    path, by_step = route.path(), route.distances("sequence")
    figure = figures.state_trajectory(
        path.points, route.norm_map(), {"sequence": (by_step.distance, by_step.mean, by_step.deviation)}
    )
    (heat,) = _by(figure, type="heatmap")
    assert heat.z.shape == tuple(record.layers[0].layout.grid)
    np.testing.assert_allclose(np.sort(heat.z.ravel()), np.sort(route.norm()))
    assert figure.layout.xaxis.title.text == "component 1"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"path": np.zeros((3, 3))}, r"path\(3, 3\)\): expected \(length, 2\)"),
        ({"path": np.full((2, 2), np.nan)}, "finite numbers"),
        ({"norm_map": np.zeros(4)}, r"norm_map\): expected a \(rows, columns\)"),
        ({"distances": {}}, "at least one kind of distance"),
        ({"distances": {"grid": ([1, 2], [1], [1])}}, r"distances\['grid'\]\): expected distance, mean and deviation"),
    ],
)
def test_refusals(changed, sentence):
    given = {"path": PATH, "norm_map": NORMS, "distances": DISTANCES, **changed}
    with pytest.raises(ValueError, match=sentence):
        figures.state_trajectory(**given)
