"""The numbers of one model: every finding of every block, stage and of the model, per image or group of images."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mamba_attn.analytics.index import StoredLayer
from mamba_attn.analytics.places import LocalPlace
from mamba_attn.analytics.projection import SIZE, project
from mamba_attn.findings import formulas
from mamba_attn.findings import registry as findings
from mamba_attn.findings.formulas import Rows, shares_of
from mamba_attn.findings.places import Places, places_of

MOST_ROWS = 1024  # patches whose rows are compared; larger grids are sampled
MOST_POINTS = 500  # images of which each block keeps a point; the first ones
MODEL = "model"


@dataclass(eq=False)
class Measured:
    """The numbers of one model, possibly with its patches' places shuffled.

    Args:
        values: (units,) by (finding, place): images or groups, NaN where undefined. A place is a layer's name,
            "stage 0" or "model".
    """

    values: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the numbers to a file in one step.

        Args:
            path: of the file.

        Raises:
            OSError: it cannot be written.
        """
        names = json.dumps([*map(list, self.values)])
        arrays = {str(number): values for number, values in enumerate(self.values.values())}
        file = io.BytesIO()
        np.savez(file, names=np.array(names), **arrays)  # type: ignore[arg-type]
        LocalPlace(path.parent).replace(path.name, file.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Measured | None":
        """Return what was saved; None if the file is missing or damaged."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                names = [tuple(each) for each in json.loads(str(found["names"]))]
                return cls({(name, place): found[str(number)] for number, (name, place) in enumerate(names)})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return None


class Block:
    """Accumulates the matrices of one layer, batch by batch, or part by part; memory does not grow with the images.

    Args:
        layer: the layer.
        images: how many will be added, to this block and to those that are merged with it.
        shuffle: also measure with the patches' places shuffled by this seed. None: do not.
    """

    def __init__(self, layer: StoredLayer, images: int, shuffle: int | None = None) -> None:
        self.layer = layer
        self.patches = layer.layout.patches.numpy()
        count = len(self.patches)
        self.points = np.arange(count)
        if count > MOST_ROWS:
            self.points = np.sort(np.random.default_rng(0).choice(count, MOST_ROWS, replace=False))
        self.places: dict[bool, Places] = {False: places_of(layer)}
        if shuffle is not None:
            self.places[True] = self.places[False].shuffled(shuffle)
        self.groups = min(findings.GROUPS, images)
        self.sums = np.zeros((self.groups, len(self.points), count), np.float32)
        self.counts = np.zeros(self.groups)
        self.features: list[np.ndarray] = []  # of the first images
        self.spread = formulas.Spread(images)
        self.values: dict[tuple[str, bool], list[np.ndarray]] = {
            (each.name, shuffled): [] for each in findings.of_kind("matrix") for shuffled in self.places
        }

    def add(self, start: int, matrices: np.ndarray) -> None:
        """Add images.

        Args:
            start: the first one's number.
            matrices: (images, tokens, tokens) float32.
        """
        self.add_features(start, np.stack([compact(matrix) for matrix in matrices]))
        between = matrices[:, self.patches[:, None], self.patches]
        for number, matrix in enumerate(between, start):
            self.sums[number % self.groups] += matrix[self.points]
            self.counts[number % self.groups] += 1
        if len(self.patches) < 2:  # nothing is between patches
            return
        shares = shares_of(between)
        for each in findings.of_kind("matrix"):
            for shuffled, places in self.places.items():
                self.values[each.name, shuffled].append(each.function(shares, places))

    def add_features(self, start: int, features: np.ndarray) -> None:
        """Add images of which only their features are known.

        Args:
            start: the first one's number.
            features: (images, features) as ``compact`` returns them.
        """
        self.spread.add(start, features)
        if start < MOST_POINTS:
            self.features.append(features[: MOST_POINTS - start])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything that was added, for ``merge``."""
        values = {f"{name} {shuffled:d}": np.concatenate(its) for (name, shuffled), its in self.values.items() if its}
        spread = {"spread counts": self.spread.counts, "spread squares": self.spread.squares}
        spread |= {} if self.spread.sums is None else {"spread sums": self.spread.sums}
        features = {"features": np.concatenate(self.features)} if self.features else {}
        return {"sums": self.sums, "counts": self.counts, **spread, **features, **values}

    def merge(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add what another block of this layer has of the images that come next.

        Args:
            arrays: of that block.
        """
        self.sums += arrays["sums"]
        self.counts += arrays["counts"]
        self.spread.merge(arrays["spread counts"], arrays["spread sums"], arrays["spread squares"])
        if "features" in arrays:
            self.features.append(arrays["features"])
        for (name, shuffled), its in self.values.items():
            if (kept := arrays.get(f"{name} {shuffled:d}")) is not None:
                its.append(kept)

    @property
    def means(self) -> np.ndarray:
        """(groups, points, n) mean matrices of the groups."""
        return self.sums / np.maximum(self.counts, 1)[:, None, None]

    @property
    def diagonal(self) -> np.ndarray:
        """Whether an entry lies on the matrix's diagonal, (points, n)."""
        return np.asarray(self.points[:, None] == np.arange(len(self.patches)))

    def results(self) -> dict[bool, dict[str, np.ndarray]]:
        """Return the numbers of the block's findings, and those with shuffled places if requested."""
        found: dict[bool, dict[str, np.ndarray]] = {shuffled: {} for shuffled in self.places}
        for (name, shuffled), values in self.values.items():
            if values:
                found[shuffled][name] = np.concatenate(values).astype(np.float64)
        if len(self.patches) >= findings.LEAST and self.counts.any():
            for shuffled, its in self.row_results(self.means).items():
                found[shuffled] |= its
        if self.features:
            for each in findings.of_kind("features"):
                found[False][each.name] = each.function(self.spread)
        return found

    def row_results(self, means: np.ndarray) -> dict[bool, dict[str, np.ndarray]]:
        """Return the findings about rows.

        Args:
            means: (groups, points, n) mean matrices.
        """
        rows = [Rows(mean) for mean in means]
        found: dict[bool, dict[str, np.ndarray]] = {}
        for shuffled, places in self.places.items():
            own = places.taken(self.points) if len(self.points) < len(places) else places
            found[shuffled] = {
                each.name: np.array([each.function(each_rows, own) for each_rows in rows])
                for each in findings.of_kind("rows")
            }
        return found


def compact(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix as at most 4,096 numbers, float32: as it is, or a projection that keeps distances.

    Args:
        matrix: (tokens, tokens).
    """
    return project(matrix) if matrix.size > SIZE else matrix.astype(np.float32).reshape(-1)


def gathered(blocks: Sequence[Block]) -> list[Measured]:
    """Return the numbers of a model, and those with shuffled places if requested.

    Args:
        blocks: with all images added, in execution order.
    """
    results = {block.layer.name: block.results() for block in blocks}
    found = [
        Measured({(name, place): values for place, its in results.items() for name, values in its[shuffled].items()})
        for shuffled in blocks[0].places
    ]
    each = {place: its[False] for place, its in results.items()}
    for number in sorted({block.layer.stage for block in blocks}):
        own = [block for block in blocks if block.layer.stage == number]
        if len({len(block.patches) for block in own}) == 1 and all(block.features for block in own):
            found[0].values |= _stage(own, each, f"stage {number}")
    for finding in findings.of_kind("depth"):
        values = [its[finding.source] for its in each.values() if finding.source in its]
        whole = finding.source == "image_share" or all(block.counts.any() for block in blocks)
        if values and whole and len({len(its) for its in values}) == 1:
            found[0].values[finding.name, MODEL] = formulas.by_depth(np.stack(values))
    return found


def _stage(
    blocks: Sequence[Block], each: dict[str, dict[str, np.ndarray]], place: str
) -> dict[tuple[str, str], np.ndarray]:
    known = [each[block.layer.name]["distance"] for block in blocks if "distance" in each[block.layer.name]]
    stage = formulas.Stage(
        [np.concatenate(block.features) for block in blocks],
        [block.means for block in blocks] if all(block.counts.any() for block in blocks) else [],
        blocks[0].diagonal,
        known if len(known) == len(blocks) else [],
    )
    return {(finding.name, place): finding.function(stage) for finding in findings.of_kind("blocks")}
