"""Rows and regions of attention that is not stored, in linear time, from a traced forward pass of one image."""

from collections import OrderedDict
from collections.abc import Sequence
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

_TRACES = 4  # images whose records are remembered


class Live:
    """A store's model, run on an image on demand.

    Args:
        store: an ``AttentionStore``.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._subject = store.subject
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._lock = Lock()  # a trace belongs to one thread, but the server has several

    def read(
        self,
        image: Any,
        layer: str,
        tokens: Sequence[int],
        *,
        route: str | int = "sum",
        direction: str = "row",
        gate: bool = False,
        skip: bool = False,
    ) -> np.ndarray:
        """Return the mean of some tokens' rows, or columns, of an image's attention: (tokens,).

        Args:
            image: of the store.
            layer: its name.
            tokens: at least one.
            route: number, or "sum".
            direction: "row" or "column".
            gate: weigh rows by the gate, where the mixer has one.
            skip: add D, times the gate if that is on, to the diagonal.

        Raises:
            UnavailableError: the layer has no gate, or no D.
            MambaAttnError: the model cannot be built, e.g. as its weights moved.
        """
        with self._lock:
            record = self._trace(image)[layer]
            vector = torch.zeros(1, record.tokens, dtype=record.dtype)
            vector[0, list(tokens)] = 1 / len(tokens)
            with torch.no_grad():
                return _product(record, vector, route, direction, gate, skip)[0].double().numpy()

    def matrix(self, image: Any, layer: str, route: str | int = "sum") -> np.ndarray:
        """Return the attention of an image, (tokens, tokens); arguments as in ``read``."""
        with self._lock, torch.no_grad():
            record = self._trace(image)[layer]
            found = record.attention() if route == "sum" else record.attention(routes="each")[:, int(route)]
            return found[0].double().numpy()

    def predicted(self, image: Any) -> str | None:
        """Return the name of the class with the highest score; None if the model has no classes."""
        names = self._store.classes
        with torch.no_grad():
            scores = self._subject.logits(self._batch(image))
        return names[int(scores.argmax())] if names and scores is not None else None

    def has(self, image: Any) -> dict[str, dict[str, bool]]:
        """Return, per layer, whether its scans have a "gate", and "skip": a D."""
        with self._lock:
            return {
                layer.name: {"gate": layer.scan.gate is not None, "skip": layer.scan.D is not None}
                if isinstance(layer, ScanLayer)
                else {"gate": False, "skip": False}
                for layer in self._trace(image).layers
            }

    def _batch(self, image: Any) -> Tensor:
        pixels = image.pixels if hasattr(image, "pixels") else self._store.pixels(image)  # its own if it was added
        batch: Tensor = self._subject.transform.normalise(np.asarray(pixels)[None])
        return batch.to(self._subject.device)

    def _trace(self, image: Any) -> Trace:
        if image.key in self._traces:
            self._traces.move_to_end(image.key)
            return self._traces[image.key]
        # the store knows where the tokens lie, also where its model's layout= was a function
        layout = self._subject.layout or {layer.name: layer.layout for layer in self._store.layers}
        with torch.no_grad(), trace(self._subject.model, layout=layout) as record:
            self._subject.model(self._batch(image))
        self._traces[image.key] = record
        if len(self._traces) > _TRACES:
            self._traces.popitem(last=False)
        return record


def _product(layer: Layer, vector: Tensor, route: str | int, direction: str, gate: bool, skip: bool) -> Tensor:
    if not isinstance(layer, ScanLayer):
        if gate or skip:
            raise UnavailableError("Softmax attention has neither a gate nor D: switch them off for this block.")
        matrix = layer.attention()
        return (vector[:, None] @ matrix)[:, 0] if direction == "row" else (matrix @ vector[..., None])[..., 0]
    scan = layer.scan
    if isinstance(route, int):
        scan = scan.select_routes(slice(route, route + 1))
    lacking = "gate" if gate and scan.gate is None else "D" if skip and scan.D is None else ""
    if lacking:
        raise UnavailableError(f"This model's scans have no {lacking}: switch it off.")
    weight = scan.gate if gate else None
    product = ops.left_product if direction == "row" else ops.right_product
    values = product(scan, vector=vector, row_weight=weight)
    return values + vector * _skip(scan, weight) if skip else values


def _skip(scan: ScanRecord, weight: Tensor | None) -> Tensor:
    """(batch or 1, tokens) of D on the diagonal, as the channel mean, once for every route that reads the token."""
    if scan.D is None:
        raise ValueError("this mixer has no D.")
    diagonal = scan.D
    if diagonal.ndim == 2:  # of routes
        each = scan.D.unsqueeze(-1).expand(1, -1, -1, scan.length)
        diagonal = to_tokens(each, scan.write_order.unsqueeze(-2), scan.tokens).sum(1)
    weighted = diagonal if weight is None else diagonal * weight
    return weighted.mean(1) * scan.scale
