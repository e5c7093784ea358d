"""Kept images: compiled once, named after everything they depend on, never loaded when damaged."""

import threading
from collections.abc import Mapping, Sequence
from ctypes import CDLL
from pathlib import Path
from typing import ClassVar

import pytest

from mamba_attn.errors import BackendUnavailableError
from mamba_attn.ops import build_cache
from mamba_attn.ops.cuda import cubins
from mamba_attn.ops.cuda.nvrtc import OPTIONS, Compiler

KNOWN = (75, 80, 86, 90, 120)


class CountingCompiler(Compiler):
    """Its machine code is what it was given."""

    compiled: ClassVar[list[str]] = []

    def compile(
        self, source: str, name: str, headers: Mapping[str, str], target: str, options: Sequence[str] = OPTIONS
    ) -> bytes:
        self.compiled.append(target)
        return f"{name} {source} {sorted(headers.items())} {target} {tuple(options)}".encode()


def counting(version: tuple[int, int] = (13, 0)) -> CountingCompiler:
    return CountingCompiler("somewhere", version, KNOWN, CDLL(None))


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and sources of the tests' own."""
    monkeypatch.setattr(CountingCompiler, "compiled", [])
    monkeypatch.setattr(cubins, "sources", lambda: {"a.cu": "one", "b.cu": "two", "c.cuh": "three"})
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_compiled_once(folder: Path) -> None:
    first = cubins.image("a.cu", "sm_90", counting())
    assert first == f"a.cu one [('c.cuh', 'three')] sm_90 {OPTIONS}".encode()
    assert cubins.image("a.cu", "sm_90", counting()) == first
    assert CountingCompiler.compiled == ["sm_90"]
    (kept,) = folder.iterdir()
    assert kept.name.startswith("a-sm_90-")


def test_whatever_it_depends_on_compiles_it_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.image("a.cu", "sm_90", counting())
    cubins.image("b.cu", "sm_90", counting())
    cubins.image("a.cu", "compute_90", counting())
    cubins.image("a.cu", "sm_90", counting((13, 1)))
    monkeypatch.setattr(cubins, "OPTIONS", ("-other",))
    cubins.image("a.cu", "sm_90", counting())
    monkeypatch.setattr(cubins, "sources", lambda: {"a.cu": "one", "c.cuh": "3"})
    cubins.image("a.cu", "sm_90", counting())
    monkeypatch.setattr(cubins, "sources", lambda: {"a.cu": "1", "c.cuh": "3"})
    cubins.image("a.cu", "sm_90", counting())
    assert len(CountingCompiler.compiled) == len(list(folder.iterdir())) == 7


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "digest only"])
def test_a_damaged_file_is_compiled_again(folder: Path, damage: str) -> None:
    good = cubins.image("a.cu", "sm_90", counting())
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    bit = whole[:3] + bytes([whole[3] ^ 1]) + whole[4:]
    kept.write_bytes({"empty": b"", "cut": whole[:-1], "bit": bit, "digest only": whole[-32:]}[damage])
    assert cubins.image("a.cu", "sm_90", counting()) == good
    assert len(CountingCompiler.compiled) == 2
    assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_gives_way_to_a_temporary_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("a file")
    cubins.image("a.cu", "sm_90", counting())
    cubins.image("a.cu", "sm_90", counting())
    assert CountingCompiler.compiled == ["sm_90"]  # the temporary folder serves the whole process
    assert build_cache.cache_folder().name.startswith("mamba_attn-")
    assert build_cache.cache_folder() == build_cache.cache_folder()
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(folder.with_name("readonly")))
    monkeypatch.setattr(build_cache.os, "access", lambda path, mode: False)
    assert build_cache.cache_folder().name.startswith("mamba_attn-")


def test_a_full_disk_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cubins.tempfile, "TemporaryDirectory", full)
    assert cubins.image("a.cu", "sm_90", counting())
    assert list(folder.iterdir()) == []


def test_two_at_once(folder: Path) -> None:
    images: list[bytes] = []
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait()
        images.extend(cubins.image("a.cu", "sm_90", counting()) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(images) == 40
    assert len(set(images)) == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), ("sm_90", "compute_90")),
        ((7, 5), ("sm_75", "compute_75")),
        ((12, 0), ("sm_120", "compute_120")),
        ((12, 1), ("compute_120",)),
        ((20, 0), ("compute_120",)),
        ((8, 9), ("compute_86",)),
    ],
)
def test_targets(capability: tuple[int, int], expected: tuple[str, ...]) -> None:
    assert cubins.targets(capability, KNOWN) == expected


@pytest.mark.parametrize(
    ("capability", "known", "oldest"),
    [((7, 0), KNOWN, "7.5"), ((7, 0), (60, 70, 80), "7.5"), ((7, 5), (80, 90), "8.0"), ((8, 0), (), "7.5")],
)
def test_too_old(capability: tuple[int, int], known: tuple[int, ...], oldest: str) -> None:
    sentence = rf"capability {capability[0]}\.{capability[1]} and the kernels need {oldest} or newer.*blocked"
    with pytest.raises(BackendUnavailableError, match=sentence):
        cubins.targets(capability, known)


def test_sources_come_from_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    (tmp_path / "README.md").write_text("no")
    monkeypatch.setattr(cubins, "files", lambda name: tmp_path if name == "mamba_attn.cuda" else None)
    (tmp_path / "b.cuh").write_text("header")
    with pytest.raises(BackendUnavailableError, match="has no CUDA sources; reinstall mamba_attn"):
        cubins.sources.__wrapped__()
    (tmp_path / "a.cu").write_text("unit, naïve", encoding="utf-8")
    assert cubins.sources.__wrapped__() == {"a.cu": "unit, naïve", "b.cuh": "header"}


def test_a_package_without_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.undo()
    monkeypatch.setattr(cubins, "files", lost)
    with pytest.raises(
        BackendUnavailableError, match=r"cannot read the CUDA sources \(No module.*reinstall mamba_attn"
    ):
        cubins.sources.__wrapped__()


def test_units_are_the_files_that_nobody_includes() -> None:
    assert cubins.units() == ("a.cu", "b.cu")
