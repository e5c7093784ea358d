"""Remove and retrain: what is removed is what a map ranks highest, and every training is done once."""

import argparse

import numpy as np
import pytest
import timm.optim
import torch

from benchmarks import retrain
from tests.benchmarks.cases import write_zip

SIDE = retrain.PIXELS // retrain.CELL


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fill", ["mean", "blur"])
@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_the_highest_cells_are_filled_and_no_other(fill, fraction):
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, retrain.PIXELS, retrain.PIXELS, 3), dtype=np.uint8)
    order = np.stack([draw.permutation(SIDE * SIDE) for _ in range(3)])
    found = retrain.filled(pixels, order, fraction, fill)
    cells = (found != pixels).any(-1).reshape(3, SIDE, retrain.CELL, SIDE, retrain.CELL).any((2, 4)).reshape(3, -1)
    for changed, its in zip(cells, order, strict=True):
        assert set(np.flatnonzero(changed)) == set(its[: round(fraction * len(its))])
    if fill == "mean":
        row, column = divmod(int(order[1, 0]), SIDE)
        cell = found[1, row * retrain.CELL, column * retrain.CELL].astype(float)
        np.testing.assert_allclose(cell, pixels[1].reshape(-1, 3).mean(0), atol=0.51)


def test_jobs_are_four_methods_three_fractions_two_seeds_and_the_blurred_control():
    found = retrain.jobs()
    assert len(found) == len({job.name for job in found}) == 3 + 4 * 3 * 2 + 4 * 2
    assert found[0] == retrain.Job("", 0.0, "mean", 0)


@pytest.mark.skipif("nmuon" not in timm.optim.list_optimizers(), reason="this timm has no Muon")
def test_all_is_trained_once(tmp_path, monkeypatch, capsys):
    write_zip(tmp_path / "imagenette128.zip", ["tench", "church"], 40, 3, (80, 64))
    write_zip(tmp_path / "clothing128.zip", ["dress", "hat"], 40, 3, (64, 96))
    monkeypatch.setattr(retrain, "SEEDS", (1,))
    monkeypatch.setattr(retrain, "FRACTIONS", (0.5,))
    monkeypatch.setattr(retrain, "METHODS", ("random", "mamba_lrp"))
    monkeypatch.setattr(retrain, "EPOCHS", 1)
    monkeypatch.setattr(retrain, "ProcessPoolExecutor", Here)
    parser = argparse.ArgumentParser()
    retrain.add_options(parser)
    args = parser.parse_args(["--data", str(tmp_path), "--work", str(tmp_path / "work")])
    args.quick = False
    _, found = retrain.run_retrain(args)
    assert [(run["method"], run["fill"]) for run in found["runs"]] == [
        ("", "mean"), ("", "mean"), ("random", "mean"), ("mamba_lrp", "mean"), ("random", "blur"), ("mamba_lrp", "blur")
    ]  # fmt: skip
    assert all(0 <= run["top1"] <= 100 for run in found["runs"])
    random, lrp = (np.load(tmp_path / "work" / f"{name}_val.npy") for name in ("random", "mamba_lrp"))
    assert random.shape == lrp.shape == (12, SIDE * SIDE)
    assert (np.sort(lrp, 1) == np.arange(SIDE * SIDE)).all()
    assert (random != lrp).any()
    capsys.readouterr()
    assert retrain.run_retrain(args)[1] == found
    assert "epoch" not in capsys.readouterr().out


class Here:
    """A pool that works in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, *columns):
        return map(function, *columns)
