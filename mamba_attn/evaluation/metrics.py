"""The figures of the comparison: each one's source lines, how images combine into it, and which direction is better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mamba_attn.evaluation import perturbation

SMALL = 0.5  # of the image: larger objects leave a map little to miss
Columns = Callable[[dict[str, Any]], Sequence[float] | None]  # from one image's line; None: the image does not count


@dataclass(frozen=True)
class Metric:
    """A figure over images.

    Args:
        name: in files.
        title: in tables.
        better: +1 if higher is better, -1 if lower is, 0 if neither.
        measure: the measure whose lines it uses.
        columns: of one image; their means over images make the figure.
        combine: means (..., columns) to figures.
        note: what it is, in a sentence.
    """

    name: str
    title: str
    better: int
    measure: str
    columns: Columns
    combine: Callable[[np.ndarray], np.ndarray] = lambda means: means[..., 0]
    note: str = ""


def _hits(line: dict[str, Any], sign: int, of: str) -> np.ndarray | None:
    wanted = line["predicted"] if of == "top" else line["label"]
    return None if wanted is None else np.equal(line["answers"][sign], wanted).astype(np.float64)


def _auc(sign: int, of: str) -> Columns:
    def columns(line: dict[str, Any]) -> Sequence[float] | None:
        hits = _hits(line, sign, of)
        return None if hits is None else [float(perturbation.auc(hits))]

    return columns


def _accuracy(sign: int, of: str) -> Columns:
    def columns(line: dict[str, Any]) -> Sequence[float] | None:
        hits = _hits(line, sign, of)
        return None if hits is None else [100 * float(hits.mean())]

    return columns


def _gap(of: str) -> Columns:
    def columns(line: dict[str, Any]) -> Sequence[float] | None:
        both = [_hits(line, sign, of) for sign in (1, 0)]
        if both[0] is None or both[1] is None:
            return None
        clean = float(of == "top" or line["predicted"] == line["label"])
        return [*(float(perturbation.auc(hits)) for hits in both if hits is not None), clean]

    return columns


def _gained(means: np.ndarray) -> np.ndarray:
    """Return (negative - positive AUC) / (80 x clean accuracy)."""
    clean = means[..., 2]
    return np.asarray((means[..., 0] - means[..., 1]) / np.where(clean > 0, 80 * clean, np.nan))


def _probability(area: Callable[..., np.ndarray]) -> Columns:
    def columns(line: dict[str, Any]) -> Sequence[float]:
        clean, blank = np.array(line["clean"]), np.array(line["blank"])
        return [100 * float(area(np.array(line["probability"]), clean, blank))]

    return columns


def _perturbations(measure: str, prefix: str = "", suffix: str = "") -> list[Metric]:
    found = []
    for of, against in (("top", "clean prediction"), ("target", "label")):
        for sign, name, better in ((0, "positive", -1), (1, "negative", 1)):
            found += [
                Metric(
                    f"{prefix}{name}_auc_{of}",
                    f"{name[:3]} AUC {of}{suffix}",
                    better,
                    measure,
                    _auc(sign, of),
                    note=f"{name} perturbation, area under the accuracy against the {against}, 80 at most",
                ),
                Metric(
                    f"{prefix}{name}_mean_{of}",
                    f"{name[:3]} mean {of}{suffix}",
                    better,
                    measure,
                    _accuracy(sign, of),
                    note=f"mean of the nine accuracies against the {against}, %",
                ),
            ]
        found.append(
            Metric(
                f"{prefix}gap_{of}",
                f"gap {of}{suffix}",
                1,
                measure,
                _gap(of),
                _gained,
                "(negative - positive AUC) / (80 x clean accuracy): compares models of different accuracy",
            )
        )
    return [
        *found,
        Metric(f"{prefix}deletion", f"deletion{suffix}", -1, measure, _probability(perturbation.deletion),
               note="area under the explained class's probability as the highest cells are removed, %"),
        Metric(f"{prefix}insertion", f"insertion{suffix}", 1, measure, _probability(perturbation.insertion),
               note="area under the probability as the highest cells are added to a blank image, %"),
    ]  # fmt: skip


def _small(columns: Columns) -> Columns:
    return lambda line: columns(line) if line["area"] < SMALL else None


def _located(name: str, factor: float = 1.0) -> Columns:
    # a store that was begun earlier may lack what is measured since
    return lambda line: None if line.get(name) is None else [factor * line[name]]


def _both(line: dict[str, Any]) -> Sequence[float]:
    (i0, i1), (u0, u1) = line["intersections"], line["unions"]
    return [i0, u0, i1, u1]


def _miou(means: np.ndarray) -> np.ndarray:
    """Return the mean of both classes' intersection over union over the whole set; an absent class counts 1."""
    ratios = [
        np.where(means[..., u] > 0, means[..., i] / np.where(means[..., u] > 0, means[..., u], 1), 1.0)
        for i, u in ((0, 1), (2, 3))
    ]
    return np.asarray(100 * (ratios[0] + ratios[1]) / 2)


def _shared(line: dict[str, Any]) -> Sequence[float] | None:
    known = (
        None not in (line.get("distractor_area"), line.get("distractor_energy"), line["energy"])
        and line["area"]
        and line["distractor_area"]
    )
    if not known:
        return None
    object_density, distractor_density = (
        line["energy"] / line["area"],
        line["distractor_energy"] / line["distractor_area"],
    )
    whole = object_density + distractor_density
    return [100 * (object_density / whole if whole > 0 else 0.5)]


def _free_of_centre(line: dict[str, Any]) -> Sequence[float] | None:
    own, others = line.get("area_under"), line.get("elsewhere")
    return None if own is None or others is None else [100 * (own - others)]


_LOCATED: list[Metric] = [
    Metric("shuffled_auc", "own object", 1, "localisation", _free_of_centre,
           note="area under the ROC curve for the image's own object, less that for other images' objects, points; "
           "0: the map knows where objects are, not where this one is"),
    Metric("pixel_accuracy", "pixel acc", 1, "localisation", lambda line: [line["correct"], line["pixels"]],
           lambda means: np.asarray(100 * means[..., 0] / means[..., 1]), "over all pixels of all images, %"),
    Metric("map", "mAP", 1, "localisation", _located("precision", 100), note="mean over images, both channels, %"),
    Metric("miou", "mIoU", 1, "localisation", _both, _miou, "of background and foreground, over the whole set, %"),
    Metric("pointing", "pointing", 1, "localisation", _located("hit", 100), note="the map's maximum lies inside, %"),
    Metric("energy", "energy", 1, "localisation", _located("energy", 100), note="of the positive part inside, %"),
    Metric("energy_ratio", "energy / area", 1, "localisation",
           lambda line: None if line["energy"] is None or not line["area"] else [line["energy"] / line["area"]],
           note="mean over images; 1 for a map that knows nothing"),
]  # fmt: skip
_DISTRACTORS: list[Metric] = [
    Metric(
        "distractor_energy",
        "on the distractor",
        -1,
        "localisation",
        _located("distractor_energy", 100),
        note="energy on the distractor that resembles the object, %",
    ),
    Metric(
        "not_distractor",
        "object : distractor",
        1,
        "localisation",
        _shared,
        note="energy per area on the object, as a share of that on object and distractor, %; 50: no difference",
    ),
    Metric(
        "above_distractor",
        "object above distractor",
        1,
        "localisation",
        lambda line: None if line.get("above_distractor") is None else [100 * line["above_distractor"]],
        note="area under the ROC curve, a pixel of the object against one of the distractor, %; 50: no difference",
    ),
]


def _sane(name: str) -> Columns:
    return lambda line: None if line[name] is None else [line[name]]


def _stage(place: int) -> Columns:
    def columns(line: dict[str, Any]) -> Sequence[float] | None:
        values = line["randomised"]
        return None if not values or values[place] is None else [values[place]]

    return columns


_SANITY: list[Metric] = [
    Metric("randomised_first", "last blocks randomised", -1, "sanity", _stage(0),
           note="Spearman with the trained model's map after the first stage of the cascade; lower is saner"),
    Metric("randomised_all", "all randomised", -1, "sanity", _stage(-1), note="the same after the last stage"),
    Metric("other_class", "another class", 0, "sanity", _sane("other_class"),
           note="Spearman with the map of the second most probable class; 1: the method does not see the class"),
    Metric("again", "the same again", 0, "sanity", _sane("again"),
           note="largest difference between two runs, over the map's largest value"),
    Metric("alone", "alone or in a batch", 0, "sanity", _sane("alone"), note="the same for batch 1 against a batch"),
]  # fmt: skip
_COSTS: list[Metric] = [
    Metric("seconds", "s / image", -1, "cost", _located("seconds"), note="wall seconds, one image at a time"),
    Metric(
        "peak_megabytes",
        "peak MB",
        -1,
        "cost",
        _located("peak_bytes", 1e-6),
        note="tensors at the worst moment, one image",
    ),
]


def _of_ranks(value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Columns:
    return lambda line: [float(np.mean(value(np.array(line["ranks"]), np.array(line["sizes"]))))]


def _lost(value: Callable[[float, float], float]) -> Columns:
    return lambda line: [value(line["first"], line["last"])]


_TEXTS: list[Metric] = [
    Metric("source_first", "source first", 1, "source", _of_ranks(lambda ranks, _: ranks == 0),
           note="share of the questions whose source has the highest value before the question"),
    Metric("source_recall_2", "in first 2", 1, "source", _of_ranks(lambda ranks, _: ranks < 2),
           note="share whose source is among the two highest"),
    Metric("source_recall_4", "in first 4", 1, "source", _of_ranks(lambda ranks, _: ranks < 4),
           note="share whose source is among the four highest"),
    Metric("source_auc", "AUC", 1, "source", _of_ranks(lambda ranks, sizes: 1 - ranks / (sizes - 1)),
           note="area under the ROC curve: the source against the other tokens before the question"),
    Metric("source_ap", "AP", 1, "source", _of_ranks(lambda ranks, _: 1 / (1 + ranks)),
           note="average precision, 1 / (1 + rank)"),
    Metric("source_rank", "mean rank", -1, "source", _of_ranks(lambda ranks, _: ranks), note="0: the source is first"),
    Metric("tokens_morf", "MoRF", -1, "tokens", _lost(lambda first, last: first),
           note="mean probability of the prediction while the tokens of the highest values are removed first"),
    Metric("tokens_lerf", "LeRF", 1, "tokens", _lost(lambda first, last: last),
           note="the same while they are removed last"),
    Metric("tokens_gap", "LeRF - MoRF", 1, "tokens", _lost(lambda first, last: last - first),
           note="0 on average for random values"),
    Metric("text_seconds", "s / text", -1, "time", _located("seconds"), note="wall seconds, batches included"),
]  # fmt: skip

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in [
        *_perturbations("perturbation"),
        *_perturbations("pixels", "pixel_ranked_", ", pixels"),
        *_LOCATED,
        *(
            Metric(
                f"{each.name}_small",
                f"{each.title} (< half)",
                each.better,
                each.measure,
                _small(each.columns),
                each.combine,
                f"{each.note}; objects below half of the image",
            )
            for each in _LOCATED
        ),
        *_DISTRACTORS,
        *_SANITY,
        *_COSTS,
        *_TEXTS,
    ]
}
