"""Is PCA needed before t-SNE and UMAP? Embeddings of the demo models' attention with and without it.

``python benchmarks/run.py embed --data FOLDER`` measures; ``python benchmarks/embedding.py`` writes the answer in
docs/exploring.md from results/embed.json.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import numpy as np

from benchmarks.cases import EXPLAINED
from benchmarks.marked_pages import filled
from benchmarks.measure import Spread
from benchmarks.neighbours import PcaCheck, pca_check
from benchmarks.report import Figure, figure
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.analytics.request import describe
from mamba_attn.datasets import open_data
from mamba_attn.datasets.loading import load

PAGE = Path(__file__).parents[1] / "docs" / "exploring.md"
RESULTS = Path(__file__).parent / "results" / "embed.json"
METHODS = ("tsne", "umap")
SEEDS = (0, 1, 2)
POINTS = 600


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which images."""
    parser.add_argument("--data", required=True, metavar="DIR|ZIP[:PART]", help=f"at least {POINTS} images")


def partial(_: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return False


def features(name: str, data: str, points: int) -> np.ndarray:
    """The summed matrix of every block and image as one row, (points, features); blocks of the finest grid alone.

    Args:
        name: of a demo model.
        data: the images.
        points: blocks x images.
    """
    request = Request(load(name, "demo"), open_data(data), 1, routes="sum")
    layers = describe(request)
    finest = [layer.name for layer in layers if layer.tokens == max(each.tokens for each in layers)]
    request = dataclasses.replace(request, limit=points // len(finest), layers=finest)
    with tempfile.TemporaryDirectory() as folder:
        collect(request, Path(folder) / "store")
        store = AttentionStore.open(Path(folder) / "store")
        return np.concatenate([store.features(layer) for layer in store.layers])


def run_embed(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """What PCA adds to every model's embeddings."""
    points, first, options = (24, 5, {"count": 4}) if args.quick else (POINTS, 100, {})
    figures: list[Figure] = []
    details: dict[str, Any] = {"how": __doc__, "points": points}
    for name in EXPLAINED:
        values = features(name, args.data, points)
        for method in METHODS:
            found = pca_check(values, method, first=first, seeds=SEEDS, unit_norm=True, **options)
            details[f"{name}, {method}"] = {**dataclasses.asdict(found), "needed": found.needed}
            how = f"{name}, {method}"
            figures += [figure(f"embed {measure}", how, _gain(found, measure)) for measure in ("trust", "overlap")]
            figures.append(figure("embed kept", how, found.kept))
    return figures, details


def _gain(found: PcaCheck, measure: str) -> Spread:
    values = {"trust": found.trustworthiness, "overlap": found.overlap}[measure]
    return Spread.of(np.subtract(values["with"], values["without"]).tolist())


def answer(results: dict[str, Any]) -> str:
    """Return the answer as a table and a sentence.

    Args:
        results: contents of embed.json.
    """
    details = results["details"]
    checks = {how: its for how, its in details.items() if isinstance(its, dict)}
    lines = [
        "| model, method | trustworthiness, with PCA / without | neighbours kept, with / without | needed |",
        "|---|---|---|---|",
    ]
    for how, its in checks.items():
        cells = (
            " / ".join(f"{np.mean(its[measure][name]):.3f}" for name in ("with", "without"))
            for measure in ("trustworthiness", "overlap")
        )
        lines.append(f"| {how} | {' | '.join(cells)} | {'yes' if its['needed'] else 'no'} |")
    needed = sum(its["needed"] for its in checks.values())
    kept = [its["kept"] for its in checks.values()]
    words = f"Needed in {needed} of {len(checks)} cases" if needed else "Not needed in any of these cases"
    return "\n".join(
        [
            *lines,
            "",
            f"{words}: {details['points']} points of unit norm, means over {len(SEEDS)} seeds; "
            "'needed' means PCA improved trustworthiness for every seed and neighbour overlap on average. "
            f"The 100 components themselves keep {min(kept):.0%} to {max(kept):.0%} of the 12 nearest "
            "neighbours.",
        ]
    )


PARTS = {"pca first": answer}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), PARTS, json.loads(RESULTS.read_text())))
