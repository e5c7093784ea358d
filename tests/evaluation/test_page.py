"""The page of a comparison: what its charts and captions say."""

import re

import pytest

from mamba_attn.core.document import Look
from mamba_attn.evaluation.intervals import Interval
from mamba_attn.evaluation.page import _answer, _ticks, intervals


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.13, 0.31, [-0.1, 0, 0.1, 0.2, 0.3]),
        (5.83, 56.7, [10, 20, 30, 40, 50]),
        (3, 6, [3, 4, 5, 6]),
    ],
)
def test_an_axis_has_a_few_round_numbers(low, high, expected):
    assert _ticks(low, high) == pytest.approx(expected)


def test_intervals_stand_over_an_axis_with_its_zero():
    figures = {"one": Interval(0.5, 0.2, (0.4, 0.6), 0.9), "other": Interval(-0.1, -0.42, (-0.2, 0), 0.1)}
    drawn = intervals("gap", figures, {name: Look("#123456") for name in figures}, {})
    assert [float(text) for text in re.findall(r">(-?[\d.]+)</text>", drawn)] == [-0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8]
    assert drawn.count("#888888") == 1  # zero


def test_a_prediction_is_right_or_wrong_where_the_model_has_the_class():
    model = ["hat", "shoe"]
    assert _answer(model, ["shoe", "boat"], 0, 1) == "shoe (correct)"
    assert _answer(model, ["shoe", "boat"], 0, 0) == "hat (wrong, label: shoe)"
    assert _answer(model, ["shoe", "boat"], 1, 0) == "hat"
    assert _answer(model, [], None, 0) == "hat"
    assert _answer(model, [], None, None) == ""
