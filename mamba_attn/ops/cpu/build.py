"""Compiles native.cpp once per machine and remembers why it could not."""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

from mamba_attn.errors import BackendUnavailableError
from mamba_attn.ops.build_cache import cache_folder

_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def _source() -> bytes:
    """Return native.cpp with the headers beside it in their places."""
    folder = files("mamba_attn.ops.cpu")
    text = folder.joinpath("native.cpp").read_text()
    return _INCLUDE.sub(lambda found: folder.joinpath(found[1]).read_text(), text).encode()


# read beside native.py, whose structs it shares: an update of the package under a running Python changes the file
_SOURCE = _source()


def library() -> ctypes.CDLL:
    """Return the loaded kernel library; check ``library_problem()`` first."""
    loaded, problem = _load()
    if loaded is None:
        raise BackendUnavailableError(problem)
    return loaded


def library_problem() -> str | None:
    """Return why the kernel library is missing, or None; warns once if it is missing."""
    return _load()[1]


# what torch.compiler.assume_constant_result sets, which imports the whole compiler; else it would trace the build
library_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        problem = f"its C++ source does not compile or load: {detail.strip()[-800:]} Install g++ or set CXX."
        warnings.warn(f"mamba_attn runs without its CPU kernel (the slower blocked path runs): {problem}", stacklevel=4)
        return None, problem
    loaded.use_threads(_openmp())
    return loaded, None


def _openmp() -> ctypes.c_void_p:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch has loaded; null where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows knows no handle of the whole process
        return ctypes.c_void_p(None)


def _compiled() -> Path:
    """Return the path of the shared object for this source, compiler and CPU; compile it if missing."""
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    compiler = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])  # CXX may be "ccache g++"
    if not compiler:
        raise FileNotFoundError("no C++ compiler found (looked for $CXX, g++, clang++, c++).")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(_SOURCE + repr((_FLAGS, version, _cpu())).encode()).hexdigest()[:20]
    target = cache_folder() / f"native-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch, "native.so")
            command = [*compiler, *_wide_vectors(), *_FLAGS, "-x", "c++", "-", "-o", str(made)]
            subprocess.run(command, input=_SOURCE.decode(), capture_output=True, text=True, check=True, timeout=300)
            with made.open("rb") as whole:
                os.fsync(whole.fileno())  # else a crash of the machine may leave the name of an empty file
            made.replace(target)  # atomic: several processes may compile at once
    return target


def _wide_vectors() -> tuple[str, ...]:
    return ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()


def _cpu() -> str:
    """Identify the CPU: -march=native depends on it, so a cached file must not run on another."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() + platform.machine()
    lines = info.read_text().splitlines()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
