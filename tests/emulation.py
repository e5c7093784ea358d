"""The CUDA kernels on the host: the very source, compiled by g++, every CUDA thread a fiber (emulation.cpp).

Everything but the inner instruction of the matrix unit runs as it is written; that one is replaced by its definition.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mamba_attn import ops
from mamba_attn.ops.cuda import operators

HERE = Path(__file__).parent
SOURCES = HERE.parent / "cuda"
FLAGS = ("-O2", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
         "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-missing-field-initializers", "-Wno-clobbered")  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The kernels, compiled once for these sources."""
    target = folder() / f"emulation-{key(repr(FLAGS).encode())}.so"
    if not target.exists():
        compile_to(target, *FLAGS)
    return load(target)


def folder() -> Path:
    """Where compiled libraries are kept."""
    found = Path(os.environ.get("MAMBA_ATTN_CACHE") or Path.home() / ".cache" / "mamba_attn")
    found.mkdir(parents=True, exist_ok=True)
    return found


def key(*meaning: bytes) -> str:
    """A name for what these bytes and the sources are compiled to."""
    files = sorted([HERE / "emulation.cpp", *SOURCES.glob("*.cu*")])
    return hashlib.sha256(b"\0".join([*(path.read_bytes() for path in files), *meaning])).hexdigest()[:16]


def compile_to(target: Path, *flags: str) -> None:
    """Compile emulation.cpp; another process that does the same at once loses nothing."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        command = [os.environ.get("CXX", "g++"), *flags, f"-I{SOURCES}", str(HERE / "emulation.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.replace(target)


def load(path: Path) -> ctypes.CDLL:
    """Open a compiled library."""
    loaded = ctypes.CDLL(str(path))
    loaded.launch.restype, loaded.tile_of.restype = ctypes.c_char_p, ctypes.c_int64
    return loaded


class Emulator:
    """A launcher that takes CPU tensors.

    Args:
        schedule: 0 runs the threads of a block in order, 1 backwards, 2 and 3 likewise but every warp as far as it
            gets, another number shuffles them by it.
        multiprocessors: how many the planner believes in; more of them divide channels among more blocks.
        shared_limit: bytes of shared memory per block.
    """

    def __init__(self, schedule: int = 0, multiprocessors: int = 1, shared_limit: int = 227 * 1024) -> None:
        self.schedule = schedule
        self._multiprocessors = multiprocessors
        self._shared_limit = shared_limit
        self.launched: list[str] = []

    def problem(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"the emulator takes CPU tensors, not {device}."

    def multiprocessors(self, device: torch.device) -> int:
        return self._multiprocessors

    def shared_limit(self, device: torch.device) -> int:
        return self._shared_limit

    def library(self, name: str) -> ctypes.CDLL:
        """The library that holds a kernel."""
        return library()

    def launch(
        self, name: str, grid: int, block: int, shared_bytes: int, arguments: ctypes.Structure, device: torch.device
    ) -> None:
        assert shared_bytes <= self._shared_limit
        self.launched.append(name)
        problem = self.library(name).launch(
            name.encode(), ctypes.byref(arguments), grid, block, shared_bytes, ctypes.c_uint(self.schedule)
        )
        assert problem is None, f"{name}: {problem.decode()}"


@contextmanager
def emulated(launcher: Emulator | None = None) -> Iterator[Emulator]:
    """Let backend="fused" run on the host."""
    launcher = launcher or Emulator()
    before, operators.launcher = operators.launcher, launcher
    try:
        yield launcher
    finally:
        operators.launcher = before


def hidden_attention(delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, **options: object) -> np.ndarray:
    """``mamba_attn.hidden_attention`` of arrays by the emulated kernels; options as there, tensors as arrays."""
    with emulated():
        return ops.hidden_attention(*map(_tensor, (delta, A, B, C)), backend="fused", **_tensors(options)).numpy()  # type: ignore[arg-type]


def selective_scan(u: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, **options: object):
    """``mamba_attn.selective_scan``, likewise."""
    with emulated():
        found = ops.selective_scan(*map(_tensor, (u, delta, A, B, C)), backend="fused", **_tensors(options))  # type: ignore[arg-type]
    return found.numpy() if isinstance(found, torch.Tensor) else tuple(part.numpy() for part in found)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def _tensors(options: dict[str, object]) -> dict[str, object]:
    return {key: _tensor(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
