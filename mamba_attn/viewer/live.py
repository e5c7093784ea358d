"""Rows and regions of attention that is not stored, in linear time, from a traced forward pass of one image."""

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import to_tokens
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.tracer import Trace, trace
from mamba_attn.viewer.errors import UnavailableError
from mamba_attn.viewer.state import Pane

_TRACES = 4  # images whose records are remembered


class Live:
    """A store's model, run on an image on demand.

    Args:
        store: an ``AttentionStore``.
    """

    def __init__(self, store: Any) -> None:
        self._store, self._subject = store, store.subject
        self._trace = lru_cache(_TRACES)(self._traced)
        self._lock = Lock()  # a trace belongs to one thread, but the server has several

    def read(self, image: Any, layer: str, tokens: Sequence[int], route: str | int, pane: Pane) -> np.ndarray:
        """Return the mean of some tokens' rows, or columns, of an image's attention: (tokens,).

        Args:
            image: of the store, or added to it.
            layer: its name.
            tokens: at least one.
            route: number, or "sum".
            pane: its direction, and whether the gate weighs rows and D is added to the diagonal.

        Raises:
            UnavailableError: the layer has no gate, or no D.
            MambaAttnError: the model cannot be built, e.g. as its weights moved.
        """
        with self._lock, torch.no_grad():
            record = self._trace(image)[layer]
            vector = torch.zeros(1, record.tokens, dtype=record.dtype)
            vector[0, list(tokens)] = 1 / len(tokens)
            return _product(record, vector, route, pane)[0].double().numpy()

    def matrix(self, image: Any, layer: str, route: str | int = "sum") -> np.ndarray:
        """Return the attention of an image, (tokens, tokens); arguments as in ``read``."""
        with self._lock, torch.no_grad():
            record = self._trace(image)[layer]
            found = record.attention() if route == "sum" else record.attention(routes="each")[:, int(route)]
            return found[0].double().numpy()

    def predicted(self, pixels: np.ndarray) -> str | None:
        """Return the name of the class with the highest score; None if the model has no classes."""
        names = self._store.classes
        with torch.no_grad():
            scores = self._subject.logits(self._batch(pixels))
        return names[int(scores.argmax())] if names and scores is not None else None

    def has(self, image: Any) -> dict[str, dict[str, bool]]:
        """Return, per layer, whether its scans have a "gate", and "skip": a D."""
        with self._lock:
            scans = {each.name: getattr(each, "scan", None) for each in self._trace(image).layers}
        return {
            name: {what: getattr(scan, field, None) is not None for what, field in (("gate", "gate"), ("skip", "D"))}
            for name, scan in scans.items()
        }

    def _batch(self, pixels: np.ndarray) -> Tensor:
        batch: Tensor = self._subject.transform.normalise(np.asarray(pixels)[None])
        return batch.to(self._subject.device)

    def _traced(self, image: Any) -> Trace:
        # the store knows where the tokens lie, also where its model's layout= was a function
        layout = self._subject.layout or {layer.name: layer.layout for layer in self._store.layers}
        own = getattr(image, "pixels", None)  # of one that was added
        pixels = self._store.pixels(image) if own is None else own
        with torch.no_grad(), trace(self._subject.model, layout=layout) as record:
            self._subject.model(self._batch(pixels))
        return record


def _product(layer: Layer, vector: Tensor, route: str | int, pane: Pane) -> Tensor:
    if not isinstance(layer, ScanLayer):
        if pane.gate or pane.skip:
            raise UnavailableError("Softmax attention has neither a gate nor D: switch them off for this block.")
        matrix = layer.attention()
        return (vector[:, None] @ (matrix if pane.direction == "row" else matrix.mT))[:, 0]
    scan = layer.scan
    if isinstance(route, int):
        scan = scan.select_routes(slice(route, route + 1))
    for wanted, there, name in ((pane.gate, scan.gate, "gate"), (pane.skip, scan.D, "D")):
        if wanted and there is None:
            raise UnavailableError(f"This model's scans have no {name}: switch it off.")
    weight = scan.gate if pane.gate else None
    product = ops.left_product if pane.direction == "row" else ops.right_product
    values = product(scan, vector=vector, row_weight=weight)
    return values + vector * _diagonal(scan, weight) if pane.skip else values


def _diagonal(scan: ScanRecord, weight: Tensor | None) -> Tensor:
    """(batch or 1, tokens) of D on the diagonal, as the channel mean, once for every route that reads the token."""
    found = scan.D
    if found is None:
        raise ValueError("this mixer has no D.")
    if found.ndim == 2:  # of routes
        each = found.unsqueeze(-1).expand(1, -1, -1, scan.length)
        found = to_tokens(each, scan.write_order.unsqueeze(-2), scan.tokens).sum(1)
    return (found if weight is None else found * weight).mean(1) * scan.scale
