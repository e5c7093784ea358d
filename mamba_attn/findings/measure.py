"""Measures all findings in one pass over a store's pictures, or over the matrices that the store kept."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mamba_attn.analytics.index import StoredLayer
from mamba_attn.analytics.request import described
from mamba_attn.analytics.sizes import batch_size
from mamba_attn.analytics.store import AttentionStore
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.findings import registry as findings
from mamba_attn.findings.results import Block, Measured, gathered
from mamba_attn.tracing.tracer import trace

SHUFFLE = 0  # seed of shuffled places
Advance = Callable[[], None]


class Measuring:
    """Measures models on the images of a store; results are cached in a folder.

    Args:
        store: the store with the images.
        count: number of first images to use.
        folder: where numbers are kept; a killed call resumes from it.
        advance: called after every image of every model.
    """

    def __init__(self, store: AttentionStore, count: int, folder: Path, advance: Advance = lambda: None) -> None:
        self.store, self.count, self.folder, self.advance = store, count, folder, advance
        self.names = [layer.name for layer in store.layers]
        keys = [image.key for image in store.images[:count]]
        self._images = json.dumps([keys, store.index.data, vars(store.transform)], default=str)

    def model(self, subject: LoadedModel, shuffled: bool = False) -> list[Measured]:
        """Return the numbers of a model, and those with the patches' places shuffled if requested.

        Args:
            subject: the model; it sees what the store's model saw.
            shuffled: also measure with shuffled places.

        Raises:
            NonFiniteError: its attention contains NaN or Inf.
            OSError: the folder cannot be written.
        """
        options = [subject.name, subject.fingerprint, dict(subject.options), self.names]
        known = self._known("model", options, shuffled)
        if known is not None:
            return known
        layers = described(subject, self.names)
        blocks = [Block(layer, self.count, SHUFFLE if shuffled else None) for layer in layers]
        size = batch_size(layers)
        for start in range(0, self.count, size):
            self._forward(subject, blocks, start, min(start + size, self.count))
        return self._keep(gathered(blocks), "model", options)

    def kept(self) -> list[Measured]:
        """Return the numbers of the store's model that its stored matrices give, and those with shuffled places.

        Of layers whose matrices it holds as projections alone, findings of rows come from the mean over all images and
        have no interval; those that need every matrix are missing.
        """
        options = [self.store.index.model["fingerprint"], self.names]
        known = self._known("kept", options, True)
        if known is not None:
            return known
        blocks = [Block(layer, self.count, SHUFFLE) for layer in self.store.layers]
        for block in blocks:
            self._from_store(block)
            self.advance()
        found = gathered(blocks)
        for block in blocks:
            if not block.layer.exact and len(block.patches) >= findings.LEAST:
                mean = self.store.mean(block.layer)[block.patches[block.points]][:, block.patches]
                for own, rows in zip(found, block.row_results(mean[None]).values(), strict=True):
                    own.values |= {(name, block.layer.name): values for name, values in rows.items()}
        return self._keep(found, "kept", options)

    @property
    def projected(self) -> list[StoredLayer]:
        """Return layers of which the store has no exact matrices."""
        return [layer for layer in self.store.layers if not layer.exact]

    def _from_store(self, block: Block) -> None:
        layer, size = block.layer, batch_size([block.layer])
        for start, rows in self.store.feature_rows(layer, size):
            rows = rows[: max(0, self.count - start)]
            if not len(rows):
                break
            if layer.exact:
                block.add(start, rows.reshape(-1, layer.tokens, layer.tokens))
            else:
                block.features.append(rows)

    @torch.no_grad()
    def _forward(self, subject: LoadedModel, blocks: Sequence[Block], start: int, stop: int) -> None:
        pixels = np.stack([self.store.pixels(number) for number in range(start, stop)])
        with trace(subject.model, layers=self.names, attention="mean", layout=subject.layout) as found:
            subject.model(subject.transform.normalise(pixels).to(subject.device))
        for block in blocks:
            layer = found[block.layer.name]
            layer.require_finite()
            block.add(start, layer.attention().float().cpu().numpy())
        for _ in range(start, stop):
            self.advance()

    def _path(self, how: str, about: Sequence[object], which: int) -> Path:
        text = json.dumps([findings.VERSION, how, self.count, self._images, about], sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}-{which}.npz"

    def _known(self, how: str, about: Sequence[object], shuffled: bool) -> list[Measured] | None:
        found = [Measured.load(self._path(how, about, which)) for which in range(2 if shuffled else 1)]
        if any(each is None for each in found):
            return None
        steps = self.count if how == "model" else len(self.names)
        for _ in range(steps):
            self.advance()
        return [each for each in found if each is not None]

    def _keep(self, found: list[Measured], how: str, about: Sequence[object]) -> list[Measured]:
        self.folder.mkdir(parents=True, exist_ok=True)
        for which, each in enumerate(found):
            each.save(self._path(how, about, which))
        return found
