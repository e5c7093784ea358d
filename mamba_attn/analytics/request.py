"""What is collected, of which model and images; and the layers that this stands for."""

from dataclasses import dataclass

import torch

from mamba_attn.analytics.index import StoredLayer, place_of
from mamba_attn.analytics.keeping import Keep, checked
from mamba_attn.analytics.projection import EXACT
from mamba_attn.datasets import Data
from mamba_attn.datasets.loaded_model import Subject
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.tracer import trace

ROUTES = ("each", "sum")


@dataclass(frozen=True)
class Request:
    """What is collected.

    Args:
        subject: the model.
        data: the images.
        limit: take the first so many. Default: all.
        keep: store the matrices of the first so many in full, or of the images with these keys.
        batch: images at once. Default: what the matrices' size allows, at most 16.
        layers: names, patterns or numbers, or one of them. Default: all.
        routes: "each": statistics of every route and of their sum; "sum": of the sum alone.
        interval: seconds between checkpoints, at least.
        command: how to go on after a kill, for messages.

    Raises:
        ValueError: a number below the least, other ``routes``, an image in ``keep`` that is not collected.
    """

    subject: Subject
    data: Data
    limit: int | None = None
    keep: Keep = 0
    batch: int | None = None
    layers: LayerNames | None = None
    routes: str = "each"
    interval: float = 20.0
    command: str = ""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected a number from {least} on.")
        if self.routes not in ROUTES:
            raise ValueError(f"routes={self.routes!r}: expected one of {ROUTES}.")
        checked(self.keep, self.data, self.limit)

    @property
    def kept(self) -> int | list[str]:
        """Of which images matrices are stored in full: the first so many, or sorted keys."""
        return checked(self.keep, self.data, self.limit)

    @property
    def wanted(self) -> list[int]:
        """Indices of the images, each key once."""
        first = {self.data.items[index].key: index for index in reversed(self.data.chosen(limit=self.limit))}
        return sorted(first.values())


def describe(request: Request) -> list[StoredLayer]:
    """Return the layers of a request, from a forward pass over an empty image.

    Args:
        request: what is collected.

    Raises:
        UnknownLayerError: a pattern fits no layer.
        TraceError: a layer whose tokens' place is not known.
    """
    return described(request.subject, request.layers)


def described(subject: Subject, patterns: LayerNames | None = None) -> list[StoredLayer]:
    """Return the layers of a model, from a forward pass over an empty image.

    Args:
        subject: the model.
        patterns: names, patterns or numbers of layers. Default: all.

    Raises:
        UnknownLayerError: a pattern fits no layer.
        TraceError: a layer whose tokens' place is not known.
    """
    empty = torch.zeros(1, 3, *subject.transform.size, device=subject.device)
    with torch.no_grad(), trace(subject.model, layers=patterns) as found:
        subject.model(empty)
    layers = found.layers
    places = place_of([layer.name for layer in layers], [layer.layout.grid for layer in layers])
    return [_described(layer, *place) for layer, place in zip(layers, places, strict=True)]


def _described(layer: Layer, stage: int, block: int) -> StoredLayer:
    scan = layer.scan if isinstance(layer, ScanLayer) else None
    routes = 1 if scan is None else scan.routes
    orders = torch.arange(layer.tokens)[None] if scan is None else scan.read_order
    return StoredLayer(
        layer.name, layer.kind, stage, block, routes, layer.layout, orders.cpu().numpy(), layer.tokens**2 <= EXACT,
        moments=None if scan is None else (routes, scan.channels, scan.length),
    )  # fmt: skip
