"""The table of methods: what is planned, and how a lead is read from what was measured."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import comparison, comparison_table
from benchmarks.cases import AIMS, DIGITS, EXPLAINED, ON_DIGITS, TARGETS
from benchmarks.comparison import BASELINES, OURS, PARTS, Part
from benchmarks.marked_pages import filled
from mamba_attn import images
from mamba_attn.attribution import catalogue
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
    for name in (OURS, *(name.partition(":")[0] for name in BASELINES)):
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


def test_a_lead_is_over_the_best_baseline_on_the_half_that_chose_nothing(photos: Path, tmp_path: Path) -> None:
    small = part(aims=("negative_auc_top", "positive_auc_top"))
    planned = comparison.plan(small, photos, None)
    store = Store(tmp_path / "measured.jsonl")
    ((selector, vim), _) = planned.pairs
    data = planned.data[selector]
    report = data.chosen("report")
    assert 0 < len(report) < len(data)
    tenths = {OURS: 6, "random": 2, "saliency:colours=sum": 4, "centre": 9}  # the centre is no baseline
    for method, count in tenths.items():
        for index in range(len(data)):
            kept = count if index in report else 9 - count
            store.add([(planned.key(data, index, vim, method, "perturbation"), line(kept))])
    negative, positive = comparison.leads(small, planned, store)
    assert (negative.how, positive.how) == ("saliency:colours=sum", "random")
    assert negative.spread.median == pytest.approx(20)  # two tenths of 100
    assert positive.spread.median == pytest.approx(-40)
    assert negative.spread.high - negative.spread.low < 1e-9  # all images alike
    assert negative.spread.count == len(report)
    assert negative.target == "vim_digits negative_auc_top"
    assert comparison.leads(part(), planned, store) == []


def test_the_time_of_the_whole_is_told_from_a_fair_share(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("mamba_attn.evaluation.running.run", lambda plan, store, workers: seen.append((plan, workers)))
    clock = iter([10.0, 10.0 + 3600])
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: next(clock))
    small = part(models=("vit_digits",), methods=("centre@12", "random"))
    assert comparison.core_hours(small, photos, 6) == 4  # an hour for 6 of 24 images
    ((planned, workers),) = seen
    assert (planned.limit, planned.most, workers) == (6, {"centre": 3}, 1)


def test_the_page_has_the_tables_of_the_results() -> None:
    page = comparison_table.PAGE.read_text()
    assert filled(page, comparison_table.PARTS, json.loads(comparison_table.RESULTS.read_text())) == page


def test_the_page_says_what_ours_is_not_ahead_of() -> None:
    figures = {
        "saliency": [9.0, 8.0, 10.0, 4, 1], "mamba_lrp": [10.0, 9.0, 11.0, 4, 2], OURS: [12.0, 11.0, 13.0, 4, 3],
        "occlusion:strides=8": [13.0, 12.0, 14.0, 2, 4], "random": [30.0, 29.0, 31.0, 4, 5],
    }  # fmt: skip
    table = {"model": "vim_micro", "images": 4, comparison_table.FIGURES: {"positive_auc_top": figures},
             "ours is ahead of": {"positive_auc_top": ["random"]}}  # fmt: skip
    nothing = {**table, comparison_table.FIGURES: {"negative_auc_top": {}, "miou": {}}}
    details = {"perturbation": {"tables": [table]}, "boxes": {"halves": {"report": [nothing]}},
               "digits": {"halves": {"report": [nothing]}}}  # fmt: skip
    table[comparison_table.FIGURES] |= {"negative_auc_top": {}}
    row = comparison_table.standing_table({"details": details}).splitlines()[-1]
    assert row == ("| vim_micro, positive AUC | 1 of 3 | `saliency`, `occlusion` | `saliency`, `mamba_lrp` |")
    rows = comparison_table.methods_table({"details": details}).splitlines()
    assert rows[2] == "| `saliency` | 9.0 / - / - / - |  |  |"
    assert "| `occlusion` | 13.0 (2) / - / - / - |  |  |" in rows
