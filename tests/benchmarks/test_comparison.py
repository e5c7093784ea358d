"""The table of methods: what is planned, and how a lead is read from what was measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import comparison, comparison_leads, comparison_table
from benchmarks.cases import AIMS, DIGITS, EXPLAINED, ON_DIGITS, TARGETS
from benchmarks.comparison import OURS, PARTS, PUBLISHED, Part
from benchmarks.marked_pages import filled
from mamba_attn import images
from mamba_attn.attribution import catalogue
from mamba_attn.evaluation.specs import Model
from mamba_attn.evaluation.store import Store


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for path in images.samples():
        for copy in range(4):
            shutil.copy(path, tmp_path / "photos" / f"{path.stem}_{copy}.jpg")
    return tmp_path


def part(**changes: object) -> Part:
    settings = {"models": ("vim_digits", "vit_digits"), "methods": (OURS, "random", "saliency:colours=sum", "centre")}
    return Part("small", ("photos",), ("perturbation",), **{**settings, **changes})  # type: ignore[arg-type]


def line(tenths: int) -> dict[str, object]:
    """Right for so many tenths of the image removed, in either order."""
    answers = [[3] * tenths + [4] * (9 - tenths)] * 2
    return {"answers": answers, "label": None, "predicted": 3, "clean": 0.9, "blank": 0.1,
            "probability": [[0.5] * 9] * 2}  # fmt: skip


def test_every_aim_has_its_target_and_its_part() -> None:
    aims = {(name, aim) for part in PARTS for aim in part.aims for name in part.models if not name.startswith("vit")}
    assert aims == {*((n, aim) for n in EXPLAINED for aim in AIMS), *((n, aim) for n in DIGITS for aim in ON_DIGITS)}
    assert {f"{name} {aim}" for name, aim in aims} <= set(TARGETS)
    for name in (OURS, *(name.partition(":")[0] for name in PUBLISHED)):
        assert name in catalogue.METHODS


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_parts_ask_for_methods_that_there_are(part: Part, photos: Path) -> None:
    planned = comparison.plan(Part(part.name, ("photos",), part.measures, part.models, part.half, 3, (), part.methods),
                              photos, 3)  # fmt: skip
    assert OURS in planned.methods
    assert len(planned.methods) >= 10
    if not part.methods and part.models == comparison.MICRO:
        assert set(comparison.PUBLISHED) <= set(planned.methods)
        assert {"random", "raw_attention", "attention_rollout", "mamba_attribution"} <= set(planned.methods)


def test_a_lead_is_over_the_best_other_method_on_the_half_that_chose_nothing(photos: Path, tmp_path: Path) -> None:
    small = part(aims=("negative_auc_top", "positive_auc_top"))
    planned = comparison.plan(small, photos, None)
    store = Store(tmp_path / "measured.jsonl")
    ((selector, vim), _) = planned.pairs
    data = planned.data[selector]
    report = data.chosen("report")
    assert 0 < len(report) < len(data)
    tenths = {OURS: 6, "random": 2, "saliency:colours=sum": 4, "centre": 9}
    for method, count in tenths.items():
        for index in range(len(data)):
            kept = count if index in report else 9 - count
            store.add([(planned.key(data, index, vim, method, "perturbation"), line(kept))])
    negative, positive = comparison.leads(small, planned, store)
    assert (negative.how, positive.how) == ("centre", "random")  # controls count, too
    assert negative.spread.median == pytest.approx(-25)  # the trapezoid's end counts half
    assert positive.spread.median == pytest.approx(-40)
    assert negative.interval == pytest.approx((-25, -25))
    assert negative.spread.high - negative.spread.low < 1e-9  # all images alike
    assert negative.spread.count == len(report)
    assert negative.target == "vim_digits negative_auc_top"
    assert comparison.leads(part(), planned, store) == []


def test_the_page_has_the_tables_of_the_results() -> None:
    page = comparison_table.PAGE.read_text()
    assert filled(page, comparison_table.PARTS, comparison_table.stored()) == page


def test_the_leads_are_those_of_the_stored_figures_and_leave_no_method_out() -> None:
    results = json.loads(comparison_table.RESULTS.read_text())
    derived = json.loads(json.dumps(results))
    comparison_leads.derive(derived)
    assert derived == results, "python benchmarks/comparison_table.py derives them"
    rows = {row["what"]: row for row in results["figures"] if "lead of" in row["what"]}
    assert len(rows) == 2 * len(AIMS) + 2
    for table in results["details"]["perturbation"]["tables"]:
        if table["model"] in EXPLAINED:
            found = table[comparison_leads.FIGURES]["positive_auc_top"]
            best = min((name for name in found if name != OURS), key=lambda name: found[name][0])
            row = rows[TARGETS[f"{table['model']} positive_auc_top"].what]
            assert row["how"] == best
            shared = found[best][3] == found[OURS][3]  # else the lead is over the images of both
            assert row["value"] == pytest.approx(found[best][0] - found[OURS][0], abs=1e-6 if shared else 1)
            assert row["interval"][0] < row["value"] < row["interval"][1]


def test_a_lead_from_two_intervals_is_that_of_two_samples() -> None:
    random = np.random.default_rng(0)
    held = []
    for _ in range(300):
        figures = []
        for truth in (5.0, 3.0):
            sample = truth + 4 * random.standard_normal(100)
            half = 1.96 * sample.std() / 10
            figures.append((sample.mean(), sample.mean() - half, sample.mean() + half, 100, 1))
        value, low, high = comparison_leads.difference(*figures, 1)
        assert value == pytest.approx(figures[0][0] - figures[1][0])
        assert comparison_leads.difference(*figures, -1) == pytest.approx((-value, -high, -low))
        held.append(low <= 2 <= high)
    assert 0.9 < np.mean(held) < 0.99


def test_a_measured_lead_is_kept_and_one_without_pairs_is_refused() -> None:
    results = json.loads(comparison_table.RESULTS.read_text())
    row = next(row for row in results["figures"] if row["how"].startswith("occlusion"))
    paired = {**results["figures"][0], "interval": [-5.0, -3.0]}
    results["figures"][0] = paired
    comparison_leads.derive(results)
    assert results["figures"][0] == paired
    results["figures"].remove(row)
    with pytest.raises(ValueError, match="got fewer images, and no paired lead over it is stored"):
        comparison_leads.derive(results)


def test_the_page_says_what_ours_is_not_ahead_of() -> None:
    figures = {
        "saliency": [9.0, 8.0, 10.0, 4, 1], "mamba_lrp": [10.0, 9.0, 11.0, 4, 2], OURS: [12.0, 11.0, 13.0, 4, 3],
        "occlusion:strides=8": [13.0, 12.0, 14.0, 2, 4], "random": [30.0, 29.0, 31.0, 4, 5],
    }  # fmt: skip
    table = {"model": "vim_micro", "images": 4, comparison_table.FIGURES: {"positive_auc_top": figures},
             "ours is ahead of": {"positive_auc_top": ["random"]}}  # fmt: skip
    nothing = {**table, comparison_table.FIGURES: {"negative_auc_top": {}, "miou": {}, "shuffled_auc": {}}}
    details = {"perturbation": {"tables": [table]}, "boxes": {"tables": [nothing]},
               "digits": {"halves": {"report": [nothing]}}}  # fmt: skip
    table[comparison_table.FIGURES] |= {"negative_auc_top": {}}
    results = {"figures": [], "details": details}
    comparison_leads.derive(results)
    row = comparison_table.standing_table(results).splitlines()[-1]
    assert row == (
        "| vim_micro, positive AUC | `saliency`: 3.0 behind [1.6, 4.4] | 1 of 4 | **`saliency`**, **`mamba_lrp`**, "
        "`occlusion` |"
    )
    table["ours is ahead of"], figures["random"][3] = {}, 2  # no paired interval: still far behind
    assert comparison_table.standing_table(results).splitlines()[-1] == row
    rows = comparison_table.methods_table({"details": details}).splitlines()
    assert rows[2] == "| `saliency` | 9.0 / - / - / - / - |  |  |"
    assert "| `occlusion` | 13.0 (2) / - / - / - / - |  |  |" in rows


def test_a_part_of_unchanged_models_is_kept_with_its_leads() -> None:
    there = json.loads(comparison.RESULTS.read_text())
    (digits,) = (part for part in PARTS if part.name == "digits")
    figures, details = comparison._kept(digits)
    rows = [figure.row() for figure in figures]
    assert [row["what"].partition(":")[0] for row in rows] == list(DIGITS)
    assert all(row in there["figures"] for row in rows)
    assert details["tables"] == there["details"]["digits"]["tables"]
    assert "commit" in details["measured on"]


def test_models_whose_weights_are_others_than_the_measured_ones_are_named() -> None:
    own = Model("vim_digits").identity
    assert comparison.changed([{"model": "vim_digits", "weights": own}]) == []
    other = [{"model": "vim_digits", "weights": "vim_digits:0"}, {"model": "vmamba_digits"}]
    assert comparison.changed(other) == ["vim_digits", "vmamba_digits"]
