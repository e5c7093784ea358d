"""The loop over images: read, trace, count, and now and then a checkpoint."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mamba_attn import images as image_files
from mamba_attn.analytics._writer import StoreWriter
from mamba_attn.analytics.index import StoredImage
from mamba_attn.analytics.projection import power_of_two, project
from mamba_attn.analytics.request import Request
from mamba_attn.analytics.state_moments import state_moments
from mamba_attn.analytics.statistics import LayerStatistics
from mamba_attn.datasets import Sample, class_indices
from mamba_attn.errors import NonFiniteError, StoreError
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.tracer import Trace, trace

_LARGEST_HALF = 65504.0
_CHECKPOINT_SHARE = 10  # between checkpoints ten times as long as one takes


class Run:
    """The images of a request that a store does not count yet.

    Args:
        request: what is collected.
        writer: of the store.
        size: images at once.
        advance: called with the images that are done, and those that are wanted.
    """

    def __init__(
        self, request: Request, writer: StoreWriter, size: int, advance: Callable[[int, int], None]
    ) -> None:  # fmt: skip
        self.request, self.writer, self.size, self.advance = request, writer, size, advance
        self.index = writer.index
        self.statistics = writer.statistics()
        self.pending: list[StoredImage] = []
        self.model_class = class_indices(request.data, request.subject)
        self.done = 0

    def go(self, wanted: Sequence[int]) -> None:
        """Count everything that is wanted."""
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
        """Readable images, so many at a time."""
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
        """Count images, or list them as unusable when the model makes NaN of one alone."""
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
    def _forward(self, pixels: np.ndarray) -> tuple[Trace, Tensor]:
        """The traced pass; whatever it holds is finite."""
        subject, request = self.request.subject, self.request
        fused = "mean" if request.routes == "sum" else None
        with trace(subject.model, layers=request.layers, attention=fused) as found:
            logits = subject.model(image_files.normalise(pixels).to(subject.device))
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
    ) -> None:  # fmt: skip
        own.routes[route].update(matrix, self.statistics.count)
        for at in kept:
            self.writer.write_matrix(start + at, number, route, matrix[at].numpy())

    def _features(self, number: int, matrices: Tensor) -> np.ndarray:
        """(images, features) of the summed matrices, as they stand on the disk."""
        layer = self.index.layers[number]
        if not layer.exact:
            return np.stack([project(matrix) for matrix in matrices.numpy()])
        largest = float(matrices.abs().max())
        if not self.index.images and not self.pending:
            layer = self.index.layers[number] = replace(layer, scale=power_of_two(largest))
        if largest * layer.scale > _LARGEST_HALF:
            raise StoreError(
                f"{layer.name}: its attention is {largest * layer.scale:,.0f} times as large as in the first images, "
                "more than the store's features hold; collect these images into a folder of their own."
            )
        return (matrices.flatten(1) * layer.scale).half().numpy()

    def _named(self, samples: Sequence[Sample], logits: Tensor, start: int) -> list[StoredImage]:
        classes, names = self.request.data.classes, self.request.subject.classes
        likeliest = logits.argmax(1).tolist() if names and logits.ndim == 2 else [None] * len(samples)
        images = []
        for row, (sample, best) in enumerate(zip(samples, likeliest, strict=True), start):
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
                f"none of the {self.done} images of {self.request.data.name} could be used; the first: {reasons[0]}"
            )
        self.writer.checkpoint(self.pending, self.statistics)
        self.pending = []
