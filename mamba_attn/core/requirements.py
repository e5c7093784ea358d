"""What has to be there before work begins: packages of an extra, a folder that can be written."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path


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
