"""Where compiled kernels are kept between runs."""

import os
import tempfile
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """MAMBA_ATTN_CACHE, or the user's cache; a temporary folder of this process when that cannot be written."""
    try:
        folder = Path(os.environ.get("MAMBA_ATTN_CACHE") or Path.home() / ".cache" / "mamba_attn")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return _temporary()
    return folder if os.access(folder, os.W_OK) else _temporary()


@cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="mamba_attn-"))
