"""Intervals, and whether differences are paired."""

import numpy as np
import pytest

from mamba_attn.evaluation.intervals import Resampler, bootstrap, interval, mean, ratio_of_means


def test_the_interval_is_that_of_the_sample():
    sample = np.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap(mean, sample)
    assert found.value == sample.mean()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * sample.std() / 20, rel=0.1)
    assert found.low < found.quartiles[0] < found.value < found.quartiles[1] < found.high
    assert found == bootstrap(mean, sample)
    paired = bootstrap(ratio_of_means, 3 * sample, sample)
    assert (paired.low, paired.value, paired.high) == pytest.approx((3, 3, 3))


def test_the_same_draws_serve_all_methods_so_that_differences_are_paired():
    noise = np.random.default_rng(0).normal(0, 10, (200, 1))
    everyone, resampler = np.ones(200, bool), Resampler(200, seed=3)
    first, second = (resampler.means(noise + shift, everyone)[:, 0] for shift in (0.0, 0.5))
    assert np.allclose(second - first, 0.5)  # far apart though each alone is uncertain by 1.4
    assert interval(first[0], first[1:]).high - first[0] > 1
    assert first[0] == pytest.approx(noise.mean())


def test_images_that_say_nothing_are_left_out_of_every_draw():
    columns, valid = np.array([[1.0], [np.pi], [3.0]]), np.array([True, False, True])
    drawn = Resampler(3).means(columns, valid)
    assert drawn[0, 0] == 2
    assert set(np.round(drawn[:, 0], 6)) <= set(np.round([1, 3, 2, 5 / 3, 7 / 3], 6))


def test_draws_that_are_no_number_are_left_out():
    found = interval(2.0, np.array([1.0, np.nan, 3.0, np.inf]))
    assert (found.low, found.high) == pytest.approx((1.05, 2.95))
    assert np.isnan(interval(2.0, np.array([np.nan])).low)
