"""What the page shows of a forward pass that no store holds: images, a volume or texts, straight from their trace."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mamba_attn import images
from mamba_attn.analytics.index import StoredLayer, place_of
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.texts import decode, encode
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.texts import is_text, takes
from mamba_attn.tracing.tracer import Trace, trace
from mamba_attn.viewer.errors import UnavailableError
from mamba_attn.viewer.source import Shown, sheet_of

_REMEMBERED = 16  # matrices of a batch


@dataclass(frozen=True, eq=False, kw_only=True)
class TracedLayer(StoredLayer):
    """A layer as a store describes it; ``record`` is the trace's own."""

    record: Layer


class Traced:
    """One forward pass, with the interface of an ``AttentionStore``; every image of its batch is kept in full.

    Args:
        record: of the pass, which has ended.
        model: whose pass it was, with its transform, classes and tokenizer, as far as it has them. Default: the network
            that was traced.
        keys: names of the images or texts. Default: their numbers.
        labels: names of their classes.

    Raises:
        TraceError: the model did not run, or an image's layers have no layout.
        ValueError: names for another number of images.
    """

    folder = None

    def __init__(
        self,
        record: Trace,
        model: LoadedModel | None = None,
        *,
        keys: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        arguments, named = record.arguments
        self._inputs = next(value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
        if model is None and record.model is not None:
            model = LoadedModel(record.model)
        self._subject, self.texts = model, is_text(self._inputs)
        self.model_name = "model" if model is None else str(model.name)
        self.classes = [] if model is None else list(model.classes or ())
        self.layers = _layers(record.layers, self.texts)
        self.images = self._images(record.output, keys, labels)
        self.index = SimpleNamespace(routes="each")
        self._matrices = lru_cache(_REMEMBERED)(_matrices)
        self._embeddings: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}

    @property
    def subject(self) -> LoadedModel:
        """The model."""
        if self._subject is None or self.texts:
            raise UnavailableError("This page shows one forward pass: the model cannot run again.")
        return self._subject

    def pixels(self, image: Shown) -> np.ndarray | None:
        """Return what the model saw, (height, width, 3) uint8; of a volume the slices of its page; None of a text."""
        if self.texts:
            return None
        its = self._inputs[image.row].detach().float().cpu()
        if its.ndim == 3 and self._subject is not None and self._subject.transform is not None:
            return np.asarray(self._subject.transform.pixels(its))
        low, high = its.min(), its.max()
        grey = ((its - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
        if its.ndim == 4:  # the slice in the middle of each layer of patches
            deep, across = self.layers[0].layout.grid[0], sheet_of(self.layers[0].layout)[2]
            middles = [min(int((at + 0.5) * its.shape[1] / deep), its.shape[1] - 1) for at in range(deep)]
            grey = torch.cat([torch.cat(list(row), -1) for row in grey[:, middles].movedim(1, 0).split(across)], -2)
        grey = grey if len(grey) == 3 else grey[:1].expand(3, -1, -1)
        return np.asarray(grey.movedim(0, -1))

    def mean(self, layer: TracedLayer, route: str | int = "sum") -> np.ndarray:
        """Return the mean over the batch, (tokens, tokens)."""
        return np.asarray(self._matrices(layer, route).mean(0))

    def variance(self, layer: TracedLayer, route: str | int = "sum") -> np.ndarray:
        """Return the variance over the batch, (tokens, tokens)."""
        return np.asarray(self._matrices(layer, route).var(0))

    def matrix(self, layer: TracedLayer, image: Shown, route: str | int = "sum") -> np.ndarray:
        """Return the attention of an image, (tokens, tokens)."""
        return np.asarray(self._matrices(layer, route)[image.row])

    def lines(
        self,
        layer: TracedLayer,
        start: int,
        stop: int,
        route: str | int = "sum",
        *,
        image: Shown | None = None,
        columns: bool = False,
    ) -> np.ndarray:
        """Return neighbouring rows, or columns as rows, of an image or of the mean."""
        found = self.mean(layer, route) if image is None else self.matrix(layer, image, route)
        return found[:, start:stop].T if columns else found[start:stop]

    def feature_rows(self, layer: TracedLayer, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Return the images' matrices as rows of numbers, some at a time."""
        found = self._matrices(layer, "sum").reshape(len(self.images), -1)
        for start in range(0, len(found), rows):
            yield start, found[start : start + rows]

    def embedding(self, key: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        """Return what was saved."""
        return self._embeddings.get(key)

    def save_embedding(self, key: str, array: np.ndarray, about: dict[str, Any] | None = None) -> None:
        """Remember an array."""
        self._embeddings[key] = (array, about or {})

    def _images(self, output: Any, keys: Sequence[str] | None, labels: Sequence[str] | None) -> list[Shown]:
        batch, model = self.layers[0].record.batch, self._subject
        for name, given in (("keys", keys), ("labels", labels)):
            if given is not None and len(given) != batch:
                raise ValueError(f"{name}={list(given)[:3]}: expected {batch}, one for each image of the batch.")
        scores = model.scores(output, batch) if self.classes and model is not None else None
        predicted = [None] * batch if scores is None else [self.classes[int(at)] for at in scores.argmax(1)]
        words = self._words() if self.texts else [None] * batch
        known: Sequence[str | None] = labels or [None] * batch
        names = keys or ["".join(its)[:40] if its else f"{number + 1}" for number, its in enumerate(words)]
        return [
            Shown(name, label, its, its == label if its and label in self.classes else None, True, row, words=text)
            for row, (name, label, its, text) in enumerate(zip(names, known, predicted, words, strict=True))
        ]

    def _words(self) -> list[tuple[str, ...]]:
        tokenizer = self._subject and self._subject.tokenizer
        return [tuple(decode(tokenizer, ids) if tokenizer else map(str, ids.tolist())) for ids in self._inputs]


def traced(model: LoadedModel, inputs: Sequence[str | Path] | str, *, labels: Sequence[str] | None = None) -> Traced:
    """Run a model on images, or on a text, and return what the page shows of it.

    Args:
        model: with its transform, or its tokenizer.
        inputs: paths of images; a text for a model that reads texts.
        labels: names of the images' classes.

    Raises:
        ValueError: no inputs, or a model of texts without a tokenizer.
        MambaAttnError: the model cannot be traced, or a file is no image.
    """
    if not inputs:
        raise ValueError(f"inputs={inputs!r}: expected paths of images, or a text for a model that reads texts.")
    if model.reads == "text":
        if model.tokenizer is None or not isinstance(inputs, str):
            raise ValueError(f"{model.name} reads text: expected inputs= as a text, and LoadedModel(tokenizer=).")
        batch, keys = encode(model.tokenizer, inputs), None
    else:
        paths = images.find([inputs] if isinstance(inputs, str) else [str(path) for path in inputs])
        keys = [path.name for path in paths]
        batch = model.transform.normalise(np.stack([model.transform.pixels(path) for path in paths]))
    options = {"use_cache": False} if takes(model.model, "use_cache") else {}
    with torch.no_grad(), trace(model.model, layout=model.layout) as record:
        model.model(batch.to(model.device), **options)
    return Traced(record, model, keys=keys, labels=labels)


def _layers(records: Sequence[Layer], texts: bool) -> list[TracedLayer]:
    layouts = [TokenLayout.line(each.tokens) if texts and not each.has_layout else each.layout for each in records]
    places = place_of([layer.name for layer in records], [each.grid for each in layouts])
    found = []
    for its, place, layout in zip(records, places, layouts, strict=True):
        orders = np.zeros((1, 0), dtype=np.int64)
        if isinstance(its, ScanLayer):  # where images have orders of their own, that of the first
            order = its.scan.read_order.cpu().numpy()
            orders = order[0] if order.ndim == 3 else order
        found.append(TracedLayer(its.name, its.kind, *place, len(orders), layout, orders, exact=True, record=its))
    return found


def _matrices(layer: TracedLayer, route: str | int) -> np.ndarray:
    """(batch, tokens, tokens) float32."""
    with torch.no_grad():
        found = layer.record.attention(routes="sum" if layer.routes == 1 else route)
    return found.detach().float().cpu().numpy()
