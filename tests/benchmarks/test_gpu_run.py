"""The script for a GPU, rehearsed: NVRTC's PTX on the host takes the GPU's place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the tests' own NVRTC is a Linux package")
def test_every_step_of_the_rehearsal_ends_well(tmp_path: Path) -> None:
    environment = {**os.environ, "DEVICE": "cpu", "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(["bash", "benchmarks/gpu_run.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert {name: step["exit"] for name, step in steps.items()} == dict.fromkeys(
        ("environment", "smoke", "tests", "timing", "launches"), 0
    ), done.stdout[-3000:]
    smoke = json.loads((tmp_path / "smoke.json").read_text())
    assert smoke["bad"] == []
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert not timing["left out"]
    assert not [row for row in timing["rows"] if "error" in row]
    for kernel in ("attention_direct", "attention_factored_64", "attention_factored_128", "attention_heads"):
        assert any(kernel in name for name in smoke["found"]), kernel
        assert any(row["how"] == kernel for row in timing["rows"]), kernel


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "benchmarks/gpu_run.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch sees no CUDA device here; for a rehearsal set DEVICE=cpu" in done.stdout
