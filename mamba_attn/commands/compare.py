"""``mamba-attn compare``: arguments, the run, its files."""

import argparse
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_attn.commands.compare_texts import STORE, run_texts, write_files
from mamba_attn.commands.options import (
    Commands,
    add_folder,
    add_limit,
    add_model,
    command,
    model_arguments,
    require_least,
    settle_threads,
)
from mamba_attn.commands.ranks import left_to_others, ranks_bar
from mamba_attn.commands.terminal import plain, progress_bar, say, show
from mamba_attn.core.requirements import require_extras, writable
from mamba_attn.errors import MambaAttnError, nearest

if TYPE_CHECKING:
    from mamba_attn.distributed import Ranks
    from mamba_attn.evaluation.plan import Plan
    from mamba_attn.evaluation.specs import Model
    from mamba_attn.evaluation.store import Store
    from mamba_attn.evaluation.summary import Table

_NEEDED = {"captum": "captum", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}
_MODELS = "vim_micro,vmamba_micro,vit_micro"
_EXAMPLES = """\
--data photos --limit 50
--data photos --models vim_micro=my.pt --methods grad_cam
--data photos --model net.py:build --models vit_micro
--data boxes.zip --measures localisation --workers 4
--models mamba_copy,mamba_recall
--data reviews.txt --models mamba_reviews"""
_NOTES = """\
data: a folder of images, with or without class folders; a zip of them, or one
with labels.csv, boxes.csv or segments.csv; ZIP:PART, a folder in a zip
(localise.zip:digits64); gtsegs_ijcv.mat, ImageNet-Segmentation. If there are
train/ and val/, val is used. DATA@MEASURE,... limits this data to some
measures: localise.zip:imagenette_boxes224@localisation.

methods: "all integrated_gradients:n_steps=16 occlusion@100" runs all methods,
one of them with another option, one on only 100 images. mamba-attn explain
--help lists them. "random" is always added: what others gain over it counts.

measures: perturbation; pixels (perturbation of single pixels, on 100 images);
localisation (if there are boxes or masks); sanity (on a few images); cost;
picture (the maps on the page).

fills: black; mean, the mean colour; blur, the blurred image; road, imputed from
the neighbours, with noise; drop, nothing: the model runs without the tokens
(Vim, ViT), or without them in its scans (others; "random" tells by how much a
fill alone misleads a model).

models that read text (mamba_copy, mamba_recall, mamba_reviews, mamba_plays,
hf:FOLDER) are compared on texts. With FILE.txt, one text per line, tokens are
removed, the most relevant first and last (measure: tokens); --fill unknown puts
the tokenizer's unknown token in their place, --fill drop leaves them out. With
copying and recall, the tasks of mamba_copy and mamba_recall, the token that an
answer was copied from is known, and its rank by every method is measured
(source).

Writes to FOLDER: compare.html (an offline page), compare.txt, compare.csv,
compare.json, and measured.jsonl, from which the same command resumes after an
interruption. Started by torchrun, by srun or as a job array, every process
measures some of the images, into measured.parts/, on the GPU of its own:

  torchrun --nproc-per-node 8 -m mamba_attn compare --device cuda --data photos
"""


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands,
        "compare",
        "score attribution methods on your images or texts",
        examples=_EXAMPLES,
        notes=_NOTES,
        run=run,
        stopped="stopped; the same command resumes here.",
    )
    add = parser.add_argument
    data = "DIR|ZIP[:PART]|FILE.mat|FILE.txt"
    add("--data", action="append", default=[], metavar=data, help="needed for images; may be repeated")
    add(
        "--models",
        metavar="SPEC[=WEIGHTS],...",
        help=f"default: --model alone, or {_MODELS} with demo weights",
    )
    add(
        "--methods",
        nargs="+",
        action="extend",
        metavar="METHOD",
        help="all, or NAME,... or NAME:OPTION=VALUE; default: all that fit; see below",
    )
    add_limit(parser, "use the first N images of each DATA; default: all")
    add_folder(parser, "mamba_attn_compare")
    add("--measures", default="all", metavar="all|NAME,...", help="default: all, see below")
    add("--target", default="predicted", metavar="predicted|label|CLASS", help="class to explain; default: predicted")
    add(
        "--half",
        default="all",
        choices=("all", "choose", "report"),
        help="use a fixed half of the images: tune on 'choose', report on 'report'; default: all",
    )
    add(
        "--fill",
        choices=("black", "mean", "blur", "road", "drop", "unknown"),
        help="what replaces removed cells, default: black; or tokens, default: unknown; see below",
    )
    add("--sanity-images", type=int, default=8, metavar="N", help="default: 8")
    add("--pictures", type=int, default=6, metavar="N", help="images on the page, per DATA; default: 6")
    add(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the model during perturbation; default: float32",
    )
    add("--budget", type=float, metavar="MINUTES", help="cheap methods first; stop in time, to resume later")
    add("--workers", type=int, default=1, metavar="N", help="processes; default: 1")
    add("--seed", type=int, default=0, metavar="N", help="seed of all random numbers; default: 0")
    add_model(parser, None)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then print and write everything."""
    require_extras(_NEEDED)
    from mamba_attn.distributed import Ranks

    ranks = Ranks.here()
    if ranks.world > 1 and (args.workers > 1 or args.budget is not None):
        option = "--workers" if args.workers > 1 else "--budget"
        raise ValueError(
            f"{option}: this is for one process, and {ranks.launcher} started {ranks.world}; leave it out."
        )
    models = _models(args, ranks)
    reads = {model.subject.reads for model in models}
    if reads == {"text"}:
        return run_texts(args, models, ranks)
    if len(reads) > 1:
        named = ", ".join(f"{model.name} reads {model.subject.reads}" for model in models)
        raise ValueError(f"--models: {named}; compare them in separate runs.")
    plan = _plan(args, models)
    plan.check()
    try:
        return _compare(plan, args, ranks)
    except BrokenProcessPool as error:
        raise MambaAttnError(
            "a worker process died, perhaps for lack of memory; results so far are kept: run it again with fewer "
            "--workers."
        ) from error


def _models(args: argparse.Namespace, ranks: "Ranks") -> "list[Model]":
    """Parse and load the models."""
    from mamba_attn.evaluation.specs import Model

    require_least(args, limit=1, workers=1, sanity_images=0, pictures=0, seed=0)
    args.device = ranks.device(args.device)
    if args.budget is not None and not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g}: expected minutes, more than 0.")
    given = args.models if args.models is not None else "" if args.model else _MODELS
    names = [text.strip() for text in given.split(",") if text.strip()]
    if not names and not args.model:
        raise ValueError("--models: expected names of models, e.g. vim_micro,vit_micro.")
    models = list(dict.fromkeys(Model.parse(name, args.device) for name in names))
    more = tuple(model_arguments(args).items())
    if args.model:
        models.insert(0, replace(Model.parse(args.model, args.device), more=more))
        models[0] = models[0] if args.weights is None else replace(models[0], weights=args.weights)
    elif more or args.weights:
        raise ValueError("--model: name the model that --weights, --classes and --mean are of.")
    if len({model.name for model in models}) < len(models):
        raise ValueError(f"--models {args.models}: a model can be compared with one set of weights at a time.")
    settle_threads(
        [model.subject.parameters for model in models], args.workers, ranks.cores if ranks.launcher else None
    )
    return models


def _plan(args: argparse.Namespace, models: "list[Model]") -> "Plan":
    """Parse all other arguments, without checking them against each other."""
    from mamba_attn.evaluation.plan import Plan
    from mamba_attn.evaluation.specs import Options, choose_methods, with_control

    if not args.data:
        raise ValueError("--data: expected a folder of images, a zip or a .mat file.")
    if args.fill == "unknown":
        raise ValueError("--fill unknown: this is for texts; for images, use black, mean, blur, road or drop.")
    selectors, only = _selectors(args.data)
    asked, most, unasked = choose_methods(args.methods or ["all"])
    methods = with_control(asked)
    return Plan(
        models,
        selectors,
        methods,
        _measures("--measures", args.measures),
        only,
        most,
        unasked,
        Options(args.target, args.fill or "black", args.precision, seed=args.seed),
        args.half,
        args.limit,
        args.sanity_images,
        pictures=args.pictures,
    )


def _selectors(texts: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Split selectors from the measures named after an @."""
    selectors, only = [], {}
    for text in texts:
        selector, at, rest = text.rpartition("@")
        if at and not Path(text).expanduser().exists():
            only[selector] = _measures(f"--data {text}", rest)
        selectors.append(selector if at and selector in only else text)
    return list(dict.fromkeys(selectors)), only


def _measures(option: str, text: str) -> tuple[str, ...]:
    from mamba_attn.evaluation.plan import MEASURES

    if text == "all":
        return MEASURES
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"{option}: there is no measure {name!r}. {nearest(name, MEASURES)}")
    if not names:
        raise ValueError(f"{option}: expected 'all' or names. {nearest('', MEASURES)}")
    return names


def _compare(plan: "Plan", args: argparse.Namespace, ranks: "Ranks") -> int:
    from mamba_attn.evaluation.scheduler import run as measure
    from mamba_attn.evaluation.scheduler import run_shared
    from mamba_attn.evaluation.store import Store

    empty = [plan.data[selector].name for selector, chosen in plan.chosen.items() if not chosen]
    if empty:
        raise ValueError(f"--half {plan.half}: {empty[0]} has no images in this half.")
    folder = writable(args.out)
    store = Store(folder / STORE, shared=ranks.world > 1)
    if store.damaged:
        plan.notes.append(f"{STORE}: {store.damaged} damaged lines were left out and their figures measured again.")
    if ranks.world > 1:
        with ranks_bar(ranks, "comparing") as advance:
            left = run_shared(plan, store, ranks, advance)
        if left or not ranks.reports:
            return left_to_others(ranks, left, folder)
        failed = _report(plan, store, folder, args.call)
        return 0 if ranks.launcher == "torchrun" else failed  # which would start all again
    budget = None if args.budget is None else 60 * args.budget
    with progress_bar() as progress:
        measure(plan, store, args.workers, progress, budget, progress.console.print)
    return _report(plan, store, folder, args.call)


def _report(plan: "Plan", store: "Store", folder: Path, call: str) -> int:
    """Print and write everything; the exit code says whether something failed."""
    from mamba_attn.evaluation.summary import summarise
    from mamba_attn.evaluation.tables import LEGEND, text_tables

    tables = summarise(plan, store)
    for title, header, rows in text_tables(tables):
        show(title, header, rows)
    print()
    say(LEGEND)
    notes, failed = write(plan, store, tables, folder, call)
    for note in notes:
        say(f"note: {note}")
    print(f"open {folder / 'compare.html'}")
    return 1 if failed else 0


def write(plan: "Plan", store: "Store", tables: "Sequence[Table]", folder: Path, call: str) -> tuple[list[str], bool]:
    """Write compare.html, .txt, .csv and .json; return the notes on them, and whether something failed.

    Args:
        plan: the comparison.
        store: its measurements.
        tables: their summary.
        folder: where to.
        call: how to make them again.
    """
    import torch

    from mamba_attn.datasets.samples import HALVES
    from mamba_attn.evaluation.page import page
    from mamba_attn.evaluation.summary import summarise
    from mamba_attn.evaluation.tables import LEGEND, as_csv, as_json, text_tables

    failed = [
        f"{table.model.name}, {table.data.name}, {sentence}"
        for table in tables
        for sentence in _missing(table, plan.fitting(table.model))
    ]
    flags = [f"{table.model.name}, {table.data.name}: {flag}" for table in tables for flag in table.flags]
    about: dict[str, Any] = {
        "command": call,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "half": plan.half,
        "options": vars(plan.options),
        "notes": [*dict.fromkeys([*plan.notes, *flags, *failed])],
    }
    halves = {half: summarise(plan, store, half) for half in HALVES} if plan.half == "all" else {}
    files = {
        "compare.txt": "\n".join([*(plain(*each) for each in text_tables(tables)), LEGEND, *about["notes"], ""]),
        "compare.csv": as_csv(tables),
        "compare.json": as_json(tables, about, halves),
        "compare.html": page(plan, store, tables, about),
    }
    write_files(folder, files)
    return about["notes"], bool(failed)


def _missing(table: "Table", methods: Sequence[str]) -> list[str]:
    """What failed: one sentence per reason, since a damaged image fails with every method."""
    reasons: dict[str, dict[str, int]] = {}
    for method, its in table.failed.items():
        for reason, count in its.items():
            reasons.setdefault(reason, {})[method] = count
    return [
        f"{'all methods' if len(methods) > 1 and set(counts) == set(methods) else ', '.join(counts)}: "
        f"{sum(counts.values())} figures missing: {reason}"
        for reason, counts in reasons.items()
    ]
