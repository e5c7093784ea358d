"""How far attention reaches: against explicit matrices, distances and the rollout's own method."""

import numpy as np
import pytest
import torch

from mamba_attn import models
from mamba_attn.attribution import AttentionRollout
from mamba_attn.core.layout import TokenLayout
from mamba_attn.erf import reach
from mamba_attn.erf.fields import receptive_field
from mamba_attn.erf.page import panels
from mamba_attn.erf.reach import attention_distance
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import SIZE, images, matrices, vim, vmamba
from tests.attribution.test_queries import keyword


def vit():
    return models.create("vit_micro", image_size=SIZE, patch_size=8, embed_dim=16, num_heads=2, depth=2).double()


def places(layout):
    """(row, column) in pixels of every patch."""
    return [
        (row * layout.step + layout.centre, column * layout.step + layout.centre)
        for row in range(layout.grid[0])
        for column in range(layout.grid[1])
    ]


def distance(weights, layout, centre):
    away = [np.hypot(row - centre[0], column - centre[1]) for row, column in places(layout)]
    return float(np.average(away, weights=np.asarray(weights).ravel()))


@pytest.mark.parametrize(("build", "size"), [(vim, SIZE), (vmamba, (40, 56))])
def test_rows_and_distances_by_the_definition(build, size):
    model, x = build(), images(2, size)
    found = receptive_field(model, x, pixel=(17, 20))
    truth = matrices(model, x)
    assert found.reach.layers == list(found.reach.rows)
    for (layout, matrix), name in zip(truth, found.reach.layers, strict=True):
        token = layout.token_at(17, 20)
        rows = layout.to_grid(matrix[:, token].abs())
        row = (rows / rows.sum((1, 2), keepdim=True)).mean(0).numpy()
        np.testing.assert_allclose(found.reach.rows[name], row, rtol=1e-8)
        assert found.reach.row_distance[name] == pytest.approx(distance(row, layout, found.centre))
        patches = layout.patches.tolist()
        each = [
            distance(image[token, patches].abs(), layout, places(layout)[number])
            for image in matrix
            for number, token in enumerate(patches)
        ]
        assert found.reach.mean_distance[name] == pytest.approx(np.mean(each))


@pytest.mark.parametrize("build", [vim, vit])
@pytest.mark.parametrize("query", [(17, 20), (8, 0, 24, 16), "class"])
def test_the_rollout_is_the_methods_own(build, query):
    model, x = build(), images(2)
    found = receptive_field(model, x, **(keyword(query) if query != "class" else {"query": query})).reach
    rows = AttentionRollout(model).attribute(x, **({} if query == "class" else keyword(query)), grid=True)[:, 0]
    truth = (rows / rows.sum((1, 2), keepdim=True)).mean(0).numpy()
    np.testing.assert_allclose(found.rollout, truth, rtol=1e-8)
    assert found.note == "attention rollout"
    assert np.isnan(found.rollout_distance) == (query == "class")
    assert all(np.isnan(value) == (query == "class") for value in found.row_distance.values())
    assert not any(np.isnan(value) for value in found.mean_distance.values())


def test_the_rollout_starts_at_the_layer():
    model, x = vim(), images(2)
    found = receptive_field(model, x, pixel=(17, 20), layer="layers.1.mixer").reach
    rows = AttentionRollout(model, layers=["layers.[01].mixer"]).attribute(x, pixel=(17, 20), grid=True)[:, 0]
    np.testing.assert_allclose(found.rollout, (rows / rows.sum((1, 2), keepdim=True)).mean(0).numpy(), rtol=1e-8)
    assert len(found.layers) == 3


def test_many_tokens_take_linear_time(monkeypatch):
    model, x = vim(), images(2)
    dense = receptive_field(model, x, pixel=(17, 20)).reach
    monkeypatch.setattr(reach, "DENSE", 10)
    monkeypatch.setattr("mamba_attn.tracing.layers.ScanLayer.attention", None)  # no matrix is made
    found = receptive_field(model, x, pixel=(17, 20)).reach
    rows = AttentionRollout(model, signed=True).attribute(x, pixel=(17, 20), grid=True)[:, 0].abs()
    np.testing.assert_allclose(found.rollout, (rows / rows.sum((1, 2), keepdim=True)).mean(0).numpy(), rtol=1e-8)
    assert found.note.startswith("signed attention rollout")
    assert all(np.isnan(value) for value in found.mean_distance.values())
    np.testing.assert_allclose(list(found.row_distance.values()), list(dense.row_distance.values()))


def test_layers_that_do_not_fit_have_no_rollout(monkeypatch):
    def refuse(*args, **options):
        raise UnsupportedModelError("rollout from here to there: no.")

    monkeypatch.setattr(reach, "roll_out", refuse)
    found = receptive_field(vim(), images(1))
    assert found.reach.rollout is None
    assert found.reach.note == "no rollout: rollout from here to there: no."
    assert np.isnan(found.reach.rollout_distance)
    assert "rollout" not in found.arrays()
    assert len(panels({"vim": found})["maps"]) == 1


def test_attention_distance_of_known_matrices():
    layout = TokenLayout((2, 3), patch_size=4, class_tokens=(2,))
    own = torch.eye(7, dtype=torch.float64)[None]
    assert attention_distance(own, layout).tolist() == [0]
    right = torch.zeros(1, 7, 7, dtype=torch.float64)
    right[0, 0, 1] = -2  # one patch reads its neighbour, the others the class token or nothing
    right[0, 1, 2] = right[0, 2, 0] = 5
    assert attention_distance(right, layout).tolist() == [4]
    uniform = torch.ones(1, 7, 7)
    truth = np.mean([np.hypot(a - c, b - d) for a, b in places(layout) for c, d in places(layout)])
    assert attention_distance(uniform, layout).item() == pytest.approx(truth)


def test_arrays_and_panels():
    fields = {"vim": receptive_field(vim(), images(2)), "other": receptive_field(vmamba(), images(2))}
    arrays = fields["vim"].arrays("vim.")
    assert {"vim.erf", "vim.rollout", "vim.row.layers.0.mixer", "vim.layers", "vim.mean_distance"} <= set(arrays)
    assert arrays["vim.erf"].shape == SIZE
    assert arrays["vim.rollout"].shape == (5, 3)
    assert arrays["vim.row_distance"].shape == (3,)
    drawn = panels({"vim": fields["vim"]})
    assert drawn["titles"] == ["gradient", "rollout"]
    assert drawn["marks"] == [(19.5, 11.5), (2.0, 1.0)]
    assert set(drawn["series"]) == {"what it reads", "what all patches read, mean"}
    assert set(drawn["levels"]) == {"gradient", "rollout"}
    assert drawn["maps"][0].max() == drawn["maps"][1].max() == 1
    assert drawn["title"] == "vim: receptive field of the patch in the middle, 2 images"
    several = panels(fields)
    assert several["titles"] == ["vim: gradient", "vim: rollout", "other: gradient", "other: rollout"]
