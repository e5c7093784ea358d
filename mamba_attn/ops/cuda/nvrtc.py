"""Finds NVRTC, CUDA's run-time compiler, queries what it supports, and runs it through ctypes. It needs no GPU.

Torch's CUDA builds include it, so nothing needs to be installed or built.
"""

import ctypes
import ctypes.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from mamba_attn.errors import BackendUnavailableError

OPTIONS = ("-std=c++17",)  # --fmad keeps its default: products and sums are fused

_WINDOWS = sys.platform == "win32"
_FILES = ("nvrtc64_*_0.dll",) if _WINDOWS else ("libnvrtc.so.*", "libnvrtc-[!b]*.so.*")  # hashed names in old wheels
_BUILTINS = "nvrtc-builtins64_*.dll" if _WINDOWS else "libnvrtc-builtins*.so.*"
_FUNCTIONS = (
    "nvrtcVersion",
    "nvrtcGetNumSupportedArchs",
    "nvrtcGetSupportedArchs",
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
    "nvrtcGetCUBINSize",
    "nvrtcGetCUBIN",
    "nvrtcGetPTXSize",
    "nvrtcGetPTX",
    "nvrtcDestroyProgram",
)


@dataclass(frozen=True)
class Compiler:
    """A loaded NVRTC library.

    Attributes:
        path: the file it was loaded from.
        version: of CUDA, (major, minor).
        architectures: what it compiles for, ascending: 75, 80, ...
        library: its functions.
    """

    path: str
    version: tuple[int, int]
    architectures: tuple[int, ...]
    library: ctypes.CDLL

    def compile(
        self, source: str, name: str, headers: Mapping[str, str], target: str, options: Sequence[str] = OPTIONS
    ) -> bytes:
        """Return the machine code of a target "sm_XY", or the PTX (with its closing NUL) of "compute_XY".

        Args:
            source: CUDA C++.
            name: what the compiler's messages call it.
            headers: text of every file to include, by the name in quotes.
            target: the architecture, "sm_90" or "compute_90".
            options: compiler options other than the architecture.

        Raises:
            BackendUnavailableError: it does not compile; the message has the compiler's log.
        """
        # NVRTC 12.4 leaves its thread in the "C" locale, where Python reads files as ASCII. All of it is in the other
        # thread, so that Ctrl+C here destroys no program that is being compiled there.
        with ThreadPoolExecutor(1) as apart:
            return apart.submit(self._compile, source, name, headers, target, options).result()

    def _compile(
        self, source: str, name: str, headers: Mapping[str, str], target: str, options: Sequence[str]
    ) -> bytes:
        texts = _strings(headers.values()), _strings(headers)
        program = ctypes.c_void_p()
        status = self.library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), len(headers), *texts
        )
        self._check(status, f"{name} for {target}")
        try:
            flags = _strings([*options, f"--gpu-architecture={target}"])
            status = self.library.nvrtcCompileProgram(program, len(flags), flags)
            self._check(status, f"{name} for {target}", program)
            image = self._text(program, "PTX" if target.startswith("compute_") else "CUBIN")
            if not image:
                raise BackendUnavailableError(f"NVRTC ({self.path}) returned no code for {name} and {target}.")
            return image
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _check(self, status: int, what: str, program: ctypes.c_void_p | None = None) -> None:
        if status == 0:
            return
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        kind = self.library.nvrtcGetErrorString(status).decode()
        log = "" if program is None else self._text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        version = "{}.{}".format(*self.version)
        raise BackendUnavailableError(
            f"NVRTC {version} ({self.path}) could not compile {what}: {kind}. {log.strip()[-1500:]} "
            "Install the NVRTC that torch was built with; if it already is that one, report this text."
        )

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        """Read a result of the compiler: "CUBIN", "PTX" or "ProgramLog"."""
        size = ctypes.c_size_t()
        if getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != 0:
            return b""
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        status = getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw[: size.value] if status == 0 else b""


@cache
def compiler() -> Compiler:
    """Return the first NVRTC of ``candidates`` that loads.

    Raises:
        BackendUnavailableError: none loads; the message lists what was tried.
    """
    tried = []
    for path in candidates():
        try:
            return _open(path)
        except (OSError, AttributeError) as error:  # AttributeError: too old to have one of the functions
            tried.append(f"{path}: {error}.")
    package = "nvidia-cuda-nvrtc-cu12" if torch_major() == 12 else "nvidia-cuda-nvrtc"
    raise BackendUnavailableError(
        "NVRTC, the run-time compiler of CUDA, was not found in torch's nvidia packages, CUDA_HOME, CUDA_PATH or the "
        f"system. {' '.join(tried)}{' ' if tried else ''}Install it with: pip install {package}"
    )


def candidates() -> Iterator[Path]:
    """Yield files that may be NVRTC, best first: torch's own packages, CUDA_HOME and CUDA_PATH, the system's."""
    site = Path(torch.__file__).parent.parent
    nvidia = find_spec("nvidia")
    roots = [site / "nvidia", *map(Path, (nvidia and nvidia.submodule_search_locations) or ())]
    wheels = [folder for root in dict.fromkeys(roots) for folder in _folders(root, ("*/lib", "*/bin", "*/bin/x86_64"))]
    yield from _ranked([*wheels, site / "torch" / "lib"])
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield from _ranked(_folders(Path(os.environ[variable]), ("lib64", "lib", "bin", "bin/x64")))
    conda = ("Library/bin",) if _WINDOWS else ("lib",)
    yield from _ranked(_folders(Path(sys.prefix), conda))
    found = ctypes.util.find_library("nvrtc")
    if found:
        yield Path(found)  # a bare name, which the system's loader resolves
    yield from _ranked(_folders(Path("/usr/local"), ("cuda/lib64", "cuda*/lib64")))


def torch_major() -> int | None:
    """Major version of the CUDA that torch was built with, or None."""
    return None if torch.version.cuda is None else int(torch.version.cuda.split(".")[0])


def _folders(root: Path, patterns: Sequence[str]) -> list[Path]:
    return [folder for pattern in patterns for folder in sorted(root.glob(pattern)) if folder.is_dir()]


def _ranked(folders: Sequence[Path]) -> list[Path]:
    """NVRTC in these folders: torch's own major version first (torch's driver can load its code), then the newest."""
    paths = {path.resolve(): path for folder in folders for pattern in _FILES for path in sorted(folder.glob(pattern))}
    return sorted(paths.values(), key=lambda path: (_major(path) != torch_major(), -_major(path)))


def _major(path: Path) -> int:
    """Return the major version: 13 of libnvrtc.so.13.0, 12 of nvrtc64_120_0.dll."""
    found = re.search(r"\.so\.(\d+)|nvrtc64_(\d\d)", path.name)
    return int(found[1] or found[2]) if found else 0


def _open(path: Path) -> Compiler:
    """Load one NVRTC; it opens its builtins by bare name, which only works if they are loaded already."""
    if path.parent != Path():
        for builtins in sorted(path.parent.glob(_BUILTINS)):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    for name in _FUNCTIONS:
        getattr(library, name)
    numbers = [ctypes.c_int() for _ in range(3)]
    major, minor, count = numbers
    failed = library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    failed = failed or library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    architectures = (ctypes.c_int * count.value)()
    failed = failed or library.nvrtcGetSupportedArchs(architectures)
    if failed:
        raise OSError(f"it returns error {failed}")
    return Compiler(str(path), (major.value, minor.value), tuple(sorted(architectures)), library)


def _strings(texts: Iterable[str]) -> "ctypes.Array[ctypes.c_char_p]":
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)
