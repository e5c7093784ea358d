"""The folder that keeps compiled kernels between runs."""

import os
import tempfile
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """Return MAMBA_ATTN_CACHE, or the user's cache; a temporary folder of this process if that is not writable."""
    try:
        folder = Path(os.environ.get("MAMBA_ATTN_CACHE") or Path.home() / ".cache" / "mamba_attn")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return _temporary()
    return folder if os.access(folder, os.W_OK) else _temporary()


@cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="mamba_attn-"))
