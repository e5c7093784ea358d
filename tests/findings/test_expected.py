"""Untrained models are called outside their own range as rarely as is said, alone and over a table."""

import numpy as np
import pytest
from scipy import stats

from mamba_attn.evaluation.intervals import LEVEL, holm
from mamba_attn.findings.controls import ALL, OUTSIDE, Row, compared, pairs
from mamba_attn.findings.intervals import Estimate, effect, expected, quantile, tail
from mamba_attn.findings.registry import FINDINGS
from mamba_attn.findings.tables import in_words, over_pairs, probability, training


@pytest.mark.parametrize("freedom", [*range(1, 12), 29, 30])
def test_students_t_is_scipys(freedom):
    for t in (0, 0.1, 0.7, 1, 2.5, 10, 80):
        assert tail(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-13)
    for chance in (0.5, 0.05, 0.001):
        assert quantile(freedom, chance) == pytest.approx(stats.t.isf(chance / 2, freedom), rel=5e-9)  # as scipy 1.11


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_one_more_untrained_model_is_outside_in_five_of_a_hundred(count):
    random = np.random.default_rng(count)
    trials = 4000
    drawn = 7 + 3 * random.standard_normal((trials, count + 1))
    found = [expected(each[0], each[1:]) for each in drawn.tolist()]
    outside = sum(its.chance <= LEVEL for its in found)
    assert stats.binomtest(outside, trials, LEVEL).pvalue > 1e-3
    assert outside == sum(not its.low <= each[0] <= its.high for its, each in zip(found, drawn, strict=True))


def test_the_range_is_as_it_is_defined_and_seeds_alike_keep_float32s_rounding():
    seeds = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = expected(3.0, seeds)
    half = stats.t.ppf(0.975, 4) * np.std(seeds, ddof=1) * np.sqrt(1.2)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert found.chance == 1
    assert found.below == 2
    assert [expected(value, seeds).below for value in (0.0, 9.0)] == [0, 5]
    assert expected(1.0, [2.0]) is None
    assert expected(1.0, []) is None
    assert expected(100 * (1 + 1e-7), [100.0] * 5).chance > LEVEL
    assert expected(101.0, [100.0] * 5).chance < 1e-9


def test_holm_is_as_published():
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]


@pytest.mark.parametrize("trained", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_trained_models_that_are_untrained_ones_differ_in_at_most_five_of_a_hundred(trained, spread):
    random = np.random.default_rng(trained)
    first, rest = 7 + spread * random.standard_normal((2000, trained)), 7 + random.standard_normal((2000, 20))
    found = [effect(*each) for each in zip(first.tolist(), rest.tolist(), strict=True)]
    outside = sum(its.chance <= LEVEL for its in found)
    assert stats.binomtest(outside, 2000, LEVEL, "greater").pvalue > 1e-3
    assert outside == sum(not its.low <= 0 <= its.high for its in found)


def test_what_training_does_is_a_difference_of_models():
    trained, rest = [5.0, 6.0, 5.5], [1.0, 2.0, 3.0, 2.5]
    found, truth = effect(trained, rest), stats.ttest_ind(trained, rest, equal_var=False)
    assert found.value == pytest.approx(np.mean(trained) - np.mean(rest))
    assert found.chance == pytest.approx(2 * stats.t.sf(truth.statistic, 2))
    half = found.value / truth.statistic * stats.t.isf(0.025, 2)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert (effect([5.0], rest), effect(trained, [1.0])) == (None, None)
    row = Row("entropy", ALL, Estimate(5.0, None, None, 9), 2.1, tuple(rest), others=(6.0, 5.5))
    (one,) = compared([row])
    assert (one.training.models, one.training.corrected) == (3, pytest.approx(found.chance))
    assert one.training_verdict == "more"
    assert training(one).startswith("3.38 [")
    assert training(one).endswith("more (3 models)")
    several = compared(
        [row, *(Row(name, ALL, row.trained, 5.0, (4.0, 6.0), others=(5.1,)) for name in list(FINDINGS)[:9])]
    )
    assert several[0].training.corrected == pytest.approx(10 * found.chance)
    assert several[1].training_verdict == "no difference"
    assert (compared([Row("entropy", ALL, row.trained)])[0].training, training(Row("entropy", ALL, row.trained))) == (
        None,
        "",
    )


def rows_of(values, seeds):
    return [
        Row(name, ALL, Estimate(float(value), None, None, 9), float(np.mean(its)), tuple(map(float, its)))
        for name, value, its in zip(FINDINGS, values, seeds, strict=False)
    ]


def test_a_table_of_an_untrained_model_has_an_error_as_rarely_as_its_level_says():
    random = np.random.default_rng(0)
    tables = [
        compared(rows_of(random.standard_normal(17), random.standard_normal((17, 5)))) for _ in range(600)
    ]  # fmt: skip
    erring = sum(any(row.verdict != "inside" for row in rows) for rows in tables)
    assert erring > 0
    assert stats.binomtest(erring, 600, OUTSIDE, "greater").pvalue > 1e-3
    numbers = [row.untrained.chance <= LEVEL for rows in tables for row in rows]
    assert stats.binomtest(sum(numbers), len(numbers), LEVEL).pvalue > 1e-3


def test_verdicts_are_corrected_over_their_own_table():
    seeds = [[-1.0, -0.5, 0.0, 0.5, 1.0]] * 4
    high, low, near, _ = rows = compared(rows_of([40.0, -40.0, 3.1, 0.0], seeds))
    assert (high.verdict, low.verdict) == ("above", "below")
    assert near.untrained.chance < OUTSIDE < near.untrained.corrected
    assert near.verdict == "inside"
    (alone,) = compared([near])
    assert alone.verdict == "above"
    block = Row("entropy", "layers.0", near.trained, 0.0, near.seeds)
    assert compared([*rows, block])[4].verdict == "above"  # of another table
    (unknown,) = compared([Row("entropy", ALL, near.trained)])
    assert (unknown.untrained, unknown.verdict) == (None, "")


def test_how_it_is_said():
    assert [in_words(verdict) for verdict in ("above", "below", "inside", "")] == [
        "outside, above", "outside, below", "inside", "",
    ]  # fmt: skip
    assert [probability(value) for value in (0.0001, 0.0503, 1.0)] == ["< 0.001", "0.0503", "1"]
    assert pairs([0, 0, 1, 1, 1, 2]) == [1, 3]
    assert over_pairs("block_correlation", [1, 3]) == ", of 1 and 3 pairs"
    assert over_pairs("block_correlation", [1]) == ", of 1 pair"
    assert over_pairs("entropy", [3]) == over_pairs("block_correlation", []) == ""
