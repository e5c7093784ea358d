"""What all commands have in common: their place under ``mamba-attn``, how they end, what they need."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mamba_attn.errors import MambaAttnError


def subcommand(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: of ``mamba-attn``.
        name: of the command.
        what: it does, in a line.
        epilog: printed as it stands.
    """
    return commands.add_parser(
        name, help=what, description=what.capitalize() + ".", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def exit_code(name: str, call: Callable[[], int], stopped: str = "stopped.") -> int:
    """Call what a command does, and return its exit code: 2 for what it refuses, in a sentence, and 130 for Ctrl+C.

    Args:
        name: of the command.
        call: what it does; it returns the exit code.
        stopped: what is said after Ctrl+C.
    """
    try:
        return call()
    except (ValueError, TypeError, OSError, ImportError, MambaAttnError) as error:
        print(f"mamba-attn {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mamba-attn {name}: {stopped}", file=sys.stderr)
        return 130


def parse_place(query: str | None, box: str | None, words: str = "") -> dict[str, tuple[float, ...]]:
    """Return ``pixel`` or ``box`` of ``--query ROW,COL`` and ``--box X0,Y0,X1,Y1``; nothing without either.

    Four numbers after ``--query``, which once were a box, are still taken for one.

    Args:
        query: as given.
        box: as given.
        words: what may be given besides, for errors.

    Raises:
        ValueError: other counts of numbers, or both.
    """
    if query is not None and box is not None:
        raise ValueError(f"--query {query} --box {box}: both say whose attention; leave one out.")
    option, text = ("--query", query) if box is None else ("--box", box)
    if text is None:
        return {}
    try:
        place = tuple(float(part) for part in text.split(","))
    except ValueError:
        place = ()
    if len(place) == 4 and option == "--query":
        print(f"--query {text}: four numbers are a box; write --box {text}.", file=sys.stderr)
    elif len(place) != (2 if option == "--query" else 4):
        expected = f"ROW,COLUMN in pixels{words}" if option == "--query" else "X0,Y0,X1,Y1 in pixels"
        raise ValueError(f"{option} {text}: expected {expected}.")
    return {"pixel" if len(place) == 2 else "box": place}


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
    """Return the folder of ``--out``, made and tried.

    Args:
        out: as given; ``~`` is the home folder.

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
        raise OSError(f"--out {out}: this folder cannot be written ({error.strerror}); name another.") from error
    return folder
