"""Checks to run before work begins: places parse, packages of an extra are installed, a folder is writable."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from mamba_attn.errors import local_path


def parse_place(query: str | None, box: str | None, words: str = "") -> dict[str, tuple[float, ...]]:
    """Parse ROW,COL or X0,Y0,X1,Y1 into a ``pixel`` or ``box`` of numbers; empty without either.

    Args:
        query: ROW,COL.
        box: X0,Y0,X1,Y1.
        words: other inputs that are allowed, for errors.

    Raises:
        ValueError: a wrong count of numbers, or both were given.
    """
    if query is not None and box is not None:
        raise ValueError(f"query={query!r}, box={box!r}: give only one of them.")
    name, text, kind, count = ("query", query, "pixel", 2) if box is None else ("box", box, "box", 4)
    if text is None:
        return {}
    try:
        place = tuple(float(part) for part in text.split(","))
    except ValueError:
        place = ()
    if len(place) != count:
        expected = "X0,Y0,X1,Y1 in pixels" if kind == "box" else f"ROW,COLUMN in pixels{words}"
        hint = " Four numbers are a box." if kind == "pixel" and len(place) == 4 else ""
        raise ValueError(f"{name}={text!r}: expected {expected}.{hint}")
    return {kind: place}


def require_extras(needed: Mapping[str, str], extra: str = "explain") -> None:
    """Check that modules are installed.

    Args:
        needed: package by name of the module to import.
        extra: this package's extra that installs them.

    Raises:
        ImportError: packages are missing; the message names them and the extra.
    """
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install 'mamba_attn[{extra}]'")


def writable(out: str) -> Path:
    """Make a folder, check that it can be written, and return it.

    Args:
        out: its path; ``~`` is the home folder.

    Raises:
        OSError: it cannot be made or written.
    """
    folder = local_path("out", out)
    probe = folder / ".mamba_attn_probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out={out!r}: cannot write this folder ({error.strerror}); choose another.") from error
    return folder
