"""Of which images matrices are kept in full: of the first so many, or of those that are named."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from mamba_attn.datasets import Data
from mamba_attn.errors import nearest

Keep = int | Sequence[str]


def keep_from(keep: str, data: Data, limit: int | None = None) -> int | list[str]:
    """Return what text asks to keep: a number, or keys of images.

    Args:
        keep: a number, or names between commas: keys as a store lists them, paths below the collection's folder or
            with it, or the end of a path that one image has alone.
        data: the images.
        limit: only the first so many are collected. Default: all.

    Raises:
        ValueError: no such image, several of them, or one that ``limit`` leaves out.
    """
    try:
        return int(keep)
    except ValueError:
        pass
    keys = [item.key for item in data.items]
    parts = [part.strip() for part in ([keep] if _found(keep, keys) else keep.split(",")) if part.strip()]
    if not parts:
        raise ValueError(f"keep={keep!r}: expected a number, or names of images between commas.")
    return checked([_key(part, keys) for part in parts], data, limit)


def checked(keep: Keep, data: Data, limit: int | None = None) -> int | list[str]:
    """Return a number as it is, and keys sorted, each once.

    Args:
        keep: of a request.
        data: the images.
        limit: only the first so many are collected. Default: all.

    Raises:
        ValueError: a number below 0, a key that no image has, or one that ``limit`` leaves out.
    """
    if isinstance(keep, int):
        if keep < 0:
            raise ValueError(f"keep={keep}: expected a number from 0 on.")
        return keep
    keys = [item.key for item in data.items]
    wanted = {keys[index] for index in data.chosen(limit=limit)}
    for key in keep:
        if key in wanted:
            continue
        if key in keys:
            needed = [keys[index] for index in data.chosen()].index(key) + 1
            raise ValueError(
                f"keep={key!r}: this image is not among the first {len(wanted)} of {data.name}; "
                f"limit={needed} includes it."
            )
        raise ValueError(f"keep={key!r}: {data.name} has no such image. {nearest(key, keys)}")
    return sorted(set(keep))


def _key(name: str, keys: Sequence[str]) -> str:
    """The one image that a name means; the name itself where none, or several, are meant."""
    found = _found(name, keys)
    if len(found) > 1:
        raise ValueError(
            f"keep={name!r}: {len(found)} images are named so, {found[0]} and {found[1]} among them; give the "
            "whole name."
        )
    return found[0] if found else name


def _found(name: str, keys: Sequence[str]) -> list[str]:
    if name in keys:
        return [name]
    path = str(PurePosixPath(name.replace("\\", "/")))
    if path in keys:
        return [path]
    below = [key for key in keys if key.endswith(f"/{path}")]
    return below or [key for key in keys if path.endswith(f"/{key}")]
