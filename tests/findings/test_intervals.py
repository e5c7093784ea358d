"""The bootstrap covers what it should, and chance is what all orders give."""

import numpy as np
import pytest

from mamba_attn.findings.intervals import Estimate, difference, mean, together


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(0)
    held = [(found := mean(random.standard_normal(40) + 3)).low <= 3 <= found.high for _ in range(150)]
    assert 0.86 <= np.mean(held) <= 0.99


def test_the_same_images_in_two_models_make_a_narrow_difference():
    random = np.random.default_rng(0)
    image = 10 * random.standard_normal(50)
    other = image + 0.1 * random.standard_normal(50)
    found = difference(image + 0.5, other)
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert 0.4 < found.low < found.high < 0.6
    assert found.beyond(">", 0) is True
    assert found.beyond("<", 0) is False
    assert Estimate(1e-7, 1e-8, 2e-7, 9).beyond(">", 0) is None  # float32's rounding
    unpaired = difference(random.permutation(image), other)
    assert unpaired.high - unpaired.low > 10 * (found.high - found.low)


def test_what_there_is_too_little_of():
    assert mean(np.array([np.nan])) is None
    assert mean(np.array([2.0, np.nan])) == Estimate(2.0, None, None, 1)
    assert mean(np.array([2.0])).beyond(">", 0) is None
    assert difference(np.ones(3), np.ones(2)) is None
    assert difference(np.array([np.nan, 1.0]), np.array([1.0, np.nan])) is None
    assert difference(np.array([2.0, 1.0]), np.array([1.0, np.nan])) == Estimate(1.0, None, None, 1)


def test_few_numbers_in_one_order_are_as_likely_as_all_their_orders():
    found = together(np.arange(5), np.arange(5) ** 2)
    assert found.correlation == pytest.approx(1)
    assert found.chance == pytest.approx(2 / 120)
    assert found.border == pytest.approx(0.9)
    assert together(np.arange(5), -np.arange(5)).correlation == pytest.approx(-1)
    assert together(np.arange(3), np.arange(3)).chance == pytest.approx(2 / 6)
    assert together(np.arange(2), np.arange(2)).chance == 1
    assert together(np.arange(4), np.ones(4)).chance == 1
    many = together(np.arange(12), np.arange(12))
    assert many.chance == pytest.approx(1e-4)
    random = np.random.default_rng(0)
    chances = [together(random.random(6), random.random(6)).chance for _ in range(60)]
    assert np.mean(np.array(chances) <= 0.1) < 0.25
