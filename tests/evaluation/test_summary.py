"""How images add up to figures, by hand."""

import numpy as np
import pytest

from mamba_attn.evaluation.intervals import Interval
from mamba_attn.evaluation.metrics import METRICS
from mamba_attn.evaluation.summary import Figure, compare
from mamba_attn.evaluation.tables import cell


def perturbed(kept, label=1, predicted=1):
    """A line whose answers stay right for so many tenths, (positive, negative)."""
    answers = [[1] * count + [0] * (9 - count) for count in kept]
    return {"answers": answers, "label": label, "predicted": predicted, "clean": 0.9, "blank": 0.1,
            "probability": [[0.5] * 9] * 2}  # fmt: skip


def located(**changes):
    found = {"area": 0.25, "correct": 10, "pixels": 16, "intersections": (8, 2), "unions": (12, 6), "precision": 0.5,
             "hit": 1.0, "energy": 0.5, "distractor_area": None, "distractor_energy": None}  # fmt: skip
    return {**found, **changes}


def value(name, lines):
    return compare(METRICS[name], {"m": dict(enumerate(lines))}, range(len(lines)))["m"].interval.value


def test_areas_against_prediction_and_label():
    lines = [perturbed((9, 9)), perturbed((0, 9), label=0)]
    assert value("positive_auc_top", lines) == pytest.approx(40)
    assert value("negative_auc_top", lines) == pytest.approx(80)
    assert value("negative_auc_target", lines) == pytest.approx(40)  # the second is wrong, and counts
    assert value("positive_auc_target", lines) == pytest.approx((80 + 80) / 2)  # what is left of it is class 0
    assert value("negative_mean_top", lines) == 100
    assert value("gap_top", lines) == pytest.approx(0.5)
    assert value("gap_target", lines) == pytest.approx((40 - 80) / (80 * 0.5))
    assert value("deletion", lines) == pytest.approx(100 * (0.05 * 0.9 + 0.9 * 0.5 + 0.05 * 0.1))


def test_no_labels_no_accuracy_against_them():
    lines = {"m": {0: perturbed((9, 9), label=None)}}
    assert compare(METRICS["positive_auc_target"], lines, [0]) == {}
    assert compare(METRICS["positive_auc_top"], lines, [0])["m"].images == 1


def test_segmentation_is_over_the_set():
    lines = [located(), located(correct=16, intersections=(12, 4), unions=(12, 4))]
    assert value("pixel_accuracy", lines) == pytest.approx(100 * 26 / 32)
    assert value("miou", lines) == pytest.approx(100 * (20 / 24 + 6 / 10) / 2)
    assert value("energy_ratio", lines) == 2
    assert value("map", lines) == 50


def test_a_figure_that_is_no_number_has_no_place():
    lines = {"m": {0: perturbed((0, 9), label=0)}}  # never right: no gap to the label
    assert compare(METRICS["gap_target"], lines, [0]) == {}
    assert compare(METRICS["gap_top"], lines, [0])["m"].interval.value == 1


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [(12.5, 11.0, 14.0, "12.50 (1.50) *"), (65, 65 - 7e-15, 65 + 7e-15, "65.00 *"), (5e-18, -1, 1, "0 (1.00) *"),
     (0.0123, 0.01, 0.014, "0.0123 (0.002) *"), (123.4, 123.4, 123.4, "123 *")],
)  # fmt: skip
def test_a_cell_says_no_rounding_errors(value, low, high, text):
    assert cell(Figure(Interval(value, low, (low, high), high), 3, rank=1)) == text


def test_marks_say_first_and_not_behind():
    def figure(chance, rank):
        return Figure(Interval(1.0, 0.5, (0.8, 1.2), 1.5), 3, rank, Interval(1.0, 0.1, (0.5, 1.5), 2.0), chance)

    assert cell(figure(0.051, 2)) == "1.00 (0.50) ="
    assert cell(figure(0.049, 2)) == "1.00 (0.50)"
    assert cell(figure(None, 0), 4) == "1.00 (0.50) [3]"


def test_large_objects_are_left_out_of_the_small_ones():
    lines = {"m": {0: located(), 1: located(area=0.7, precision=1.0)}}
    assert compare(METRICS["map"], lines, [0, 1])["m"].interval.value == 75
    small = compare(METRICS["map_small"], lines, [0, 1])["m"]
    assert (small.interval.value, small.images) == (50, 1)


def test_the_distractor_is_weighed_by_its_area():
    assert (
        value("not_distractor", [located(energy=0.5, area=0.25, distractor_energy=0.25, distractor_area=0.125)]) == 50
    )
    assert value("not_distractor", [located(energy=0.5, distractor_energy=0.0, distractor_area=0.1)]) == 100
    assert value("not_distractor", [located(energy=0.0, distractor_energy=0.0, distractor_area=0.1)]) == 50


def test_ranks_and_leads_are_paired():
    random = np.random.default_rng(0)
    base = random.random(60)
    lines = {
        "good": {i: located(precision=float(0.4 + 0.5 * base[i])) for i in range(60)},
        "little worse": {i: located(precision=float(0.38 + 0.5 * base[i])) for i in range(60)},
        "bad": {i: located(precision=float(random.random() * 0.2)) for i in range(60)},
        "never": {},
    }
    found = compare(METRICS["map"], lines, range(60))
    assert {name: its.rank for name, its in found.items()} == {"good": 1, "little worse": 2, "bad": 3}
    second = found["little worse"]
    assert second.behind.value == pytest.approx(2, abs=1e-9)  # without any doubt
    assert second.behind.high - second.behind.low < 1e-9
    assert found["good"].interval.high - found["good"].interval.low > 3
    assert found["good"].ahead_of == ("little worse", "bad")
    assert second.chance < 1e-9
    assert found["bad"].ahead_of == ()
    assert found["bad"].behind.low > 20


def test_methods_of_fewer_images_have_no_rank():
    base = np.linspace(0.2, 0.9, 20)
    lines = {
        "easy ones alone": {i: located(precision=float(base[i])) for i in range(15, 20)},
        "all": {i: located(precision=float(base[i])) for i in range(20)},
    }
    found = compare(METRICS["map"], lines, range(20))
    assert list(found) == ["all", "easy ones alone"]
    few = found["easy ones alone"]
    assert few.interval.value > found["all"].interval.value
    assert (few.rank, few.images, few.chance, few.ahead_of) == (0, 5, None, ())
    assert few.behind.value == 0  # on the images of both


def test_many_methods_alike_are_not_called_different():
    """By intervals alone, some of 20 equal methods are behind the first: it is first by chance, and so are they."""
    random = np.random.default_rng(1)
    lines = {f"m{k}": {i: located(precision=float(random.random())) for i in range(60)} for k in range(20)}
    found = [*compare(METRICS["map"], lines, range(60)).values()]
    assert any(its.behind.low > 0 for its in found[1:])
    assert all(its.chance > 0.05 for its in found[1:])


def test_lower_is_better_where_it_is():
    lines = {"falls": {0: perturbed((1, 9))}, "stays": {0: perturbed((8, 9))}}
    assert [each.rank for each in compare(METRICS["positive_auc_top"], lines, [0]).values()] == [1, 2]
    assert next(iter(compare(METRICS["positive_auc_top"], lines, [0]))) == "falls"
    assert compare(METRICS["positive_auc_top"], lines, [0])["stays"].behind.value > 0
