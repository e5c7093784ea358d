"""Loads the kernel: a wheel's prebuilt one, or native.cpp compiled once per machine; or remembers why not."""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from mamba_attn.core.decisions import decided
from mamba_attn.errors import BackendUnavailableError
from mamba_attn.ops.build_cache import cache_folder
from mamba_attn.ops.cpu.compiling import FLAGS, compile_kernel, compiler, prebuilt_name, source, usable_kinds

_PREBUILT = Path(__file__).with_name("prebuilt")
with as_file(files("mamba_attn.ops.cpu")) as _folder:
    # read beside native.py, whose structs it shares: an update of the package under a running Python changes the file
    _SOURCE = source(_folder)


def library() -> ctypes.CDLL:
    """Return the loaded kernel library; check ``library_problem()`` first."""
    loaded, problem, _ = _load()
    if loaded is None:
        raise BackendUnavailableError(problem)
    return loaded


def library_problem() -> str | None:
    """Return why the kernel library is missing, or None; warns once if it is missing."""
    return _load()[1]


# what torch.compiler.assume_constant_result sets, which imports the whole compiler; else it would trace the build
library_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def library_origin() -> str:
    """Return where the kernel library comes from: "prebuilt for x86-64-v3" or "compiled here"; empty without one."""
    return _load()[2]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None, str]:
    found = _prebuilt()
    if found is not None:
        decided("CPU kernel: prebuilt for %s", found[1])
        return found[0], None, f"prebuilt for {found[1]}"
    try:
        path = _compiled()
        loaded = _opened(path)
        decided("CPU kernel: compiled here, %s", path)
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        problem = f"its C++ source does not compile or load: {detail.strip()[-800:]} Install g++ or set CXX."
        warnings.warn(f"mamba_attn runs without its CPU kernel (the slower blocked path runs): {problem}", stacklevel=4)
        return None, problem, ""
    return loaded, None, "compiled here"


def _prebuilt() -> tuple[ctypes.CDLL, str] | None:
    """Return the fastest prebuilt kernel of this very source that loads here, and the kind of CPU it is for."""
    for kind in usable_kinds() if _PREBUILT.is_dir() else ():
        path = _PREBUILT / prebuilt_name(kind, _SOURCE)
        try:
            return _opened(path), kind
        except OSError:  # not in this wheel, or for another C library
            continue
    return None


def _opened(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.use_threads(_openmp())
    return loaded


def _openmp() -> ctypes.c_void_p:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch has loaded; null where there is none."""
    import torch  # noqa: F401  # loads it

    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows knows no handle of the whole process
        return ctypes.c_void_p(None)


def _compiled() -> Path:
    """Return the path of the shared object for this source, compiler and CPU; compile it if missing."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(_SOURCE + repr((FLAGS, version, _cpu())).encode()).hexdigest()[:20]
    target = cache_folder() / f"native-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch, "native.so")
            compile_kernel([*command, "-march=native"], _SOURCE, made)
            with made.open("rb") as whole:
                os.fsync(whole.fileno())  # else a crash of the machine may leave the name of an empty file
            made.replace(target)  # atomic: several processes may compile at once
    return target


def _cpu() -> str:
    """Identify the CPU: -march=native depends on it, so a cached file must not run on another."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() + platform.machine()
    lines = info.read_text().splitlines()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
