"""A request to collect attention: model, images, layers, and which images to keep in full."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import torch

from mamba_attn.analytics.index import StoredLayer, place_of
from mamba_attn.analytics.projection import EXACT
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets import Data
from mamba_attn.datasets.loading import complete
from mamba_attn.datasets.memory import as_data
from mamba_attn.errors import nearest
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.tracer import trace

ROUTES = ("each", "sum")
FEATURES = 10_000  # first images whose features and pixels are stored
_WORKERS = 4  # processes that decode, beside a GPU
Keep = int | Sequence[str]


@dataclass(frozen=True)
class Request:
    """A request: what to collect, of which model and images.

    Args:
        subject: the model, or a plain network.
        data: the images, or what ``as_data`` makes a collection of, e.g. a DataLoader.
        limit: number of images, taken from the start. Default: all.
        keep: number of first images whose matrices to store in full, or keys of such images.
        batch: images per batch. Default: as the matrices' size allows, at most 16.
        layers: names, patterns or numbers, or one of them. Default: all.
        routes: "each": statistics of every route and of their sum; "sum": of the sum alone.
        part: images of a part of the store, which is counted at once: what a kill loses at most. Default: by their
            number, 64 to 1,024, fewer of large matrices on a CPU.
        workers: processes that decode images, where the images are in files. Default: none on a CPU, which the model
            keeps busy, else 4.
        command: the command that resumes after a kill, for messages.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        features: number of first images whose features and pixels are stored, or "all"; all images count in the
            statistics. Default: 10,000, or as many as an existing store says.

    Raises:
        ValueError: a number is too small, ``routes`` is unknown, or an image in ``keep`` is not collected, or without
            its pixels.

    Example:
        >>> from mamba_attn.datasets import load, open_data
        >>> from mamba_attn.images import SAMPLES
        >>> request = Request(load("vim_digits", weights="demo"), open_data(str(SAMPLES)), limit=4, keep=2)
        >>> len(request.wanted), request.kept
        (4, 2)
    """

    subject: LoadedModel
    data: Data
    limit: int | None = None
    keep: Keep = 0
    batch: int | None = None
    layers: LayerNames | None = None
    routes: str = "each"
    part: int | None = None
    workers: int | None = None
    command: str = ""
    layout: AnyLayout | None = None
    orders: AnyOrders | None = None
    features: int | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "subject", complete(self.subject))
        object.__setattr__(self, "data", as_data(self.data, self.subject))
        for name, least in (("limit", 1), ("batch", 1), ("part", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected a number from {least} on.")
        if self.routes not in ROUTES:
            raise ValueError(f"routes={self.routes!r}: expected one of {ROUTES}.")
        self._require_features()

    @property
    def featured(self) -> int | None:
        """Number of first images whose features and pixels a new store gets; None: of all."""
        if isinstance(self.features, str):
            return None
        return FEATURES if self.features is None else self.features

    def _require_features(self) -> None:
        """Refuse to keep matrices of images whose pixels would not be stored."""
        given, kept = self.features, self.kept
        number = isinstance(given, int) and not isinstance(given, bool) and given >= 0
        if not (number or given is None or given == "all"):
            raise ValueError(f"features={given!r}: expected a number from 0 on, or 'all'.")
        if self.featured is None or not kept:
            return
        if isinstance(kept, int):
            last = min(kept, len(self.wanted))
        else:
            places = {self.data.items[index].key: place for place, index in enumerate(self.wanted)}
            last = 1 + max(places[key] for key in kept)
        if last > self.featured:
            raise ValueError(
                f"keep={self.keep!r}: it needs image {last}, but features and pixels are stored only of the first "
                f"{self.featured}; give features={last}."
            )

    @property
    def kept(self) -> int | list[str]:
        """The images whose matrices are stored in full: a number of first images, or sorted keys."""
        return checked(self.keep, self.data, self.limit)

    @property
    def workers_or_default(self) -> int:
        """Processes that decode images."""
        if self.workers is not None:
            return self.workers
        return 0 if self.subject.device.type == "cpu" else _WORKERS

    @cached_property
    def wanted(self) -> list[int]:
        """Indices of the images, each key once."""
        first = {self.data.items[index].key: index for index in reversed(self.data.chosen(limit=self.limit))}
        return sorted(first.values())


def describe(request: Request) -> list[StoredLayer]:
    """Return the layers of a request, from a forward pass over two images of noise.

    Args:
        request: what to collect.

    Raises:
        UnknownLayerError: a pattern fits no layer.
        TraceError: a layer whose tokens' place is not known.
    """
    return described(request.subject, request.layers, request.layout, request.orders)


def described(
    subject: LoadedModel,
    patterns: LayerNames | None = None,
    layout: AnyLayout | None = None,
    orders: AnyOrders | None = None,
) -> list[StoredLayer]:
    """Return the layers of a model, from a forward pass over two images of noise.

    Args:
        subject: the model.
        patterns: names, patterns or numbers of layers. Default: all.
        layout: as in ``mamba_attn.trace``.
        orders: as in ``mamba_attn.trace``.

    Raises:
        UnknownLayerError: a pattern fits no layer.
        TraceError: a layer whose tokens' place is not known.
    """
    # orders are measured on it: zeros would make tokens alike, and one image would hide that images differ
    size = subject.transform.blank().shape[1:]
    noise = torch.randn(2, *size, generator=torch.Generator().manual_seed(2))
    layout = subject.layout if layout is None else layout
    with torch.no_grad(), trace(subject.model, layers=patterns, layout=layout, orders=orders) as found:
        subject.model(noise.to(subject.device))
    layers = found.layers
    places = place_of([layer.name for layer in layers], [layer.layout.grid for layer in layers])
    return [_described(layer, *place) for layer, place in zip(layers, places, strict=True)]


def _described(layer: Layer, stage: int, block: int) -> StoredLayer:
    scan = layer.scan if isinstance(layer, ScanLayer) else None
    routes = 1 if scan is None else scan.routes
    orders = torch.arange(layer.tokens)[None] if scan is None else scan.read_order
    if orders.ndim == 3:  # each image has its own: none is the layer's
        orders = orders[0, :, :0]
    return StoredLayer(
        layer.name,
        layer.kind,
        stage,
        block,
        routes,
        layer.layout,
        orders.cpu().numpy(),
        layer.tokens**2 <= EXACT,
        moments=None if scan is None else (routes, scan.channels, scan.length),
    )


def keep_from(keep: str, data: Data, limit: int | None = None) -> int | list[str]:
    """Parse ``keep`` into a number, or keys of images.

    Args:
        keep: a number, or names between commas: keys as a store lists them, paths below the collection's folder or
            with it, or the end of a path that is unique.
        data: the images.
        limit: collect only this number of first images. Default: all.

    Raises:
        ValueError: no such image, an ambiguous name, or an image that ``limit`` leaves out.
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
    """Validate ``keep``: return a number unchanged, and keys sorted without duplicates.

    Args:
        keep: as in ``Request``.
        data: the images.
        limit: collect only this number of first images. Default: all.

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
    """Return the key of the one image that matches a name, else the name itself."""
    found = _found(name, keys)
    if len(found) > 1:
        raise ValueError(
            f"keep={name!r}: {len(found)} images match, {found[0]} and {found[1]} among them; give the whole name."
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
