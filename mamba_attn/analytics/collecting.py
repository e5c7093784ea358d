"""One pass of a traced model over images into a store: statistics of its attention, features, matrices of some images.

Memory does not grow with the images: it holds means and sums of squares over images, and writes per-image data to disk
at once. From time to time, a checkpoint counts the images so far.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mamba_attn import images as image_files
from mamba_attn.analytics.index import Index, StoredImage, StoredLayer
from mamba_attn.analytics.projection import power_of_two, project
from mamba_attn.analytics.request import Request, describe
from mamba_attn.analytics.statistics import LayerStatistics, state_moments
from mamba_attn.analytics.storage import StoreWriter, discard, folder_for, is_new, locked, route_names
from mamba_attn.core.decisions import decided
from mamba_attn.datasets import Sample, class_indices
from mamba_attn.errors import MatrixTooLargeError, NonFiniteError, StoreError
from mamba_attn.ops import free_bytes
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.tracer import Trace, trace

_LARGEST_HALF = 65504.0
_CHECKPOINT_SHARE = 10  # time between checkpoints, in durations of one
_BATCH_ENTRIES = 2**23  # of a batch of matrices, 32 MiB
_LARGEST_BATCH = 16
_RESERVE = 2**28  # bytes for the model, one image and everything else
_UNASKED = 2**26


class Collected(NamedTuple):
    """The result of a call: images counted now and in all, and why others could not be used, by key.

    Example:
        >>> Collected(new=2, counted=6, unreadable={"broken.jpg": "damaged"}).counted
        6
    """

    new: int
    counted: int
    unreadable: dict[str, str]


def collect(
    request: Request, out: str | Path, *, advance: Callable[[int, int], None] = lambda done, wanted: None
) -> Collected:
    """Collect attention into a store; skip images that it already holds.

    Args:
        request: what to collect.
        out: folder of the store; created if absent.
        advance: called with the images that are done, and those that are wanted, after every batch.

    Raises:
        StoreError: the folder holds another store, something else, or a store that is damaged; another process writes
            to it; no image could be used.
        MatrixTooLargeError: the statistics would not fit into memory; the message says what would.
        UnknownLayerError: a pattern fits no layer.
        OSError: the folder cannot be written.
        TypeError: no request.

    Example:
        >>> import tempfile
        >>> from mamba_attn.datasets import load, open_data
        >>> from mamba_attn.images import SAMPLES
        >>> request = Request(load("vim_digits", weights="demo"), open_data(str(SAMPLES)), limit=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     collect(request, f"{folder}/store").counted
        1
    """
    if not isinstance(request, Request):
        raise TypeError(
            f"analytics.collect({type(request).__name__}, ...): expected a Request; mamba_attn.collect(model, data, "
            "store) takes a model."
        )
    wanted = request.wanted
    if not wanted:
        raise ValueError(f"data={request.data.name!r}: it holds no images.")
    layers = describe(request)
    size = request.batch or batch_size(layers)
    require_memory(layers, request.routes, size)
    why = "asked for" if request.batch else f"the largest layer has {max(layer.tokens for layer in layers)} tokens"
    decided("collect: batches of %d images (%s), %d threads", size, why, torch.get_num_threads())
    with folder_for(out) as folder, locked(folder):
        new = is_new(folder)
        index = _index(request, layers) if new else _continued(folder, request, layers)
        before, asked = len(index.images), index.wanted
        index.wanted = max(len(wanted), before + len(index.unreadable))
        try:
            Run(request, StoreWriter(folder, index, new), size, advance).go(wanted)
        finally:
            if not index.statistics:  # nothing was counted: leave nothing behind
                discard(folder)
        if len(index.images) == before and index.wanted != asked:
            index.write(folder)
    return Collected(len(index.images) - before, len(index.images), dict(index.unreadable))


def _index(request: Request, layers: list[StoredLayer]) -> Index:
    subject, data = request.subject, request.data
    weights = subject.weights
    model = {
        "name": subject.name,
        "spec": subject.spec,
        "head": subject.head,
        "stand_ins": subject.stand_ins,
        "options": dict(subject.options),
        "fingerprint": subject.fingerprint,
        "weights": str(Path(weights).resolve()) if Path(weights).is_file() else weights,
    }
    return Index(
        model,
        list(subject.classes),
        subject.transform.as_dict(),
        [{"name": data.name, "identity": data.identity}],
        request.routes,
        request.kept,
        layers,
        command=request.command,
    )


def _continued(folder: Path, request: Request, layers: list[StoredLayer]) -> Index:
    """Return the index of an existing store, if it is of the same model and images."""
    index = Index.read(folder)
    subject, data = request.subject, request.data
    same = len(layers) == len(index.layers) and all(map(StoredLayer.same_as, layers, index.layers))
    size = list(index.transform.get("size", ()))
    there = {
        "model": (f"{index.model['name']} with weights {index.model['fingerprint']}",
                  f"{subject.name} with weights {subject.fingerprint}"),
        "images": (" and ".join(each["name"] for each in index.data), data.name),
        "keep": (index.keep, request.kept), "routes": (index.routes, request.routes),
        "size of images": (size, list(subject.transform.size)),
    }  # fmt: skip
    for what, (found, asked) in there.items():
        if found != asked:
            if what in ("keep", "routes"):
                found, asked = f"{what}={found!r}", f"{what}={asked!r}"
            else:
                found = f"{what} {found}"
            raise StoreError(
                f"{folder}: this store is of {found}, not {asked}; nothing was changed. Choose another folder."
            )
    if [each["identity"] for each in index.data] != [data.identity]:
        raise StoreError(
            f"{folder}: {data.name} is not the file or folder that this store was collected from; nothing "
            "was changed. Choose another folder."
        )
    if not same:
        raise StoreError(
            f"{folder}: this store is of other layers, orders or grids of this model; nothing was "
            "changed. Choose another folder."
        )
    return index


class Run:
    """Collects the images of a request that a store does not count yet.

    Args:
        request: what to collect.
        writer: of the store.
        size: images per batch.
        advance: called with the images that are done, and those that are wanted.
    """

    def __init__(self, request: Request, writer: StoreWriter, size: int, advance: Callable[[int, int], None]) -> None:
        self.request, self.writer, self.size, self.advance = request, writer, size, advance
        self.index = writer.index
        self.statistics = writer.statistics()
        self.pending: list[StoredImage] = []
        self.model_class = class_indices(request.data, request.subject)
        self.done = 0

    def go(self, wanted: Sequence[int]) -> None:
        """Collect all these images."""
        items = self.request.data.items
        known = {image.key for image in self.index.images} | set(self.index.unreadable)
        left = [number for number in wanted if items[number].key not in known]
        self.done = len(wanted) - len(left)
        self.advance(self.done, len(wanted))
        last, took = time.monotonic(), 0.0
        for samples in self._batches(left):
            self._count(samples)
            self.advance(self.done, len(wanted))
            now = time.monotonic()
            if self.pending and now - last >= max(self.request.interval, _CHECKPOINT_SHARE * took):
                self._checkpoint()
                last = time.monotonic()
                took = last - now
        if self.pending or not self.statistics.count:
            self._checkpoint()
        elif left:  # unreadable ones alone
            self.index.write(self.writer.folder)
        self.advance(self.done, len(wanted))

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[Sample]]:
        """Yield readable images in batches."""
        samples: list[Sample] = []
        for number in numbers:
            self.done += 1
            try:
                samples.append(self.request.data.load(number, self.request.subject.transform))
            except image_files.ImageError as error:
                self.index.unreadable[self.request.data.items[number].key] = str(error)
            if len(samples) == self.size:
                yield samples
                samples = []
        if samples:
            yield samples

    def _count(self, samples: Sequence[Sample]) -> None:
        """Count images; list an image as unusable if the model returns NaN for it alone."""
        try:
            found, logits = self._forward(np.stack([sample.pixels for sample in samples]))
        except NonFiniteError as error:
            if len(samples) == 1:
                self.index.unreadable[samples[0].key] = str(error)
            else:
                for sample in samples:
                    self._count([sample])
            return
        start = len(self.index.images) + len(self.pending)
        kept = [at for at, sample in enumerate(samples) if self.index.keeps(start + at, sample.key)]
        for number, layer in enumerate(found.layers):
            self._count_layer(number, layer, start, kept)
        self.writer.add_pixels(start, np.stack([sample.pixels for sample in samples]))
        self.statistics.count += len(samples)
        self.pending += self._named(samples, logits, start)

    @torch.no_grad()
    def _forward(self, pixels: np.ndarray) -> tuple[Trace, Tensor | None]:
        """Run the traced pass and check that everything it holds is finite."""
        subject, request = self.request.subject, self.request
        fused = "mean" if request.routes == "sum" else None
        layout = subject.layout if request.layout is None else request.layout
        given: dict[str, Any] = {"layers": request.layers, "layout": layout, "orders": request.orders}
        with trace(subject.model, attention=fused, **given) as found:
            logits = subject.logits(subject.transform.normalise(pixels).to(subject.device))
        for layer in found.layers:
            layer.require_finite()
        return found, logits

    @torch.no_grad()
    def _count_layer(self, number: int, layer: Layer, start: int, kept: Sequence[int]) -> None:
        own, before = self.statistics.layers[number], self.statistics.count
        total: Tensor | None = None
        if isinstance(layer, ScanLayer):
            for name in own.routes:
                if name != "sum":
                    matrix = layer.attention(routes=int(name)).cpu()
                    self._take(own, number, name, matrix, start, kept)
                    total = matrix if total is None else total.add_(matrix)
            own.update_moments(state_moments(layer.scan), before, layer.batch)
        total = layer.attention().cpu() if total is None else total
        self._take(own, number, "sum", total, start, kept)
        self.writer.add_rows(start, number, self._features(number, total))

    def _take(
        self, own: LayerStatistics, number: int, route: str, matrix: Tensor, start: int, kept: Sequence[int]
    ) -> None:
        own.routes[route].update(matrix, self.statistics.count)
        for at in kept:
            self.writer.write_matrix(start + at, number, route, matrix[at].numpy())

    def _features(self, number: int, matrices: Tensor) -> np.ndarray:
        """Return (images, features) of the summed matrices, as stored on disk."""
        layer = self.index.layers[number]
        if not layer.exact:
            return np.stack([project(matrix) for matrix in matrices.numpy()])
        largest = float(matrices.abs().max())
        if not self.index.images and not self.pending:
            layer = self.index.layers[number] = replace(layer, scale=power_of_two(largest))
        if largest * layer.scale > _LARGEST_HALF:
            raise StoreError(
                f"{layer.name}: its attention is {largest * layer.scale:,.0f} times as large as in the first images, "
                "more than the store's features can hold; collect these images into a separate folder."
            )
        return (matrices.flatten(1) * layer.scale).half().numpy()

    def _named(self, samples: Sequence[Sample], logits: Tensor | None, start: int) -> list[StoredImage]:
        classes, names = self.request.data.classes, self.request.subject.classes
        predicted = logits.argmax(1).tolist() if names and logits is not None else [None] * len(samples)
        images = []
        for row, (sample, best) in enumerate(zip(samples, predicted, strict=True), start):
            known = None if sample.label is None or not classes else self.model_class[sample.label]
            label = None if sample.label is None or not classes else classes[sample.label]
            images.append(
                StoredImage(
                    sample.key,
                    label if known is None else names[known],
                    None if best is None else names[best],
                    None if known is None or best is None else known == best,
                    self.index.keeps(row, sample.key),
                    row,
                )
            )
        return images

    def _checkpoint(self) -> None:
        if not self.statistics.count:
            reasons = list(self.index.unreadable.values())
            raise StoreError(
                f"none of the {self.done} images of {self.request.data.name} could be used; first reason: {reasons[0]}"
            )
        self.writer.checkpoint(self.pending, self.statistics)
        self.pending = []


def batch_size(layers: Sequence[StoredLayer]) -> int:
    """Return the batch size that the matrices of the largest layer allow.

    Args:
        layers: whose attention is collected.
    """
    largest = max(layer.tokens for layer in layers) ** 2
    return max(1, min(_LARGEST_BATCH, _BATCH_ENTRIES // largest))


def require_memory(layers: Sequence[StoredLayer], routes: str, batch: int) -> None:
    """Refuse statistics that would not fit into memory, before allocating anything.

    Args:
        layers: whose attention is collected.
        routes: "each" or "sum".
        batch: images at once.

    Raises:
        MatrixTooLargeError: they would not fit; the message says what would.
    """
    needed = _bytes(layers, routes, batch)
    free = free_bytes(torch.device("cpu")) if needed > _UNASKED else None
    if free is None or needed + _RESERVE <= free:
        return
    free = max(0, free - _RESERVE)
    largest = max(layers, key=lambda layer: layer.tokens)
    raise MatrixTooLargeError(
        f"means and variances of {len(layers)} layers (the largest, {largest.name}: {largest.routes} routes, "
        f"{largest.tokens} x {largest.tokens}) need {needed:,} bytes, {free:,} are free. "
        f"{_what_fits(layers, routes, batch, free)}"
    )


def _bytes(layers: Sequence[StoredLayer], routes: str, batch: int) -> int:
    running = sum(
        len(route_names(layer, routes)) * 16 * layer.tokens**2
        + (0 if layer.moments is None else 16 * layer.moments[0] * layer.moments[1] * layer.moments[2])
        for layer in layers
    )
    projections = sum(8 * tokens**2 for tokens in {layer.tokens for layer in layers if not layer.exact})
    return running + projections + max(batch * 12 * layer.tokens**2 for layer in layers)


def _what_fits(layers: Sequence[StoredLayer], routes: str, batch: int, free: int) -> str:
    """Describe the nearest smaller calls that would fit."""
    found = []
    if batch > 1 and _bytes(layers, routes, 1) <= free:
        found.append("batch=1")
    if routes == "each" and _bytes(layers, "sum", batch) <= free:
        found.append("routes='sum'")
    for choice in dict.fromkeys((routes, "sum")):
        small = _fitting(layers, choice, free)
        if small:
            first = "batch=1 " + ("routes='sum' " if choice != routes else "")
            found.append(f"{first}layers={[layer.name for layer in small]}")
    rows = "Rows and columns take linear memory: trace(model), then layer.row(token), layer.column(token)."
    return f"What would fit: {'; or '.join(found)}. {rows}" if found else f"None of the layers would fit. {rows}"


def _fitting(layers: Sequence[StoredLayer], routes: str, free: int) -> list[StoredLayer]:
    """Return the smallest layers that fit together, in execution order; never all layers."""
    small: list[StoredLayer] = []
    for layer in sorted(layers, key=lambda layer: layer.tokens):
        if _bytes([*small, layer], routes, 1) > free:
            break
        small.append(layer)
    return [layer for layer in layers if layer in small] if len(small) < len(layers) else []
