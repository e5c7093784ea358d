"""What has to be there before work begins: packages of an extra, a folder that can be written."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path


def parse_place(query: str | None, box: str | None, words: str = "") -> dict[str, tuple[float, ...]]:
    """Return ``pixel`` or ``box`` as numbers, from ROW,COL or X0,Y0,X1,Y1; nothing without either.

    Args:
        query: ROW,COL.
        box: X0,Y0,X1,Y1.
        words: what else may be given, for errors.

    Raises:
        ValueError: other counts of numbers, or both.
    """
    if query is not None and box is not None:
        raise ValueError(f"query={query!r}, box={box!r}: both say whose attention; leave one out.")
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
        needed: packages by the names of the modules that are imported.
        extra: of this package, that brings them.

    Raises:
        ImportError: the packages that are missing, and the extra that brings them.
    """
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install 'mamba_attn[{extra}]'")


def writable(out: str) -> Path:
    """Return a folder, made and tried.

    Args:
        out: its path; ``~`` is the home folder.

    Raises:
        OSError: it cannot be made or written.
    """
    folder = Path(out).expanduser()
    probe = folder / ".mamba_attn_probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out={out!r}: this folder cannot be written ({error.strerror}); name another.") from error
    return folder
