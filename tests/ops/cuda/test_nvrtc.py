"""NVRTC compiles for real, without a GPU; and where it is looked for, and what is said when it is not there."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_attn.errors import BackendUnavailableError
from mamba_attn.ops.cuda import nvrtc as loader
from mamba_attn.ops.cuda.nvrtc import Compiler
from tests.ops.cuda.fake_cuda import Arguments

SOURCE = """
#include "twice.cuh"
struct Arguments { float* data; short half; long long length; float s; };
extern "C" __global__ void scale(const Arguments arguments) {
    extern __shared__ float held[];
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    held[threadIdx.x] = arguments.s;
    __syncthreads();
    if constexpr (sizeof(float) == 4) {
        if (i < arguments.length) arguments.data[i] = twice(held[threadIdx.x]) + WHAT;
    }
}
"""
HEADERS = {"twice.cuh": "__device__ float twice(float x) { return 2 * x; }\n", "unused.cuh": "#error unused\n"}
OPTIONS = (*loader.OPTIONS, "-DWHAT=3")


@pytest.fixture(scope="module")
def nvrtc() -> Compiler:
    if sys.platform != "linux":
        pytest.skip("the tests' own NVRTC is a Linux package")
    return loader.compiler()


def compiled(nvrtc: Compiler, target: str, source: str = SOURCE) -> bytes:
    architecture = int(target.rpartition("_")[2])
    if architecture not in nvrtc.architectures:  # 12.4 knows no 120
        pytest.skip(f"NVRTC {nvrtc.version} does not know {architecture}")
    return nvrtc.compile(source, "scale.cu", HEADERS, target, OPTIONS)


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_machine_code(nvrtc: Compiler, architecture: int) -> None:
    image = compiled(nvrtc, f"sm_{architecture}")
    assert image[:4] == b"\x7fELF"
    assert image[18:20] == (190).to_bytes(2, "little")  # EM_CUDA
    assert b".text.scale" in image


@pytest.mark.skipif(sys.platform != "linux", reason="locales of threads by glibc's names")
def test_a_compiler_that_changes_the_locale_leaves_its_callers() -> None:
    libc = ctypes.CDLL(None)
    libc.newlocale.restype = libc.uselocale.restype = ctypes.c_void_p
    libc.newlocale.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    libc.uselocale.argtypes = (ctypes.c_void_p,)
    seen = []

    class Old(ctypes.CDLL):
        """NVRTC 12.4, as far as locales go."""

        def __init__(self) -> None:
            pass

        def nvrtcCompileProgram(self, program: object, count: int, flags: object) -> int:  # noqa: N802
            libc.uselocale(libc.newlocale(0x1FBF, b"C", None))  # LC_ALL_MASK
            seen.append(libc.uselocale(None))
            return 0

        def nvrtcCreateProgram(self, *given: object) -> int:  # noqa: N802
            return 0

        def nvrtcDestroyProgram(self, program: object) -> int:  # noqa: N802
            return 0

        def nvrtcGetPTXSize(self, program: object, size: Any) -> int:  # noqa: N802
            size._obj.value = 3
            return 0

        def nvrtcGetPTX(self, program: object, buffer: Any) -> int:  # noqa: N802
            buffer.raw = b"ok\0"
            return 0

    before = libc.uselocale(None)
    old = Compiler("libnvrtc.so.12", (12, 4), (80,), Old())
    assert old.compile("", "a.cu", {}, "compute_80") == b"ok\0"
    assert seen != [before]
    assert libc.uselocale(None) == before


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_ptx(nvrtc: Compiler, architecture: int) -> None:
    image = compiled(nvrtc, f"compute_{architecture}")
    assert image.endswith(b"\0")  # the driver reads up to it
    assert f".target sm_{architecture}".encode() in image
    (size,) = re.findall(rb"scale_param_0\[(\d+)\]\n\)", image)
    assert int(size) == ctypes.sizeof(Arguments)


def test_what_it_knows(nvrtc: Compiler) -> None:
    assert nvrtc.version >= (12, 0)
    assert list(nvrtc.architectures) == sorted(nvrtc.architectures)
    assert {80, 90} <= set(nvrtc.architectures)


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        (
            "__global__ void f() { nonsense(); }",
            "sm_90",
            r"could not compile bad.cu for sm_90: NVRTC_ERROR_COMPILATION",
        ),
        ("__global__ void f() { nonsense(); }", "sm_90", r'bad\.cu\(1\): error: identifier "nonsense" is undefined'),
        ('#include "lost.cuh"', "sm_90", r"open source file .lost\.cuh"),
        ("", "sm_10", "NVRTC_ERROR_INVALID_OPTION.*Install the NVRTC that torch was built with"),
    ],
)
def test_errors_bring_the_log(nvrtc: Compiler, source: str, target: str, sentence: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"(?s)^NVRTC .*{sentence}"):
        nvrtc.compile(source, "bad.cu", HEADERS, target)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without CUDA: a site-packages folder with torch in it, a torch for CUDA 12.6, no variables."""
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site/torch/__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    monkeypatch.setattr(
        loader, "Path", lambda *parts: Path(*[str(p).replace("/usr/local", str(tmp_path)) for p in parts])
    )
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no library")
    return path


def test_order_of_places(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = touch(machine / "cuda-12.4/lib64/libnvrtc.so.12")
    conda = touch(machine / "prefix/lib/libnvrtc.so.12")
    path = touch(machine / "path/lib/libnvrtc.so.11.2")
    home = touch(machine / "home/lib64/libnvrtc.so.13")
    hashed = touch(machine / "site/torch/lib/libnvrtc-672ee683.so.11.2")
    newer = touch(machine / "site/nvidia/cu13/lib/libnvrtc.so.13")
    own = touch(machine / "site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    for name in ("libnvrtc-builtins.so.12.6", "libnvrtc.alt.so.12", "libnvrtc-builtins.alt.so.12.6"):
        touch(own.parent / name)
    (home.parent / "libnvrtc.so.13.0.88").symlink_to(home)
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    monkeypatch.setenv("CUDA_PATH", str(machine / "path"))
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libnvrtc.so.12")
    found = [candidate.resolve() if candidate.parent != Path() else candidate for candidate in loader.candidates()]
    assert found == [own, newer, hashed, home, path, conda, Path("libnvrtc.so.12"), system]


@pytest.mark.parametrize(("cuda", "first"), [("12.6", "12"), ("13.0", "13"), (None, "13")])
def test_torchs_own_major_version_comes_first(
    machine: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, first: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    touch(machine / "site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    touch(machine / "site/nvidia/cu13/lib/libnvrtc.so.13")
    assert next(loader.candidates()).name == f"libnvrtc.so.{first}"


@pytest.mark.parametrize(("cuda", "package"), [("12.6", "nvidia-cuda-nvrtc-cu12"), ("13.0", "nvidia-cuda-nvrtc")])
def test_none_at_all(machine: Path, monkeypatch: pytest.MonkeyPatch, cuda: str, package: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(BackendUnavailableError, match=f"NVRTC.* was not found .*pip install {package}$"):
        loader.compiler.__wrapped__()


def test_one_that_does_not_load_is_named_and_passed_over(machine: Path, nvrtc: Compiler) -> None:
    broken = touch(machine / "site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    with pytest.raises(BackendUnavailableError, match=f"{re.escape(str(broken))}: .*pip install"):
        loader.compiler.__wrapped__()
    working = machine / "cuda/lib64"
    working.mkdir(parents=True)
    for path in Path(nvrtc.path).parent.glob("libnvrtc*"):
        (working / path.name).symlink_to(path)
    assert loader.compiler.__wrapped__().path == str(working / Path(nvrtc.path).name)


def shared_object(path: Path, source: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c++", "-", "-o", str(touch(path))]
    subprocess.run(command, input=source.encode(), check=True)
    return path


def test_one_that_is_too_old_is_named(machine: Path) -> None:
    source = 'extern "C" int nvrtcVersion(int*, int*) { return 0; }'
    shared_object(machine / "site/torch/lib/libnvrtc-abc.so.10.2", source)
    with pytest.raises(BackendUnavailableError, match=r"libnvrtc-abc.so.10.2: .*nvrtcGetNumSupportedArchs"):
        loader.compiler.__wrapped__()


def test_builtins_that_it_opens_by_bare_name_are_found(machine: Path) -> None:
    folder = machine / "site/nvidia/cuda_nvrtc/lib"
    shared_object(folder / "libnvrtc-builtins.so.98.7", "")
    others = "".join(f"int {name}() {{ return 0; }}" for name in loader._FUNCTIONS if name != "nvrtcVersion")
    opens = """#include <dlfcn.h>
    extern "C" { int nvrtcVersion(int*, int*) { return dlopen("libnvrtc-builtins.so.98.7", RTLD_LAZY) ? 0 : 7; } """
    shared_object(folder / "libnvrtc.so.98", opens + others + "}")
    assert loader.compiler.__wrapped__().path == str(folder / "libnvrtc.so.98")
