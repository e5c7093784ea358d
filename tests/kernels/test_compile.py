"""The sources through NVIDIA's compilers, which need no GPU: nvcc reports registers, the shipped loader uses NVRTC."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mamba_attn.ops.cuda import cubins, nvrtc
from tests.ptx import KERNELS

SOURCE = Path(__file__).parents[2] / "cuda" / "hidden_attention.cu"
ARCHITECTURES = ("sm_90", *(pytest.param(name, marks=pytest.mark.full) for name in ("sm_80", "sm_100", "sm_120")))
NVCC = shutil.which("nvcc") or next((str(p) for p in Path("/usr/local").glob("cuda*/bin/nvcc")), None)


def report(architecture: str, folder: Path) -> dict[str, tuple[int, int, int]]:
    """Registers, and bytes of spills stored and loaded, of every kernel."""
    command = [NVCC, "-O3", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    done = subprocess.run([*command, "-o", str(folder / "x.cubin"), str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(line, done.stderr, re.DOTALL)
    return {name: (int(registers), int(stored), int(loaded)) for name, stored, loaded, registers in found}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_spills_nothing_and_keeps_the_registers_of_its_block(architecture: str, tmp_path: Path) -> None:
    found = report(architecture, tmp_path)
    assert set(found) == set(KERNELS)
    print(architecture, found)
    for name, (registers, stored, loaded) in found.items():
        assert stored == loaded == 0, name
        assert registers <= (128 if name == "attention_factored_128" else 170), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shipped_loader_compiles_the_shipped_source(architecture: str) -> None:
    compiler = nvrtc.compiler()
    assert cubins.units() == ("hidden_attention.cu",)
    image = cubins.image("hidden_attention.cu", architecture, compiler)
    assert image[:4] == b"\x7fELF"
    for name in KERNELS:
        assert f".text.{name}\0".encode() in image
    assert cubins.image("hidden_attention.cu", architecture, compiler) == image  # from the disk
