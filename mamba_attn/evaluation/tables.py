"""The comparison as text, CSV and JSON, next to published figures if comparable: official weights, ImageNet.

Ali, Zimerman and Wolf, "The Hidden Attention of Mamba Models" (arXiv 2403.01590v2; ACL 2025): perturbation, Table 1
(ImageNet validation images, AUC x 100; maps of the predicted class, accuracy against the label, as in the protocol's
code: our ``..._target``); segmentation, Table 2 (ImageNet-Segmentation, percent).
The models are Vim-S and a Transformer of the same size. The row of MambaLRP is in the ACL version only.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mamba_attn.datasets.class_names import is_imagenet
from mamba_attn.datasets.texts import Texts
from mamba_attn.evaluation.intervals import DRAWS, LEVEL, Interval
from mamba_attn.evaluation.metrics import METRICS
from mamba_attn.evaluation.summary import Figure, Table

Rows = tuple[str, list[str], list[list[str]]]  # title, header, cells
SHOWN = {
    "perturbation": ("positive_auc_top", "negative_auc_top", "positive_auc_target", "negative_auc_target",
                     "gap_target", "gap_top", "deletion", "insertion"),
    "perturbation, pixels ranked": ("pixel_ranked_positive_auc_top", "pixel_ranked_negative_auc_top",
                                    "pixel_ranked_gap_top"),
    "localisation": (
        "shuffled_auc", "pixel_accuracy", "map", "miou", "pointing", "energy_ratio", "distractor_energy",
        "not_distractor",
    ),
    "localisation, objects below half of the image": ("pixel_accuracy_small", "map_small", "miou_small",
                                                      "pointing_small", "energy_ratio_small"),
    "where an answer was copied from": ("source_first", "source_recall_2", "source_recall_4", "source_auc",
                                        "source_ap", "source_rank"),
    "tokens removed": ("tokens_gap", "tokens_morf", "tokens_lerf"),
    "time": ("text_seconds",),
    "sanity and cost": ("randomised_first", "randomised_all", "other_class", "again", "alone", "seconds",
                        "peak_megabytes"),
}  # fmt: skip
_COST = {"alone", "seconds", "peak_megabytes"}
LEGEND = (
    "value (half of the 95 % interval); * first, = not behind the first after Holm's correction over all pairs; pos: "
    "lower is better, neg: higher is better; top: against the clean prediction, target: against the label; gap: (neg - "
    "pos AUC) over 80 times the share of clean hits; [n] of n images alone, so without a rank"
)
TEXT_LEGEND = (
    "value (half of the 95 % interval over texts); * first, = not behind the first after Holm's correction over all "
    "pairs; MoRF, LeRF: mean probability of the prediction while the most, or least, relevant tokens are removed first"
)
# arXiv 2502.15612, table of copying with Mamba-1: method, AUC, AP
PUBLISHED = (("MambaLRP", 0.40, 0.22), ("Mamba-Attention", 0.84, 0.36), ("LaTIM (ALTI)", 0.86, 0.47))
VIM = "Vim-S"
MAMBA = "vim_small"
_CLASSES = 1000
ABSENT = (
    "Published figures are of Vim-S with the official weights on ImageNet's validation images, or on "
    "ImageNet-Segmentation. Neither is here, so none are shown: figures of other models and images do not compare."
)


def text_tables(tables: Sequence[Table]) -> list[Rows]:
    """Return the tables to print: per collection and model one per question, methods in the order of the first."""
    found = []
    for table in tables:
        accuracy = "" if table.accuracy is None else f", accuracy {table.accuracy:.1%}"
        for question, names in SHOWN.items():
            names = tuple(name for name in names if name in table.figures)
            if not names:
                continue
            most = {name: max(figure.images for figure in table.figures[name].values()) for name in names}
            images = max(most.values())
            asked = question.partition(" and ")[2] if set(names) <= _COST else question  # of "sanity and cost"
            title = f"{table.model.name} on {table.data.name}: {asked}, {images} {what_of(table, images)}{accuracy}"
            order = list(table.figures[names[0]])
            order += [method for method in table.methods if method not in order]
            rows = [
                [method, *(cell(table.figures[name].get(method), most[name]) for name in names)]
                for method in order
                if any(method in table.figures[name] for name in names)
            ]
            found.append((title, ["method", *(METRICS[name].title for name in names)], rows))
    return found


def what_of(table: Table, count: int = 0) -> str:
    """Return what a table's figures are over: "images" or "texts", or the singular of one."""
    return ("text" if isinstance(table.data, Texts) else "image") + ("" if count == 1 else "s")


def cell(figure: Figure | None, most: int = 0) -> str:
    """Format a figure for a table.

    Args:
        figure: of one method.
        most: number of images of the other methods; a method with fewer shows its own.
    """
    if figure is None:
        return ""
    its = figure.interval
    half = _short((its.high - its.low) / 2)
    spread = "" if half == "0" else f" ({half})"
    fewer = f" [{figure.images}]" if figure.images < most else ""
    return f"{_short(its.value)}{spread}{fewer}{mark(figure)}"


def mark(figure: Figure) -> str:
    """Return " *" for the first, " =" for one that may be as good, else ""."""
    if not figure.rank:
        return ""
    return " *" if figure.rank == 1 else " =" if figure.chance is not None and figure.chance >= LEVEL else ""


def as_csv(tables: Sequence[Table]) -> str:
    """Return CSV with one line per collection, model, method and metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "data",
            "model",
            "method",
            "metric",
            "value",
            "low",
            "high",
            "images",
            "rank",
            "better",
            "behind_first",
            "behind_low",
            "behind_high",
        ]
    )
    for table in tables:
        for name, figures in table.figures.items():
            for method, its in figures.items():
                behind = ["", "", ""] if its.behind is None else [its.behind.value, its.behind.low, its.behind.high]
                direction = {1: "higher", -1: "lower", 0: ""}[METRICS[name].better]
                writer.writerow(
                    [
                        table.data.name,
                        table.model.name,
                        method,
                        name,
                        its.interval.value,
                        its.interval.low,
                        its.interval.high,
                        its.images,
                        its.rank or "",
                        direction,
                        *behind,
                    ]
                )
    return file.getvalue()


def as_json(tables: Sequence[Table], about: dict[str, Any], halves: Mapping[str, Sequence[Table]]) -> str:
    """Return all figures as JSON.

    Args:
        tables: of all images.
        about: metadata of the run: command, versions, options, notes.
        halves: the tables of each half of the images.
    """
    used = {name for table in tables for name in table.figures}
    contents = {
        **about,
        "metrics": {
            name: {"title": metric.title, "better": metric.better, "what": metric.note}
            for name, metric in METRICS.items()
            if name in used
        },
        "intervals": f"95 %, {DRAWS} resamplings of the images, the same for all methods",
        "tables": [_as_dict(table) for table in tables],
        "halves": {half: [_brief(table) for table in its] for half, its in halves.items()},
    }
    return json.dumps(_finite(contents), indent=1, allow_nan=False) + "\n"


def _as_dict(table: Table) -> dict[str, Any]:
    return {
        "data": table.data.name,
        "model": table.model.name,
        "weights": table.model.identity,
        "images": table.images,
        "accuracy": table.accuracy,
        "figures": {
            name: {method: _figure(figure) for method, figure in its.items()} for name, its in table.figures.items()
        },
        "curves": table.curves,
        "randomised": table.randomised,
        "failed": table.failed,
        "flags": table.flags,
        "published": [asdict(row) for row in beside(table)],
    }


def _brief(table: Table) -> dict[str, Any]:
    figures = {
        name: {method: figure.interval.value for method, figure in its.items()} for name, its in table.figures.items()
    }
    return {"data": table.data.name, "model": table.model.name, "images": table.images, "figures": figures}


def _figure(figure: Figure) -> dict[str, Any]:
    found = {**_interval(figure.interval), "images": figure.images, "rank": figure.rank or None}
    behind = None if figure.behind is None else _interval(figure.behind)
    return {**found, "behind_first": behind, "chance": figure.chance, "ahead_of": list(figure.ahead_of)}


def _interval(its: Interval) -> dict[str, float]:
    return {"value": its.value, "low": its.low, "high": its.high}


def _finite(value: Any) -> Any:
    """Replace NaN and Inf by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _short(value: float) -> str:
    value = round(value, 9)  # drop rounding errors
    if value == 0:
        return "0"
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Published:
    """One row of a table.

    Args:
        paper: the paper's name of the method.
        ours: our name.
        model: "Vim-S" or "Transformer-S".
        figures: by name of our metrics.
    """

    paper: str
    ours: str
    model: str
    figures: dict[str, float]


def _auc(paper: str, ours: str, model: str, positive: float, negative: float) -> Published:
    return Published(paper, ours, model, {"positive_auc_target": positive, "negative_auc_target": negative})


def _seg(paper: str, ours: str, model: str, accuracy: float, precision: float, miou: float) -> Published:
    return Published(paper, ours, model, {"pixel_accuracy": accuracy, "map": precision, "miou": miou})


PERTURBATION = (
    _auc("Raw-Attention", "raw_attention", VIM, 17.268, 34.025),
    _auc("Attn-Rollout", "attention_rollout", VIM, 18.806, 41.864),
    _auc("Mamba-Attr", "mamba_attribution", VIM, 16.619, 39.632),
    _auc("Raw-Attention", "raw_attention", "Transformer-S", 20.687, 40.766),
    _auc("Attn-Rollout", "attention_rollout", "Transformer-S", 20.594, 43.525),
    _auc("Transformer-Attr", "transformer_attribution", "Transformer-S", 15.351, 48.089),
)
SEGMENTATION = (
    _seg("Raw-Attention", "raw_attention", VIM, 67.64, 74.88, 45.09),
    _seg("Attn-Rollout", "attention_rollout", VIM, 71.01, 80.78, 51.51),
    _seg("LRP attribution (Jafari et al.)", "mamba_lrp", VIM, 71.19, 77.04, 49.98),
    _seg("Mamba-Attr", "mamba_attribution", VIM, 74.72, 81.70, 54.24),
    _seg("Raw-Attention", "raw_attention", "Transformer-S", 59.69, 77.25, 36.94),
    _seg("Attn-Rollout", "attention_rollout", "Transformer-S", 66.84, 80.34, 47.85),
    _seg("Transformer-Attr", "transformer_attribution", "Transformer-S", 79.26, 84.85, 60.63),
)


def beside(table: Table) -> tuple[Published, ...]:
    """Return the published rows to compare with; empty unless weights and images are those of the paper."""
    if (
        isinstance(table.data, Texts)
        or table.model.name != MAMBA
        or "demo" in (table.model.weights, table.model.subject.weights)
        or len(table.model.subject.classes) != _CLASSES
    ):
        return ()
    if table.data.identity.startswith("gtsegs_ijcv.mat"):
        return SEGMENTATION
    whole = is_imagenet(table.data) and len(table.data.classes) == _CLASSES
    return PERTURBATION if whole else ()


def published_of_texts(tables: Sequence[Table]) -> list[Rows]:
    """Return the published figures of copying as a table of its own: they are of other models and data.

    Args:
        tables: of this run; without tasks there is nothing published.
    """
    if not any(isinstance(table.data, Texts) and table.data.task for table in tables):
        return []
    title = "published in 2502.15612: another copying task, other models; not comparable with the tables above"
    return [(title, ["method", "AUC", "AP"], [[name, f"{auc:.2f}", f"{ap:.2f}"] for name, auc, ap in PUBLISHED])]
