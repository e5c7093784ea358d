"""What film reviews lose when words are replaced by <unk>, those that a method finds important first, or last.

    python benchmarks/run.py text-perturbation --data vaderSentiment-3.3.2.tar.gz

The protocol of MambaLRP's classifiers (arXiv 2406.07592): the probability of the predicted class, averaged over the
part of words that are replaced. It should fall soon when the most relevant words go first (MoRF), and late when they go
last (LeRF); LeRF - MoRF is one number. The last token, from which the class is read, stays.
"""

import argparse
from collections.abc import Callable
from functools import partial as given
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.language import UNKNOWN, reviews
from benchmarks.report import Figure, figure, show
from benchmarks.text_truth import METHODS
from mamba_attn import attribution, models
from mamba_attn.evaluation.intervals import bootstrap, mean
from mamba_attn.evaluation.texts import area, ranked
from mamba_attn.models import registry

SENTENCES, WORDS = 100, (6, 40)
_OCCLUSION: dict[str, Callable[[nn.Module], Any]] = {
    "Occlusion": given(attribution.Occlusion, baselines=UNKNOWN)  # by the same token as here
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the sentences are."""
    parser.add_argument("--data", type=Path, required=True, help="the source package vaderSentiment 3.3.2")


def partial(args: argparse.Namespace) -> bool:
    """Whether something is left out."""
    return False


def run_text_perturbation(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """All methods on sentences that were held out."""
    model, vocabulary = models.create("mamba_reviews", weights="demo"), registry.vocabulary("mamba_reviews")
    held_out = [words for words, _ in reviews(args.data)[:1000] if WORDS[0] <= len(words) <= WORDS[1]]
    texts = [vocabulary.encode(" ".join(words)) for words in held_out[: 4 if args.quick else SENTENCES]]
    with torch.no_grad():
        labels = [int(model(ids).argmax(1)) for ids in texts]
    areas: dict[str, np.ndarray] = {}
    for title, make in {**METHODS, **_OCCLUSION}.items():
        method = make(model)
        both = []
        for ids, label in zip(texts, labels, strict=True):
            first = ranked(method.attribute(ids, target=label)[0, :-1], 0)

            def chance(texts: Tensor, label: int = label) -> Tensor:
                with torch.no_grad():
                    found: Tensor = model(texts).softmax(1)[:, label]
                return found

            both.append([area(chance, ids, order, UNKNOWN) for order in (first, first.flip(0))])
        areas[title] = np.array(both).T
    details: dict[str, Any] = {"sentences": len(texts), "words": list(WORDS), "methods": {}}
    for title, (most, least) in sorted(areas.items(), key=lambda item: -float((item[1][1] - item[1][0]).mean())):
        its = bootstrap(mean, least - most)
        details["methods"][title] = {
            "MoRF": round(float(most.mean()), 4),
            "LeRF": round(float(least.mean()), 4),
            "LeRF - MoRF": round(its.value, 4),
            "LeRF - MoRF, 95 %": [round(its.low, 4), round(its.high, 4)],
        }
    rows = [(title, *map(str, its.values())) for title, its in details["methods"].items()]
    show("words replaced by <unk>", ("method", "MoRF", "LeRF", "LeRF - MoRF", "95 %"), rows)
    own = details["methods"]["MambaLRP"]
    lead = bootstrap(
        mean, (areas["MambaLRP"][1] - areas["MambaLRP"][0]) - (areas["RandomMap"][1] - areas["RandomMap"][0])
    )
    details["MambaLRP ahead of RandomMap, 95 %"] = [round(lead.low, 4), round(lead.high, 4)]
    return [figure("text areas", "MambaLRP", own["LeRF - MoRF"], tuple(own["LeRF - MoRF, 95 %"]))], details


def table(results: dict[str, Any]) -> str:
    """The table of the page about text, best first."""
    lines = ["| method | MoRF | LeRF | LeRF - MoRF | 95 % |", "|---|---|---|---|---|"]
    for title, its in results["areas"]["details"]["methods"].items():
        low, high = its["LeRF - MoRF, 95 %"]
        numbers = " | ".join(f"{its[what]:.2f}" for what in ("MoRF", "LeRF", "LeRF - MoRF"))
        lines.append(f"| `{title}` | {numbers} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)
