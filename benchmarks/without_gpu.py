"""Measurements of the CUDA kernels without a GPU: the compilers' report, and the error of the source on a host.

Everything in the source but the inner instruction of the matrix unit runs there as it is written; that one is replaced
by its definition, so its own rounding is not in these errors. Nothing here says anything about speed.
"""

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import Shape
from benchmarks.kernel.verify import Truth
from benchmarks.report import Figure, figure, show
from mamba_attn import ops
from mamba_attn.ops.arguments import as_record
from mamba_attn.ops.cuda import cubins, kernels, nvrtc

SOURCE = Path(__file__).resolve().parents[1] / "cuda" / "hidden_attention.cu"
ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
KERNELS = ("attention_direct", "attention_factored_64", "attention_factored_128")
NOTE = "on the host, the matrix unit's instruction replaced by its definition"


def nvcc() -> str | None:
    """The compiler's path, or None."""
    return shutil.which("nvcc") or next((str(path) for path in Path("/usr/local").glob("cuda*/bin/nvcc")), None)


def registers(compiler: str, architecture: str) -> dict[str, dict[str, int]]:
    """Registers of every kernel, and the bytes that it spills.

    Raises:
        SystemExit: the sources do not compile; the compiler's words.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-O3", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run([*command, "-o", f"{folder}/x.cubin", str(SOURCE)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    line = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return {
        name: {"registers": int(used), "spilled": int(stored) + int(loaded)}
        for name, stored, loaded, used in re.findall(line, done.stderr, re.DOTALL)
    }


def nvrtc_seconds() -> dict[str, float]:
    """CPU seconds in which the shipped loader's NVRTC compiles the sources: a user waits for it once per machine."""
    compiler, sources = nvrtc.compiler(), cubins.sources()
    headers = {name: text for name, text in sources.items() if name != SOURCE.name}
    seconds = {}
    for architecture in ARCHITECTURES:
        started = time.process_time()
        compiler.compile(sources[SOURCE.name], SOURCE.name, headers, architecture, nvrtc.OPTIONS)
        seconds[architecture] = time.process_time() - started
    return seconds


def errors(shapes: tuple[Shape, ...]) -> list[dict[str, Any]]:
    """Errors of every formulation and of plain PyTorch, at every shape and step size, by law 5's bound."""
    from tests.emulation import emulated

    rows = []
    for shape in shapes:
        for scale in cases.SCALES:
            values = cases.inputs(shape, scale)
            truth, record = Truth(*values), as_record("benchmark", None, *values).record
            row: dict[str, Any] = {"shape": str(shape), "delta x": scale}
            row["blocked"] = truth.error(ops.hidden_attention(*values, backend="blocked"))
            with emulated() as launcher:
                for kernel in KERNELS:
                    found = kernels.attention(launcher, record, (None, None), "mean", False, kernel=kernel)[1]
                    row[kernel] = truth.error(found[:, 0])
            rows.append(row)
    shown = [[f"{v:.2g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    show(f"errors {NOTE}", list(rows[0]), shown)
    return rows


def run_build(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """All that needs no GPU.

    Raises:
        SystemExit: nvcc is not installed.
    """
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("build: nvcc is not installed; it comes with the CUDA toolkit.")
    compiled = {name: registers(compiler, name) for name in ARCHITECTURES}
    rows = errors((Shape(4, 16, 70),) if quick else cases.ERRORS)
    spilled = sum(kernel["spilled"] for kernels in compiled.values() for kernel in kernels.values())
    plain = max(row["blocked"] for row in rows)
    figures = [figure("spills", "", spilled)]
    figures += [figure("kernel error", kernel, max(row[kernel] for row in rows) / plain) for kernel in KERNELS]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    details = {
        "nvcc": version,
        "nvrtc": ".".join(map(str, nvrtc.compiler().version)),
        "compiled": compiled,
        "nvrtc seconds": nvrtc_seconds(),
        "errors": rows,
        "errors are": NOTE,
        "torch threads": torch.get_num_threads(),
    }
    return figures, details
