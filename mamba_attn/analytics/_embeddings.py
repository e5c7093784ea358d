"""Embeddings beside a store: arrays under a key, each file written in one step."""

import hashlib
import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mamba_attn.errors import StoreError

_LARGEST = 2**30  # bytes of a file that is read


def load(folder: Path, key: str, statistics: str) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Return an array and what was said about it; None when there is none of these statistics.

    Args:
        folder: of the embeddings.
        key: of the array.
        statistics: that the store has now.

    Raises:
        StoreError: the file is damaged.
    """
    path = _path(folder, key)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            said, array = json.loads(str(content["said"])), content["array"]
        fits = said["key"] == key and said["statistics"] == statistics
        return (array, dict(said["about"])) if fits else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise StoreError(f"{path}: it is damaged ({error}); delete this file.") from error


def save(folder: Path, key: str, statistics: str, array: np.ndarray, about: dict[str, Any]) -> None:
    """Save an array.

    Args:
        folder: of the embeddings; made when it is not there.
        key: of the array.
        statistics: that the store has now.
        array: of numbers.
        about: JSON values.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    said = json.dumps({"key": key, "statistics": statistics, "about": about})
    content = io.BytesIO()
    np.savez(content, array=array, said=np.array(said))
    path = _path(folder, key)
    temporary = path.with_suffix(f".{os.getpid()}.new")
    temporary.write_bytes(content.getvalue())
    temporary.replace(path)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
