"""One part: its images through the traced model, into the arrays and statistics of one folder.

Nothing here depends on other parts, on ranks or on earlier calls: the same part is the same bits, whoever makes it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamba_attn.analytics.index import StoredImage
from mamba_attn.analytics.part_writer import PartWriter, route_names
from mamba_attn.analytics.projection import power_of_two, project_all
from mamba_attn.analytics.request import Request
from mamba_attn.analytics.statistics import LayerStatistics, Statistics, state_moments
from mamba_attn.datasets import class_indices
from mamba_attn.datasets.decoding import Decoded, decoded
from mamba_attn.errors import NonFiniteError
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.tracer import Trace, trace


class PartRun:
    """Collects the images of one part.

    Args:
        request: what to collect.
        writer: of the part.
        advance: called with the number of images that were done, after every batch.
    """

    def __init__(self, request: Request, writer: PartWriter, advance: Callable[[int], None]) -> None:
        self.request, self.writer, self.advance = request, writer, advance
        self.index = writer.index
        self.statistics = empty_statistics(self.index.layers, self.index.routes, request.subject.device)
        self.images: list[StoredImage] = []
        self.unreadable: dict[str, str] = {}
        self.model_class = class_indices(request.data, request.subject)

    def go(self) -> None:
        """Collect all images of the part."""
        done = 0
        for samples, tried in self._batches():
            if samples:
                self._count(samples)
            self.advance(tried - done)
            done = tried

    def _batches(self) -> Iterator[tuple[list[Decoded], int]]:
        """Yield readable images in batches, with the number of images tried so far."""
        request, samples, tried = self.request, [], 0
        numbers = request.wanted[self.writer.start : self.writer.stop]
        for sample in decoded(request.data, numbers, request.subject.transform, request.workers_or_default):
            tried += 1
            if isinstance(sample.pixels, str):
                self.unreadable[sample.key] = sample.pixels
            else:
                samples.append(sample)
            if len(samples) == self.index.batch:
                yield samples, tried
                samples = []
        yield samples, tried

    def _count(self, samples: Sequence[Decoded]) -> None:
        """Count images; list an image as unusable if the model returns NaN for it alone."""
        pixels = np.stack([np.asarray(sample.pixels) for sample in samples])
        try:
            found, logits = self._forward(pixels)
        except NonFiniteError as error:
            if len(samples) == 1:
                self.unreadable[samples[0].key] = str(error)
            else:
                for sample in samples:
                    self._count([sample])
            return
        start = self.writer.start
        kept = [at for at, sample in enumerate(samples) if self.index.keeps(start + sample.place, sample.key)]
        first = sum(sample.place < self.writer.featured for sample in samples)  # they come in order
        scales = np.ones((len(samples), len(found.layers)), np.float32)
        for number, layer in enumerate(found.layers):
            scales[:, number] = self._count_layer(number, layer, kept, first)
        if first:
            self.writer.add("scales", scales[:first])
            self.writer.add("pixels", pixels[:first])
        self.statistics.count += len(samples)
        self.images += self._named(samples, logits, kept)

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
    def _count_layer(self, number: int, layer: Layer, kept: Sequence[int], first: int) -> np.ndarray | float:
        """Count a layer where its matrices are; write the first images' features, and return all images' scales."""
        own, before = self.statistics.layers[number], self.statistics.count
        total: Tensor | None = None
        if isinstance(layer, ScanLayer):
            for name in own.routes:
                if name != "sum":
                    matrix = layer.attention(routes=int(name))
                    self._take(own, number, name, matrix, kept)
                    total = matrix if total is None else total.add_(matrix)
            own.update_moments(state_moments(layer.scan), before, layer.batch)
        total = layer.attention() if total is None else total
        self._take(own, number, "sum", total, kept)
        if not first:
            return 1.0
        features, scales = self._features(number, total)  # of all: on the batch depend the last digits
        self.writer.add(f"features/{number:03d}", features[:first])
        return scales

    def _take(self, own: LayerStatistics, number: int, route: str, matrix: Tensor, kept: Sequence[int]) -> None:
        own.routes[route].update(matrix, self.statistics.count)
        for at in kept:
            self.writer.write_matrix(len(self.images) + at, number, route, matrix[at].cpu().numpy())

    def _features(self, number: int, matrices: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return (images, features) of the summed matrices, as stored, and what each image's are multiplied with."""
        if not self.index.layers[number].exact:
            return project_all(matrices), np.ones(len(matrices), np.float32)
        flat = matrices.flatten(1)
        largest = flat.abs().amax(1).cpu().tolist()
        scales = np.array([power_of_two(each) for each in largest], np.float32)
        scaled = flat * torch.from_numpy(scales).to(flat.device)[:, None]
        return scaled.half().cpu().numpy(), scales

    def _named(self, samples: Sequence[Decoded], logits: Tensor | None, kept: Sequence[int]) -> list[StoredImage]:
        classes, names = self.request.data.classes, self.request.subject.classes
        predicted = logits.argmax(1).tolist() if names and logits is not None else [None] * len(samples)
        images = []
        for at, (sample, best) in enumerate(zip(samples, predicted, strict=True)):
            known = None if sample.label is None or not classes else self.model_class[sample.label]
            label = None if sample.label is None or not classes else classes[sample.label]
            images.append(
                StoredImage(
                    sample.key,
                    label if known is None else names[known],
                    None if best is None else names[best],
                    None if known is None or best is None else known == best,
                    at in kept,
                    len(self.images) + at,
                )
            )
        return images


def empty_statistics(layers: Sequence[Any], routes: str, device: torch.device | str = "cpu") -> Statistics:
    """Return the statistics of no images.

    Args:
        layers: of the store.
        routes: "each" or "sum".
        device: where the matrices will be.
    """
    return Statistics(
        [LayerStatistics.zeros(route_names(layer, routes), layer.tokens, layer.moments, device) for layer in layers]
    )
