"""Fills: one map per method and image, the lines that ``mamba-attn compare`` would write, what is read from them."""

import shutil
import time
from pathlib import Path

import pytest

from benchmarks import comparison_table, fills
from mamba_attn import images
from mamba_attn.evaluation.scheduler import run
from mamba_attn.evaluation.store import Store

MODELS, METHODS, FILLS = (
    ("vim_digits", "vit_digits"),
    ("random", "mamba_lrp", "attn_lrp"),
    ("mean", "drop"),
)


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in images.samples():
        shutil.copy(path, folder / path.name)
    monkeypatch.setattr(fills, "COLLECTION", "photos")
    return {fill: fills.plan(MODELS, tmp_path, METHODS, fill, 2) for fill in FILLS}


def test_maps_are_made_once_and_lines_are_those_of_compare(
    plans: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mamba_attn.evaluation import measures

    made, build = [], measures.build
    monkeypatch.setattr(measures, "build", lambda name, *rest: (made.append(name), build(name, *rest))[1])
    store = Store(tmp_path / "measured.jsonl")
    fills.measure(plans, store)
    assert sorted(made) == ["attn_lrp", "mamba_lrp", "random", "random"]  # for two fills
    assert len(store) == 2 * 4 * 2
    fills.measure(plans, Store(tmp_path / "measured.jsonl"))
    assert len(made) == 4  # resumed: nothing is lacking
    other = Store(tmp_path / "other.jsonl")
    for each in plans.values():
        run(each, other)
    assert dict(other.items()) == dict(store.items())
    found = fills.summary(plans, store)
    assert [tables["rival"] for tables in found.values()] == ["mamba_lrp", "attn_lrp"]
    for tables in found.values():
        assert set(tables["figures"]) == set(FILLS)
        assert set(fills.order(tables)) == {"random", tables["rival"]}
        for fill in FILLS:
            gap = tables["figures"][fill]["gap_top"]
            value, low, high = tables["ahead of the rival"][fill]["gap_top"]["random"]
            assert value == pytest.approx(gap["random"][0] - gap[tables["rival"]][0], abs=1e-3)
            assert low <= value <= high


def test_a_method_gets_no_more_images_than_asked(plans: dict[str, object], tmp_path: Path) -> None:
    few = {fill: fills.plan(MODELS[:1], tmp_path, ("random@1", "centre"), fill, 2) for fill in plans}
    store = Store(tmp_path / "measured.jsonl")
    fills.measure(few, store)
    assert sorted(key.method for key, _ in store.items()) == ["centre"] * 4 + ["random"] * 2


def test_no_image_is_begun_after_the_deadline(plans: dict[str, object], tmp_path: Path) -> None:
    store = Store(tmp_path / "measured.jsonl")
    fills.measure(plans, store, time.monotonic() - 1)
    assert len(store) == 0


def table(*leads: list[float]) -> dict[str, object]:
    ahead = {fill: {"gap_top": {"mask_refinement": lead}} for fill, lead in zip(fills.FILLS, leads, strict=True)}
    figures = {fill: {"gap_top": {"mask_refinement": [0.5, 0.4, 0.6, 60]}} for fill in fills.FILLS}
    return {"rival": "mamba_lrp", "ahead of the rival": ahead, "figures": figures}


def test_our_method_is_kept_only_where_it_is_ahead_on_three_of_four_fills() -> None:
    up, open_, down = [0.1, 0.05, 0.2], [0.1, -0.05, 0.2], [-0.1, -0.2, -0.05]

    def words(*tables: dict[str, object]) -> str:
        return comparison_table.fills_words({"fills": {"details": {"models": dict(zip("ab", tables, strict=True))}}})

    assert "Use it in place of `mamba_lrp` where removal is the question" in words(
        table(up, up, up, open_), table(up, down, up, up)
    )
    said = words(table(up, up, up, up), table(up, open_, up, down))
    assert "on a (60 images) ahead of `mamba_lrp` by the paired interval under all 4 fills" in said
    assert "on b (60 images) ahead of `mamba_lrp` by the paired interval under black and drop, and behind" in said
    assert "under road. It should lead `mamba_lrp` under 3 of 4 fills on every model, and does not: we rec" in said
    assert "`keep_and_remove_lrp`, our own, repeats relevance" in said


def test_methods_of_fewer_images_come_last() -> None:
    gap = {"short": [0.9, 0.8, 1.0, 12], "good": [0.7, 0.6, 0.8, 60], "poor": [0.1, 0.0, 0.2, 60]}
    assert fills.order({"figures": {"black": {"gap_top": gap}}}) == ["good", "poor", "short"]
