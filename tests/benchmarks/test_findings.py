"""The page about the findings says what the results say; the benchmark finds runs and reorders models."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import findings, findings_tables, findings_verdicts
from benchmarks.findings_page import PAGE, written
from mamba_attn.figures import png
from tests.analytics import cases
from tests.explanations.cases import save

RESULTS = Path(findings.RESULTS) / "findings.json"


def details():
    return json.loads(RESULTS.read_text())["details"] if RESULTS.is_file() else {}


def test_the_page_says_what_the_results_say():
    assert written(PAGE.read_text(), details()) == PAGE.read_text(), "python benchmarks/findings.py writes the page"


def test_the_verdicts_are_those_of_the_stored_numbers():
    stored, derived = details(), details()
    findings_verdicts.derive(derived)
    assert derived == stored, "python benchmarks/findings.py derives them"


def test_an_untrained_model_is_hardly_ever_called_outside_its_own_range():
    alone, corrected = findings_verdicts.called_outside(details())
    assert len(alone) == len(corrected) > 1000
    assert np.mean(alone) < 0.1  # the seeds' numbers are neither normal nor independent
    assert np.mean(corrected) <= 0.05
    tables = list(findings_verdicts.untrained_in_place(details()))
    assert len(tables) == sum(len(store["rows"][0]["seeds"]) for store in findings_verdicts.stores_of(details()))
    assert np.mean([any(row.verdict != "inside" for row in rows) for rows in tables]) <= 0.05
    trained = [row["verdict"] for store in details()["models"]["stores"] for row in store["rows"]]
    assert "above" in trained  # the rule can say so
    assert "below" in trained


@pytest.fixture
def runs(tmp_path):
    """Runs of two orders and of both class tokens, tiny."""
    options = {**cases.OPTIONS["vmamba_micro"], "image_size": (32, 32)}
    names = list(cases.CLASSES)
    (tmp_path / "orders").mkdir()
    for run in ("raster_0", "raster_1", "morton_0"):
        folder = tmp_path / "orders" / run
        save(folder, "vmamba_micro", {**options, "order": run.partition("_")[0]}, names)
        for path in sorted(folder.iterdir()):
            path.rename(path.with_stem("vmamba_micro"))
    (tmp_path / "seeds").mkdir()
    for seed in (0, 1):
        save(tmp_path / "seeds" / str(seed), "vmamba_micro", options, names)
        for path in (tmp_path / "seeds" / str(seed)).iterdir():
            path.rename(path.with_stem("vmamba_micro"))
    (tmp_path / "depths").mkdir()
    for depths in ((1, 1, 1), (1, 2)):
        folder = tmp_path / "depths" / "-".join(map(str, depths))
        save(folder, "vmamba_micro", {**options, "depths": depths}, names)
        for path in folder.iterdir():
            path.rename(path.with_stem("vmamba_micro"))
    for token in ("first", "middle"):
        size = {**cases.OPTIONS["vim_micro"], "image_size": (48, 48), "depth": 3}
        save(tmp_path / f"class_token_{token}", "vim_micro", {**size, "class_token": token}, names)
    for path in [*tmp_path.glob("*/w.safetensors"), *tmp_path.glob("*/w.json")]:
        model = "vim_micro" if "class_token" in path.parent.name else "vmamba_micro"
        shutil.move(path, path.with_stem(model))
    for number, card in enumerate([*sorted(tmp_path.glob("*/*.json")), *sorted(tmp_path.glob("orders/*/*.json"))]):
        card.write_text(json.dumps({**json.loads(card.read_text()), "top1": 60.0 + number}))
    return tmp_path


def test_runs_are_found_where_they_are_finished(runs):
    assert list(findings.trained_orders(runs)) == ["raster", "morton"]
    said = ["3 orders of vmamba_micro", "5 orders of digits"]
    assert findings.missing(runs) == said
    (runs / "orders" / "morton_0" / "vmamba_micro.json").unlink()
    (runs / "class_token_first" / "vim_micro.json").unlink()
    assert findings.missing(runs) == ["4 orders of vmamba_micro", "class_token_first", "5 orders of digits"]


def test_all_is_measured_and_the_page_is_written_from_it(runs, tmp_path, monkeypatch, capsys):
    import argparse

    data = tmp_path / "data"
    cases.class_folders(data / "photos", 1)
    monkeypatch.setattr(findings, "OBJECTS", "photos")
    monkeypatch.setattr(findings, "DIGITS", "photos")
    monkeypatch.setattr(findings, "DEMOS", ())
    monkeypatch.setattr(
        findings,
        "measured",
        lambda args, models, selector: [findings.measure(args, name, *its, selector) for name, its in models.items()],
    )
    parser = argparse.ArgumentParser()
    findings.add_options(parser)
    args = parser.parse_args(["--data", str(data), "--runs", str(runs), "--work", str(tmp_path / "work")])
    args.images, args.seeds, args.answers, args.quick, args.out = 2, 2, 3, False, tmp_path / "out"
    monkeypatch.setattr(
        findings, "draw", drawn := lambda *a: None if a[1].startswith("findings_matrices") else _drawn(*a)
    )
    assert drawn is findings.draw
    figures, found = findings.run_findings(args)
    assert [each.spread.median for each in figures] == [2, 2]
    assert [store["name"] for store in found["orders"]["stores"]] == ["order raster", "order morton"]
    assert found["orders"]["orders"][0]["accuracy"] == {"raster": [63, 64], "morton": [62]}
    assert found["orders"]["orders"][0]["spread"] == 1.5
    (seeds,) = found["trained seeds"]["stores"]
    row = next(row for row in seeds["rows"] if (row["finding"], row["place"]) == ("entropy", "all"))
    assert len(row["others"]) == 1
    raster, morton = ({row["finding"]: row for row in store["rows"]} for store in found["orders"]["stores"])
    assert len(raster["entropy"]["others"]) == 1
    assert "others" not in morton["entropy"]
    assert {"order raster_0", "order raster_1", "order morton_0"} <= set(found["training"])
    assert [store["name"] for store in found["depths"]["stores"]] == ["depths 1-2", "depths 1-1-1"]
    assert [len(store["depths"]) for store in found["depths"]["stores"]] == [3, 3]
    page = written(PAGE.read_text(), json.loads(json.dumps(found)))
    assert "top-1 of 3 models in 2 orders differs by 1.50 points" in page
    assert "- 2 orders of one model, 2 seeds each: top-1 from 62.0 % (morton) to 63.5 % (raster); orders" in page
    said = r"(rows follow the (order|raster)|which rows follow is open)"
    assert re.search(rf"- morton: [-0-9.]+ \[.*\], so {said}; untrained", page)
    assert page.count("| class_token_") == 2
    depths = re.search(r"<!-- depths.*?end -->", page, re.DOTALL)[0]
    assert "| 1-2 | 1-1-1 |" in depths
    assert re.search(r"\|  \| entropy \| [0-9.]+ \([0-9.]+\)!? \| [0-9.]+ \([0-9.]+\)!? \|", depths)
    trained = re.search(r"<!-- seeds.*?end -->", page, re.DOTALL)[0]
    assert ("| entropy | " in trained) == ("training" in row)
    table = found["reordered"]["top1"]
    assert np.shape(table) == (2, 2)
    assert found["reordered"]["images"] == 3
    for at, row in enumerate(found["reordered"]["gained"]):
        assert row[at] == [0, 0, 0]
        for place, (value, low, high) in enumerate(row):
            assert value == pytest.approx(table[at][place] - table[at][at], abs=0.02)
            assert low is None or low <= value <= high
    assert written(page, json.loads(json.dumps(found))) == page
    assert "Not measured yet" not in re.search(r"<!-- reordered.*?end -->", page, re.DOTALL)[0]


def _drawn(args, name, rgb):
    args.out.mkdir(exist_ok=True)
    png.save_png(args.out / name, rgb)


def test_parts_that_are_taken_over_have_no_numbers_of_other_formulas(tmp_path):
    row = {"place": "all", "trained": {"value": 1.0, "low": None, "high": None, "units": 1}}
    rows = [{**row, "finding": name} for name in ("entropy", "image_share")]
    part = {"stores": [{"rows": rows}]}
    old, new = {"images": 9, "seeds": 4}, {"formulas": findings.VERSION, "images": 3, "seeds": 2}
    (tmp_path / "old.json").write_text(
        json.dumps({"details": {"orders": part, "models": {**part, **new}, **old}, "figures": []})
    )
    found = findings.earlier(tmp_path / "old.json")
    assert [its["finding"] for its in found["orders"]["stores"][0]["rows"]] == ["entropy"]
    assert {key: found["orders"][key] for key in new} == {"formulas": 1, **old}
    assert found["models"] == {**part, **new}


def test_models_of_another_run_are_added_by_name():
    before = [{"name": "seeds vim_micro", "accuracy": 1}, {"name": "seeds vit_micro", "accuracy": 2}]
    found = findings.merged(before, [{"name": "seeds vit_micro", "accuracy": 3}, {"name": "seeds vmamba_micro"}])
    assert [(its["name"], its.get("accuracy")) for its in found] == [
        ("seeds vim_micro", 1), ("seeds vit_micro", 3), ("seeds vmamba_micro", None)
    ]  # fmt: skip


def test_accuracy_is_of_the_right_answers():
    class Second(torch.nn.Module):
        def forward(self, pixels):
            return torch.tensor([[0.0, 1.0]]).expand(len(pixels), 2)

    batches = [(torch.zeros(3, 3, 4, 4), torch.tensor([1, 1, 0])), (torch.zeros(1, 3, 4, 4), torch.tensor([1]))]
    assert findings.answers(Second(), batches).tolist() == [1, 1, 0, 1]


def test_what_the_numbers_decide_is_said_by_them():
    def row(low, high, random):
        about = {"finding": "grid_locality", "place": "all", "trained": {"value": 0.5, "low": low, "high": high},
                 "random": random, "paper": "holds" if low > 0 else "open"}  # fmt: skip
        return findings_tables.holds(about, [">", 0.0])

    assert row(0.1, 0.9, 0.3) == "holds, random weights too: 0.5"
    assert row(0.1, 0.9, -0.3) == "holds, random weights do not: 0.5"
    assert row(-0.1, 0.9, 0.3) == "open: 0.5"
