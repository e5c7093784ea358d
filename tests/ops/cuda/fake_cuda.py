"""A stand-in for libcuda, compiled from fake_cuda.cpp, and what a test says to it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

CONTEXT = 1050  # of cuda:0; cuda:1 has the next


class Arguments(ctypes.Structure):
    """With a hole after ``half``: what is sent must be the structure's bytes, its padding included."""

    _fields_ = [("data", ctypes.c_void_p), ("half", ctypes.c_int16), ("length", ctypes.c_int64), ("s", ctypes.c_float)]


def build(folder: Path, *definitions: str) -> Path:
    """Compile the stand-in; "OLD" lacks a function of CUDA 12.4, "BROKEN" one that every driver has."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    target = folder / f"libcuda{''.join(definitions)}.so"
    source = str(Path(__file__).with_name("fake_cuda.cpp"))
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", *(f"-D{name}" for name in definitions)]
    subprocess.run([compiler, *flags, source, "-o", str(target)], check=True)
    return target


class FakeCuda:
    """The library, empty of records and faults."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fake_record.restype = ctypes.c_char_p
        self.library.fake_kernel.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
        self.library.fake_reset()

    def kernel(self, name: str, size: int, module: int = 0) -> None:
        """Let a module, counted as they are loaded, hold a kernel whose argument has this many bytes."""
        self.library.fake_kernel(name.encode(), size, 2000 + module)

    def fail(self, call: str, code: int) -> None:
        """Let a call return this code from now on."""
        self.library.fake_fail(call.encode(), code)

    def calls(self, prefix: str = "") -> list[str]:
        """What it was asked."""
        lines = self.library.fake_record().decode().splitlines()
        return [line for line in lines if line.startswith(prefix)]
