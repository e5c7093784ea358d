"""Measures all findings in one pass over a store's pictures, or over the matrices that the store kept.

The pass of a model is divided in parts of so many images. What a part adds to each block is saved as soon as it is
measured, by whichever process does it, and merged in the order of the parts: numbers do not depend on who made what,
and memory does not grow with the images.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mamba_attn.analytics.index import StoredLayer
from mamba_attn.analytics.places import LocalPlace
from mamba_attn.analytics.request import described
from mamba_attn.analytics.sizes import batch_size
from mamba_attn.analytics.store import AttentionStore
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.distributed import Ranks
from mamba_attn.errors import MambaAttnError
from mamba_attn.findings import registry as findings
from mamba_attn.findings.results import MOST_POINTS, Block, Measured, gathered
from mamba_attn.tracing.tracer import trace

SHUFFLE = 0  # seed of shuffled places
_PART, _PARTS = 64, 16  # images of a part at least, and parts of a model at most: each holds mean matrices
Advance = Callable[[], None]


class Measuring:
    """Measures models on the images of a store; results are cached in a folder.

    Args:
        store: the store with the images.
        count: number of first images to use, of those that have features and pixels.
        folder: where numbers are kept; a killed call resumes from it.
        advance: called after every image of every model.
        ranks: this process among all that measure into the folder. Default: alone.
        device: where models run. Default: where they are.
    """

    def __init__(
        self,
        store: AttentionStore,
        count: int,
        folder: Path,
        advance: Advance = lambda: None,
        ranks: Ranks | None = None,
        device: str | None = None,
    ) -> None:
        self.store, self.count, self.folder, self.advance = store, count, folder, advance
        self.ranks, self.device = Ranks() if ranks is None else ranks, device
        self.left = 0  # parts that are other processes' to measure
        self.names = [layer.name for layer in store.layers]
        self._rows = store.featured[:count]  # the images that have features and pixels
        keys = [store.image(row).key for row in self._rows]
        self._images = json.dumps([keys, store.index.data, vars(store.transform)], default=str)

    def model(self, subject: LoadedModel, shuffled: bool = False) -> list[Measured]:
        """Return the numbers of a model, and those with the patches' places shuffled if requested.

        Where several processes measure, only one returns them, as soon as all parts are there; else there are none.

        Args:
            subject: the model; it sees what the store's model saw.
            shuffled: also measure with shuffled places.

        Raises:
            NonFiniteError: its attention contains NaN or Inf.
            MambaAttnError: another process could not measure it; as that one says.
            OSError: the folder cannot be written.
        """
        options = [subject.name, subject.fingerprint, dict(subject.options), self.names]
        known = self._known("model", options, shuffled)
        if known is not None:
            return known
        if self.device is not None:
            subject.model.to(self.device)
        layers = described(subject, self.names)
        size = min(batch_size(layers), _PART)
        each = -(-max(_PART, -(-self.count // _PARTS)) // size) * size
        spans = [(start, min(start + each, self.count)) for start in range(0, self.count, each)]
        place, folder = LocalPlace(self.folder), f"{self._path('model', options, int(shuffled)).stem}.parts"

        def whole() -> bool:
            return self._saved("model", options, shuffled) is not None

        def make(number: int) -> None:
            name, (start, stop) = f"{folder}/{number:04d}", spans[number]
            if place.exists(f"{name}.npz") or whole():
                for _ in range(start, stop):
                    self.advance()
                return
            blocks = [Block(layer, self.count, SHUFFLE if shuffled else None) for layer in layers]
            try:
                for at in range(start, stop, size):
                    self._forward(subject, blocks, at, min(at + size, stop))
            except MambaAttnError as error:
                if self.ranks.world == 1:
                    raise
                place.replace(f"{name}.error", str(error).encode())  # the others wait for this part
                return
            place.create(f"{name}.npz", _content(blocks))
            place.remove(f"{name}.error")  # of an earlier run

        def missing() -> int:
            there = {name.partition(".")[0] for name in place.names(folder)}  # a part, or why it failed
            return 0 if len(there) == len(spans) or whole() else len(spans) - len(there)

        left = self.ranks.work(folder, len(spans), make, missing)
        self.left += left
        if left:
            return []
        names = set(place.names(folder))
        for name in sorted(names):
            if name.endswith(".error") and f"{name.removesuffix('.error')}.npz" not in names:  # else of an earlier run
                raise MambaAttnError(place.read(f"{folder}/{name}").decode())
        if not self.ranks.reports:
            return []
        known = self._saved("model", options, shuffled)  # by a job that ended at the same time
        if known is None:
            blocks = [Block(layer, self.count, SHUFFLE if shuffled else None) for layer in layers]
            try:
                for number in range(len(spans)):
                    _merge(blocks, place.read(f"{folder}/{number:04d}.npz"))
            except FileNotFoundError:  # a job that ended at the same time has merged and removed them
                known = self._saved("model", options, shuffled)
                if known is None:
                    raise
                return known
            known = self._keep(gathered(blocks), "model", options)
        place.remove(folder)
        return known

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
                block.add_features(start, rows)

    @torch.no_grad()
    def _forward(self, subject: LoadedModel, blocks: Sequence[Block], start: int, stop: int) -> None:
        pixels = np.stack([self.store.pixels(row) for row in self._rows[start:stop]])
        with trace(subject.model, layers=self.names, attention="mean", layout=subject.layout) as found:
            subject.model(subject.transform.normalise(pixels).to(subject.device))
        for block in blocks:
            layer = found[block.layer.name]
            layer.require_finite()
            block.add(start, layer.attention().float().cpu().numpy())
        for _ in range(start, stop):
            self.advance()

    def _path(self, how: str, about: Sequence[object], which: int) -> Path:
        first = [MOST_POINTS] if self.count > MOST_POINTS else []  # earlier, all images were points
        text = json.dumps([findings.VERSION, how, self.count, self._images, about, *first], sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}-{which}.npz"

    def _known(self, how: str, about: Sequence[object], shuffled: bool) -> list[Measured] | None:
        found = self._saved(how, about, shuffled)
        if found is not None:
            for _ in range(self.count if how == "model" else len(self.names)):
                self.advance()
        return found

    def _saved(self, how: str, about: Sequence[object], shuffled: bool) -> list[Measured] | None:
        found = [Measured.load(self._path(how, about, which)) for which in range(2 if shuffled else 1)]
        return None if any(each is None for each in found) else [each for each in found if each is not None]

    def _keep(self, found: list[Measured], how: str, about: Sequence[object]) -> list[Measured]:
        self.folder.mkdir(parents=True, exist_ok=True)
        for which, each in enumerate(found):
            each.save(self._path(how, about, which))
        return found


def _content(blocks: Sequence[Block]) -> bytes:
    """Return what was added to blocks, as a file."""
    file = io.BytesIO()
    arrays = {f"{at} {key}": each for at, block in enumerate(blocks) for key, each in block.arrays().items()}
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _merge(blocks: Sequence[Block], content: bytes) -> None:
    """Add what a part holds to blocks of the same layers, one layer after another."""
    with np.load(io.BytesIO(content), allow_pickle=False) as found:
        for at, block in enumerate(blocks):
            block.merge({key.partition(" ")[2]: found[key] for key in found.files if key.startswith(f"{at} ")})
