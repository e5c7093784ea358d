import argparse
import json

import pytest
import timm.optim
import torch

from benchmarks import findings, series, train
from tests.benchmarks.cases import write_zip

# the runs' own files hold float16
pytestmark = pytest.mark.filterwarnings("ignore:.*were cast to the model's float32")


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif("nmuon" not in timm.optim.list_optimizers(), reason="this timm has no Muon")
def test_a_run_is_trained_found_by_findings_and_left_alone(tmp_path, capsys):
    write_zip(tmp_path / "imagenette128.zip", ["tench", "church"], 6, 2, (32, 32))
    write_zip(tmp_path / "clothing128.zip", ["dress", "hat"], 4, 2, (48, 32))
    command = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--only", "depths/1-1-2-1", "--epochs", "1"]
    series.main([*command, "--limit", "8"])
    assert "step 0 of 1" in capsys.readouterr().out
    (path,) = findings.trained_depths(tmp_path / "runs").values()
    card = json.loads(path.with_suffix(".json").read_text())
    assert (card["options"]["depths"], card["options"]["dims"], card["pixels"]) == ([1, 1, 2, 1], 24, 64)
    series.main([*command, "--limit", "8"])
    assert "step" not in capsys.readouterr().out


def test_time_is_shared_and_every_seed_comes_before_the_next(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "main", lambda argv: seen.append(train.parse(argv)))
    series.main(["--data", str(tmp_path), "--runs", str(tmp_path), "--only", "seeds", "--minutes", "5"])
    assert [(args.name, args.seed) for args in seen] == [
        (name, seed) for seed in range(3) for name in ("vmamba_micro", "vit_micro", "vim_micro")
    ]
    assert all(0 < args.minutes <= 5 for args in seen)
    assert len({str(args.out) for args in seen}) == len(seen)
    series.main(["--data", str(tmp_path), "--runs", str(tmp_path), "--minutes", "0"])
    assert len(seen) == 9


def test_depths_are_of_one_width_and_recipe():
    args = argparse.Namespace(data="d", runs=series.Path("r"), epochs=2, teacher=None, cache=None, limit=None)
    recipes = {tuple(series.command(run, args, None)[5:9]) for run in series.of_depths()}
    assert len(recipes) == 1
    widths = {run.options["dims"] for run in series.of_depths()}
    assert widths == {series.NARROW}
    assert sorted(len(run.options["depths"]) for run in series.of_depths()) == [4, 4, 4, 4, 5]
