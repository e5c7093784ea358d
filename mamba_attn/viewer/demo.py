"""The default store: the package's own images and demo model, collected once."""

import shutil
from collections.abc import Callable
from pathlib import Path

from mamba_attn.core.requirements import require_extras
from mamba_attn.errors import StoreError

MODEL = "vmamba_micro"
_NEEDED = {"zarr": "zarr"}


def demo_folder() -> Path:
    """Return its folder, in ``MAMBA_ATTN_CACHE`` or ~/.cache/mamba_attn."""
    from mamba_attn.models.official import cache_folder

    return cache_folder() / f"demo-{MODEL}"


def demo_store(advance: Callable[[int, int], None] = lambda done, wanted: None) -> Path:
    """Return the folder of the store; collect it first if it is missing or unfinished.

    Args:
        advance: called during collection with the number of images done, and the number wanted.

    Raises:
        StoreError: the folder holds something else, or a store of another version, other weights or other images.
        OSError: the cache cannot be written.
        ImportError: a package that collecting needs is missing.
    """
    require_extras(_NEEDED, "analytics")
    from mamba_attn.analytics import AttentionStore
    from mamba_attn.analytics.contents import Contents
    from mamba_attn.analytics.index import INDEX
    from mamba_attn.analytics.places import place

    folder = demo_folder()
    try:
        if (folder / INDEX).is_file() and Contents.open(place("store", folder)).finished:
            AttentionStore.open(folder).model()  # raises if the weights are not this package's
            return folder
        _collect(folder, advance)
    except StoreError as error:
        raise StoreError(
            f"{error} This folder is only a cache: delete {folder} and the demo will be collected again."
        ) from error
    return folder


def photos() -> Path:
    """Return a folder of the package's images in folders of their classes, which their names hold."""
    from mamba_attn import images

    folder = demo_folder().with_name("demo-photos")
    for path in images.samples():
        copy = folder / path.stem.split("_")[1] / path.name
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return folder


def _collect(folder: Path, advance: Callable[[int, int], None]) -> None:
    from mamba_attn.analytics import Request, collect
    from mamba_attn.datasets import loading, open_data

    data = open_data(str(photos()))
    request = Request(loading.load(MODEL, "demo"), data, keep=len(data.items), command="mamba-attn explore")
    collect(request, folder, advance=advance)
