"""The CPU kernel: built by several processes at once, from the source that its Python was imported with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_attn.ops.cpu import build, compiling

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
    assert compiling.source(tmp_path).startswith(b"#error")
    monkeypatch.setenv("CXX", compiler(tmp_path, 1))
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path / "cache"))
    assert build._compiled().stat().st_size


KERNEL = Path(build.__file__).parent


def test_the_source_holds_what_it_includes(tmp_path: Path) -> None:
    """A change of a header makes another kernel."""
    text = compiling.source(KERNEL).decode()
    assert '#include "' not in text
    for header in KERNEL.glob("*.hpp"):
        assert header.read_text() in text


def test_kinds_of_cpu_are_the_fastest_that_it_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    v2, v3 = (compiling.KINDS["x86_64"][f"x86-64-{level}"] for level in ("v2", "v3"))
    monkeypatch.setattr(compiling.platform, "machine", lambda: "x86_64")
    for flags, kinds in (("fpu", []), (v2, ["x86-64-v2"]), (f"{v2} {v3} avx512f", ["x86-64-v3", "x86-64-v2"])):
        monkeypatch.setattr(Path, "exists", lambda path: True)
        monkeypatch.setattr(Path, "read_text", lambda path, flags=flags: f"processor : 0\nflags : {flags}\n")
        assert compiling.usable_kinds() == kinds


def test_a_prebuilt_kernel_is_used_if_it_is_of_this_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiling.usable_kinds():
        pytest.skip("wheels hold no kernel for this CPU")
    kind = compiling.usable_kinds()[-1]
    monkeypatch.setenv("CXX", compiler(tmp_path, 1))
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_PREBUILT", tmp_path)
    shutil.copy(build._compiled(), tmp_path / compiling.prebuilt_name(kind, b"of another release"))
    assert build._prebuilt() is None
    shutil.copy(build._compiled(), tmp_path / compiling.prebuilt_name(kind, build._SOURCE))
    found = build._prebuilt()
    assert found is not None
    assert found[1] == kind
    other = tmp_path / "other"  # the loader knows the first file by its path
    other.mkdir()
    (other / compiling.prebuilt_name(kind, build._SOURCE)).write_bytes(b"no shared object")
    monkeypatch.setattr(build, "_PREBUILT", other)
    assert build._prebuilt() is None


def test_the_kernels_threads_are_torchs() -> None:
    """A second OpenMP runtime would compete with torch's for the cores."""
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]:
        pytest.skip("torch runs without OpenMP here")
    assert build._openmp().value
