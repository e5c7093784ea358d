"""The CPU kernel: built by several processes at once, from the source that its Python was imported with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_attn.ops.cpu import build

PROCESSES = 4
SCAN = """
import torch
from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord

torch.manual_seed(0)
u, delta = torch.randn(2, 1, 5, 7), torch.rand(2, 1, 5, 7)
record = ScanRecord.from_scan(u, delta, -torch.rand(1, 5, 3), torch.randn(2, 1, 1, 3, 7), torch.randn(2, 1, 1, 3, 7))
y = ops.selective_scan(record, backend="native")
torch.testing.assert_close(y, ops.selective_scan(record, backend="reference"), rtol=1e-4, atol=1e-5)
print(float(y.sum()))
"""


def compiler(folder: Path, waits_for: int) -> str:
    """One that does not optimise, and starts when so many of them have been called."""
    real = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if real is None:
        pytest.skip("no C++ compiler")
    script = folder / "compiler"
    script.write_text(
        f"""#!/bin/sh
if [ "$*" = --version ]; then exec {real} --version; fi
touch {folder}/called.$$
until [ $(ls {folder} | grep -c called) -ge {waits_for} ]; do sleep 0.1; done
exec {real} "$@" -O0
"""
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.full
def test_several_processes_may_build_it_at_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    more = {"MAMBA_ATTN_CACHE": str(cache), "CXX": compiler(tmp_path, PROCESSES), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", SCAN]
    started = [
        subprocess.Popen(command, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    answers = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES, answers
    assert len({said for said, _ in answers}) == 1
    assert len(list(tmp_path.glob("called.*"))) == PROCESSES
    (kept,) = cache.iterdir()
    assert kept.name.startswith("native-")


def test_an_update_of_the_package_does_not_reach_a_running_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python and the kernel share structs: a newer source under an older native.py ended in a memory fault."""
    (tmp_path / "native.cpp").write_text("#error the file of another release\n")
    monkeypatch.setattr(build, "files", lambda package: tmp_path)
    monkeypatch.setenv("CXX", compiler(tmp_path, 1))
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path / "cache"))
    assert build._compiled().stat().st_size
