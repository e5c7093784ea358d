"""Metrics against hand-computed values and scikit-learn."""

import numpy as np
import pytest
import torch

from mamba_attn.errors import NonFiniteError
from mamba_attn.evaluation.localisation import (
    area_between,
    areas_under,
    average_precision,
    energy_share,
    locate,
    unit_range,
)


def toy():
    """4 x 4, the object in the upper left quarter."""
    inside = torch.zeros(4, 4)
    inside[:2, :2] = 1
    return inside


def test_the_toy_case_by_hand():
    values = torch.zeros(4, 4)
    values[0, :3] = 1.0  # two of four pixels of the object, one beside it
    found = locate(values, toy())
    assert found.area == 0.25
    assert (found.correct, found.pixels) == (13, 16)
    assert found.intersections == (11, 2)
    assert found.unions == (14, 5)
    assert found.hit == pytest.approx(2 / 3)
    assert found.energy == pytest.approx(2 / 3)
    assert not found.one_class
    assert not found.constant


def test_a_perfect_map_and_its_opposite():
    perfect = locate(3 * toy() - 1, toy())
    assert (perfect.correct, perfect.unions, perfect.precision) == (16, (12, 4), 1)
    assert perfect.intersections == perfect.unions
    assert perfect.hit == perfect.energy == 1
    wrong = locate(-toy(), toy())
    assert (wrong.correct, wrong.hit) == (0, 0)
    assert wrong.energy == 0.25  # nothing positive: as a uniform map


def test_average_precision_is_scikit_learns():
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    random = np.random.default_rng(0)
    for ties in (1, 4, 1000):
        truth, scores = random.random(300) < 0.3, random.integers(0, ties, 300) / ties
        assert average_precision(truth, scores) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    values, inside = torch.rand(8, 6), (torch.rand(8, 6) > 0.7).float()
    scaled = unit_range(values.double().numpy()).ravel()
    truth = inside.numpy().ravel().astype(bool)
    expected = average_precision_score([*~truth, *truth], [*(1 - scaled), *scaled])
    assert locate(values, inside).precision == pytest.approx(expected, abs=1e-12)
    assert locate(5 * values - 2, inside).precision == pytest.approx(expected, abs=1e-6)


def test_a_constant_map_is_defined_and_flagged():
    found = locate(torch.full((4, 4), 0.3), toy())
    assert found.constant
    assert found.precision == 0.5
    assert (found.hit, found.energy) == (0.25, 0.25)
    assert found.correct == 12  # all background


def test_truths_of_one_class():
    values = torch.rand(4, 4)
    nothing, everything = locate(values, torch.zeros(4, 4)), locate(values, torch.ones(4, 4))
    assert nothing.one_class
    assert everything.one_class
    assert nothing.hit is nothing.energy is None
    assert everything.hit == everything.energy == 1
    assert 0 < nothing.precision < 1


def test_the_distractor_gets_its_share():
    distractor = torch.zeros(4, 4)
    distractor[3, 3] = 1
    values = toy() + 4 * distractor
    found = locate(values, toy(), distractor)
    assert (found.energy, found.distractor_energy, found.distractor_area) == (0.5, 0.5, 1 / 16)
    assert found.above_distractor == 0
    assert locate(-values, toy(), distractor).above_distractor == 1
    assert locate(toy() * distractor.T, toy(), distractor).above_distractor == 0.5  # equal on both
    assert locate(values, toy()).above_distractor is None


def test_one_place_against_another_is_scikit_learns_on_their_pixels_and_turns_with_them():
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    random = np.random.default_rng(1)
    values, first, second = random.integers(0, 9, (12, 7)), random.random((12, 7)) < 0.3, random.random((12, 7)) < 0.2
    either = first != second
    found = area_between(values, first, second)
    assert found == pytest.approx(roc_auc_score(first[either], values[either]))
    assert area_between(values, second, first) == pytest.approx(1 - found)
    assert area_between(values + 5 * ~either, first, second) == pytest.approx(found)  # nothing else counts
    assert area_between(values, first, first) is None


def test_half_a_pixel_is_the_objects():
    inside = torch.tensor([[0.5, 0.49]])
    assert locate(torch.tensor([[1.0, 0.0]]), inside).correct == 2


def test_energy_of_batches():
    values = torch.rand(3, 5, 4).numpy()
    inside = torch.rand(3, 5, 4).numpy()
    expected = [(v * i).sum() / v.sum() for v, i in zip(values, inside, strict=True)]
    assert energy_share(values, inside) == pytest.approx(expected, rel=1e-6)


def test_what_is_refused():
    with pytest.raises(NonFiniteError, match="contain NaN or Inf"):
        locate(torch.full((4, 4), torch.nan), toy())
    with pytest.raises(ValueError, match=r"the map has \(3, 4\) pixels, the truth \(4, 4\)"):
        locate(torch.zeros(3, 4), toy())


def test_areas_under_the_curve_are_scikit_learns():
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    random = np.random.default_rng(0)
    for ties in (1, 4, 1000):
        values, truths = (
            random.integers(0, ties, (9, 7)) / ties,
            [random.random((9, 7)) < share for share in (0.2, 0.6)],
        )
        expected = [roc_auc_score(truth.ravel(), values.ravel()) for truth in truths]
        assert areas_under(values, truths) == pytest.approx(expected, abs=1e-12)
    assert areas_under(values, [np.ones((9, 7), bool), np.zeros((9, 7), bool)]) == [None, None]


def test_a_map_that_is_bright_where_all_objects_are_gains_nothing():
    objects = [torch.zeros(8, 8) for _ in range(3)]
    for place, each in enumerate(objects):
        each[2:5, 1 + 2 * place : 3 + 2 * place] = 1
    everywhere = torch.stack(objects).sum(0)
    knows = [locate(each, each, others=[x for x in objects if x is not each]) for each in objects]
    blob = [locate(everywhere, each, others=[x for x in objects if x is not each]) for each in objects]
    assert [found.area_under for found in knows] == [1, 1, 1]
    assert all(found.elsewhere < 0.5 for found in knows)
    assert [found.area_under - found.elsewhere for found in blob] == pytest.approx([0, 0, 0], abs=1e-12)
    assert blob[0].area_under > 0.8
    assert locate(objects[0], objects[0]).elsewhere is None
