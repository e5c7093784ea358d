"""How native.cpp is compiled: by ``build`` at first use, and by setup.py, which runs nothing but this file."""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-sized-deallocation",  # younger than the C++ libraries that wheels should run with
)
# Kinds of CPU that wheels hold kernels for, the fastest first: the compiler's option, and what /proc/cpuinfo must list.
_X86 = {
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
}
KINDS = {"x86_64": _X86, "AMD64": _X86, "aarch64": {"armv8-a": ""}, "arm64": {"armv8-a": ""}}
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def source(folder: Path) -> bytes:
    """Return native.cpp with the headers beside it in their places.

    Args:
        folder: of native.cpp.
    """
    text = (folder / "native.cpp").read_text()
    return _INCLUDE.sub(lambda found: (folder / found[1]).read_text(), text).encode()


def compiler() -> list[str]:
    """Return the words that call the compiler.

    Raises:
        FileNotFoundError: there is none.
    """
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    words = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])  # CXX may be "ccache g++"
    if not words:
        raise FileNotFoundError("no C++ compiler found (looked for $CXX, g++, clang++, c++).")
    return words


def compile_kernel(command: Sequence[str], text: bytes, target: Path) -> None:
    """Compile the kernel.

    Args:
        command: the compiler, and options besides ``FLAGS``.
        text: as ``source`` returns it.
        target: the shared object to write.

    Raises:
        CalledProcessError: it does not compile; ``stderr`` says why.
    """
    words = [*command, *FLAGS, "-x", "c++", "-", "-o", str(target)]
    subprocess.run(words, input=text.decode(), capture_output=True, text=True, check=True, timeout=300)


def prebuilt_name(kind: str, text: bytes) -> str:
    """Return the file name of a kernel in a wheel; that of another source has another name.

    Args:
        kind: of CPU.
        text: as ``source`` returns it.
    """
    return f"native-{kind}-{hashlib.sha256(text).hexdigest()[:12]}.so"


def usable_kinds() -> list[str]:
    """Return the kinds of CPU whose kernels run on this machine, the fastest first."""
    kinds = KINDS.get(platform.machine(), {})
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return [kind for kind, needed in kinds.items() if flags.issuperset(needed.split())]


def prebuild(folder: Path, target: Path) -> list[Path]:
    """Compile the kernel for every kind of CPU of this architecture.

    Args:
        folder: of native.cpp.
        target: the folder to write to.

    Returns:
        the files.

    Raises:
        KeyError: an architecture that wheels hold no kernel for.
        FileNotFoundError: no compiler.
        CalledProcessError: it does not compile.
    """
    text = source(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in KINDS[platform.machine()]:
        files.append(target / prebuilt_name(kind, text))
        compile_kernel([*compiler(), f"-march={kind}"], text, files[-1])
    return files
