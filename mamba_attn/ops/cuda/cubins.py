"""The CUDA sources of the package, compiled for an architecture and kept on disk.

A cached file is named after everything that it depends on and ends in its checksum: a damaged file, or one that another
version wrote, is never loaded.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from mamba_attn.errors import BackendUnavailableError
from mamba_attn.ops.build_cache import cache_folder
from mamba_attn.ops.cuda.nvrtc import OPTIONS, Compiler

OLDEST = 75
_DIGEST = hashlib.sha256().digest_size


@cache
def sources() -> Mapping[str, str]:
    """Return the text of every .cu and .cuh file of the package by its bare name, sorted by name.

    Raises:
        BackendUnavailableError: the package lacks them.
    """
    try:
        found = {
            entry.name: entry.read_text(encoding="utf-8")
            for entry in sorted(files("mamba_attn.cuda").iterdir(), key=lambda entry: entry.name)
            if entry.name.endswith((".cu", ".cuh"))
        }
    except (ModuleNotFoundError, OSError) as error:
        raise BackendUnavailableError(f"cannot read the CUDA sources ({error}); reinstall mamba_attn.") from error
    if not any(name.endswith(".cu") for name in found):
        raise BackendUnavailableError("the package has no CUDA sources; reinstall mamba_attn.")
    return found


def units() -> tuple[str, ...]:
    """Return names of the files to compile, one module each; they include the others."""
    return tuple(name for name in sources() if name.endswith(".cu"))


def targets(capability: tuple[int, int], architectures: tuple[int, ...]) -> tuple[str, ...]:
    """Return what to compile for a GPU, best first: its own machine code, then PTX, which the driver translates.

    Args:
        capability: of the GPU, (9, 0).
        architectures: those that the compiler supports: 75, 80, ...

    Raises:
        BackendUnavailableError: the GPU is older than all of these, or too old for the kernels.
    """
    own = capability[0] * 10 + capability[1]
    older = [architecture for architecture in architectures if OLDEST <= architecture <= own]
    if not older:
        oldest = max(OLDEST, min(architectures, default=OLDEST))
        raise BackendUnavailableError(
            f"this GPU has compute capability {capability[0]}.{capability[1]} and the kernels need "
            f"{oldest // 10}.{oldest % 10} or newer. Use backend='blocked', which runs on any device."
        )
    newest = max(older)
    return (f"sm_{own}", f"compute_{own}") if newest == own else (f"compute_{newest}",)


def image(unit: str, target: str, compiler: Compiler) -> bytes:
    """Return the machine code or PTX of one source file for a target; compiled at most once per machine.

    Raises:
        BackendUnavailableError: it does not compile.
    """
    texts = sources()
    headers = {name: text for name, text in texts.items() if name.endswith(".cuh")}
    meaning = (unit, texts[unit], sorted(headers.items()), OPTIONS, target, compiler.version)
    key = hashlib.sha256(repr(meaning).encode()).hexdigest()[:20]
    path = cache_folder() / f"{Path(unit).stem}-{target}-{key}.bin"
    kept = _read(path)
    if kept is None:
        kept = compiler.compile(texts[unit], unit, headers, target)
        _write(path, kept)
    return kept


def _read(path: Path) -> bytes | None:
    """Return what ``_write`` wrote; None if the file is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body = data[:-_DIGEST]
    return body if body and hashlib.sha256(body).digest() == data[-_DIGEST:] else None


def _write(path: Path, body: bytes) -> None:
    """Cache an image; processes may do so at once. If the disk is full, the next process compiles again."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch, path.name)
            made.write_bytes(body + hashlib.sha256(body).digest())
            made.replace(path)
    except OSError:
        return
