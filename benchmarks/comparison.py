"""Attribution methods compared, as ``mamba-attn compare`` does, on the demo models; how far ours leads the best other.

``--data`` names the folder with imagenette128.zip and localise.zip. Results are kept in ``--runs``; a killed run
resumes from there. What the present tables are made of, those of benchmarks/fills.py included, is in
results/measured.jsonl.xz: unpacked into ``--runs``, it is extended rather than measured again.

Our combination was chosen on the images that ``--half choose`` keeps, where its ablations are measured; perturbation
and boxes are measured on the other half, and digits show the halves and all images. Models answer in bfloat16 when they
are perturbed; maps are of float32.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.cases import EXPLAINED
from benchmarks.measure import Spread
from benchmarks.report import Figure, figure, show

RESULTS = Path(__file__).parent / "results" / "compare.json"
OURS = "relevance_attention_ranks"
MICRO = (*EXPLAINED, "vit_micro")
DIGITS = (*cases.DIGITS, "vit_digits")
PUBLISHED = (
    *(
        f"{method}:convention={code}"
        for method in ("raw_attention", "attention_rollout", "mamba_attribution")
        for code in ("hidden_mamba", "implicit_unified")
    ),
    *(f"{method}:convention=vmamba_analysis" for method in ("raw_attention", "attention_rollout")),
    "mamba_attribution:rule=paper",
    "mamba_attribution:rule=published_code",
)
SLOW = ("integrated_gradients:n_steps=16", "occlusion:sliding_window_shapes=32,strides=16")
CHEAPER = ("saliency", "attention_rollout_signed")
LEADING = (  # on all images; others on as many as their place needs
    "mamba_lrp",
    "keep_and_remove_lrp",
    "mamba_attribution",
    "attn_lrp",
    "libra_grad",
    "transformer_attribution",
    "random",
)
SHORTENED = ("igos_plus_plus:path=5",)  # its own options ask for 1,200 passes forward and backward
DEAR = ("latim", "keep_and_remove_lrp", "mask_refinement")  # maps that take seconds
ABLATIONS = (
    OURS,
    f"{OURS}:weight=0",
    f"{OURS}:power=1",
    f"{OURS}:gamma=0.25",
    *(f"{OURS}:extent={name}" for name in ("smooth_relevance", "implicit_attention", "raw_attention")),
    "mamba_lrp",
    "mamba_lrp:gamma_layers=*,gamma=1",
    "implicit_attention",
    "raw_attention",
)
MOST = {"perturbation": 50, "localisation": 50, "sanity": 2}  # images of slow methods
SOME = 50  # images of methods that do not lead; fewer would bring a warning


@dataclass(frozen=True)
class Part:
    """One comparison.

    Args:
        name: of its results.
        data: files under ``--data``, with a part.
        measures: taken on them.
        models: that are asked.
        half: of the images.
        limit: images per collection.
        aims: metrics of which a lead is reported.
        methods: alone; empty: all that fit.
    """

    name: str
    data: tuple[str, ...]
    measures: tuple[str, ...]
    models: tuple[str, ...] = MICRO
    half: str = "all"
    limit: int | None = None
    aims: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


PARTS = (
    Part("perturbation", ("imagenette128.zip",), ("perturbation",), half="report", limit=300,
         aims=("positive_auc_top", "negative_auc_top")),
    Part("boxes", ("localise.zip:imagenette_boxes224",), ("localisation",), half="report", aims=("miou",)),
    Part("digits", ("localise.zip:digits64",), ("localisation",), DIGITS, aims=("miou",)),
    Part("ablation", ("imagenette128.zip",), ("perturbation",), EXPLAINED, "choose", 60, methods=ABLATIONS),
    Part("ablation, boxes", ("localise.zip:imagenette_boxes224",), ("localisation",), EXPLAINED, "choose",
         methods=ABLATIONS),
    Part("sanity and cost", ("imagenette128.zip",), ("sanity", "cost"), half="report"),
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenette128.zip and localise.zip")
    parser.add_argument("--runs", type=Path, default=Path("compare_runs"), help="folder of what is measured")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        choices=[part.name for part in PARTS],
        help="take these parts from the results that there are; says which of their models have other weights now",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return args.parts is not None


def run_comparison(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Measure what the runs lack, and report."""
    figures: list[Figure] = []
    details: dict[str, Any] = {"how": __doc__}
    parts = [part for part in PARTS if args.parts is None or part.name in args.parts]
    for part in parts:
        found, details[part.name] = _kept(part) if part.name in args.keep else _measure(part, args)
        if part.name in args.keep:
            for name in changed(details[part.name]["tables"]):
                print(f"{part.name}: kept, though {name} may have other weights now", flush=True)
        figures += found
    return figures, details


def _kept(part: Part) -> tuple[list[Figure], dict[str, Any]]:
    """A part of the present results with its leads, and the machine that measured it."""
    found = json.loads(RESULTS.read_text())
    details = found["details"][part.name]
    targets = {cases.TARGETS[name].what: name for name in (f"{m} {aim}" for m in part.models for aim in part.aims)
               if name in cases.TARGETS}  # fmt: skip
    leads = [
        figure(targets[row["what"]], row["how"], Spread(row["value"], low, high, row["rounds"]), row.get("interval"))
        for row in found["figures"] if row["what"] in targets for low, high in [row["quartiles"]]
    ]  # fmt: skip
    return leads, {**details, "measured on": details.get("measured on", found["machine"])}


def changed(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the models whose weights are not known to be those that were measured.

    Args:
        tables: of a part of the results.
    """
    from mamba_attn.evaluation.specs import Model

    return [table["model"] for table in tables if table.get("weights") != Model(table["model"]).identity]


def _measure(part: Part, args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    from mamba_attn.commands.terminal import progress_bar
    from mamba_attn.evaluation.scheduler import run
    from mamba_attn.evaluation.store import Store
    from mamba_attn.evaluation.summary import summarise
    from mamba_attn.evaluation.tables import text_tables

    planned = plan(part, args.data, 4 if args.quick else part.limit)
    planned.check()
    args.runs.mkdir(parents=True, exist_ok=True)
    store = Store(args.runs / "measured.jsonl")
    started, before = time.perf_counter(), len(store)
    with progress_bar() as progress:
        run(planned, store, args.workers, progress)
    seconds, lines = time.perf_counter() - started, len(store) - before
    tables = summarise(planned, store)
    details: dict[str, Any] = {
        "tables": [_brief(table) for table in tables],
        "measured in this run": {"lines": lines, "wall seconds": seconds, "workers": args.workers},
        "notes": list(dict.fromkeys(planned.notes)),
        "half": planned.half,
        "options": vars(planned.options),
    }
    for title, header, rows in text_tables(tables):
        show(title, header, rows)
    if planned.half == "all":
        details["halves"] = {
            half: [_brief(table) for table in summarise(planned, store, half)] for half in ("choose", "report")
        }
    return leads(part, planned, store), details


def plan(part: Part, data: Path, limit: int | None) -> Any:
    """What ``mamba-attn compare`` makes of a command line."""
    from mamba_attn.evaluation.plan import Plan
    from mamba_attn.evaluation.specs import Model, Options, choose_methods

    texts = list(_methods(part))
    methods, least, unasked = choose_methods(texts)
    return Plan(
        [Model(name) for name in part.models],
        [str(data / each) for each in part.data],
        methods,
        part.measures,
        {},
        least,
        unasked,
        Options(precision="bfloat16"),
        part.half,
        limit,
    )


def _methods(part: Part) -> Sequence[str]:
    """Return all methods that fit; for photos also published ones. The slow and those behind get fewer images."""
    if part.methods:
        return part.methods
    if part.models != MICRO:
        return "all", f"{SLOW[0]}@100", "occlusion:sliding_window_shapes=16,strides=8@300"
    from mamba_attn.attribution.catalogue import METHODS

    few, perturbed = f"@{MOST[part.measures[0]]}", part.measures == ("perturbation",)
    rival = f"@{SOME}" if perturbed else few
    texts = [f"{SLOW[0]}{rival}", f"{SLOW[1]}{few}"]
    cheaper = () if part.measures == ("localisation",) else CHEAPER  # boxes cost a map alone
    texts += [f"{text}{few}" for text in (*PUBLISHED, *cheaper, *SHORTENED, *(() if perturbed else DEAR))]
    if perturbed:
        known = {text.partition(":")[0] for text in (*SLOW, *CHEAPER, *SHORTENED)} | set(LEADING)
        texts += [f"{name}@{SOME}" for name in METHODS if name not in known]
    return "all", *texts, "raw_attention", "attention_rollout", "mamba_attribution"


def leads(part: Part, planned: Any, store: Any) -> list[Figure]:
    """How far ours is ahead of the best of all other methods, on the images of both that chose nothing."""
    from mamba_attn.evaluation.metrics import METRICS
    from mamba_attn.evaluation.summary import compare

    figures = []
    for selector, model in planned.pairs if part.aims else []:
        data, names = planned.data[selector], planned.fitting(model)
        if OURS not in names:
            continue
        indices = sorted({*planned.indices(selector, part.measures[0])} & {*data.chosen("report")})
        lines = {
            name: {
                index: line
                for index in indices
                if (line := store.get(planned.key(data, index, model, name, part.measures[0]))) and "error" not in line
            }
            for name in names
        }
        for aim in part.aims:
            best = next(name for name in compare(METRICS[aim], lines, indices) if name != OURS)
            both = compare(METRICS[aim], {OURS: lines[OURS], best: lines[best]}, indices)
            figures.append(figure(f"{model.name} {aim}", best, *lead(both)))
    return figures


def lead(both: Mapping[str, Any]) -> tuple[Spread, tuple[float, float]]:
    """By how much ours is better than the other: quartiles and 95 % of the paired bootstrap.

    Args:
        both: the figures of ours and one other, best first.
    """
    first, (_, second) = next(iter(both)), both.values()
    sign = 1 if first == OURS else -1
    low, high = sorted(sign * quartile for quartile in second.behind.quartiles)
    first_end, second_end = sorted(sign * end for end in (second.behind.low, second.behind.high))
    count = min(its.images for its in both.values())
    return Spread(sign * second.behind.value, low, high, count), (first_end, second_end)


def _brief(table: Any) -> dict[str, Any]:
    """All figures of a table: value, interval, images, place, and what ours is really ahead of."""
    figures = {
        name: {
            method: [*map(_short, (its.interval.value, its.interval.low, its.interval.high)), its.images, its.rank]
            for method, its in found.items()
        }
        for name, found in table.figures.items()
    }
    ahead = {name: found[OURS].ahead_of for name, found in table.figures.items() if OURS in found}
    return {
        "data": table.data.name,
        "model": table.model.name,
        "weights": table.model.identity,
        "images": table.images,
        "accuracy": table.accuracy,
        "figures [value, low, high, images, place]": figures,
        "ours is ahead of": ahead,
        "curves": table.curves,
        "flags": table.flags,
        "failed": table.failed,
    }


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if abs(value) < float("inf") else None  # NaN too: JSON has neither
