"""The part of ``compare`` that is about texts: what its arguments mean there, the run, its files."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mamba_attn.commands.ranks import left_to_others
from mamba_attn.commands.terminal import plain, progress_bar, say, show
from mamba_attn.core.requirements import writable
from mamba_attn.errors import nearest

if TYPE_CHECKING:
    from mamba_attn.distributed import Ranks
    from mamba_attn.evaluation.specs import Model
    from mamba_attn.evaluation.summary import Table
    from mamba_attn.evaluation.texts import TextPlan

STORE = "measured.jsonl"
_OF_IMAGES = {"half": "all", "precision": "float32", "workers": 1, "budget": None, "sanity_images": 8, "pictures": 6}


def run_texts(args: argparse.Namespace, models: "Sequence[Model]", ranks: "Ranks") -> int:
    """Measure what is missing, then print and write everything; the exit code says whether something failed.

    Args:
        args: of the command.
        models: that read text.
        ranks: this process among all.
    """
    from mamba_attn.evaluation.specs import choose_methods, with_control
    from mamba_attn.evaluation.store import Store
    from mamba_attn.evaluation.tables import TEXT_LEGEND, published_of_texts, text_tables
    from mamba_attn.evaluation.texts import measure_texts

    wrong = [f"--{name.replace('_', '-')}" for name, default in _OF_IMAGES.items() if getattr(args, name) != default]
    wrong += ["--target"] if args.target != "predicted" else []
    if wrong:
        raise ValueError(f"{wrong[0]}: this is for images, and {models[0].name} reads text; leave it out.")
    asked, most, unasked = choose_methods(args.methods or ["all"])
    methods = with_control(asked)
    if most:
        raise ValueError(f"methods={next(iter(most))!r}: numbers of images after @ are for images; use limit.")
    measures = None if args.measures == "all" else [name.strip() for name in args.measures.split(",")]
    plan = text_plan(models, args.data or None, methods, unasked, measures, args.fill, args.limit, args.seed)
    folder = writable(args.out)
    store = Store(folder / STORE, shared=ranks.world > 1)
    with progress_bar() as progress:
        bar = progress.add_task("comparing", total=None, visible=ranks.reports)
        tables = measure_texts(
            plan, store, lambda name, done, of: progress.update(bar, description=name, completed=done, total=of), ranks
        )
    if plan.left or not ranks.reports:
        return left_to_others(ranks, plan.left, folder)
    for title, header, rows in [*text_tables(tables), *published_of_texts(tables)]:
        show(title, header, rows)
    print()
    say(TEXT_LEGEND)
    notes, failed = write_texts(plan, tables, folder, args.call)
    for note in notes:
        say(f"note: {note}")
    print(f"open {folder / 'compare.html'}")
    return 1 if failed and ranks.launcher != "torchrun" else 0  # which would start all again


def text_plan(
    models: "Sequence[Model]",
    data: Any,
    methods: Sequence[str],
    unasked: set[str],
    measures: Sequence[str] | None,
    fill: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> "TextPlan":
    """Return the plan of a comparison on texts.

    Args:
        models: that read text.
        data: files, tasks ("copying", "recall"), or lists of texts; None for the tasks that the models learnt.
        methods: keys.
        unasked: methods that were not named.
        measures: names; None for all.
        fill: "unknown" or "drop"; None for the first.
        limit: texts per collection.
        seed: of all random numbers.

    Raises:
        ValueError: a measure or fill that texts do not have; no texts.
    """
    from mamba_attn.datasets.texts import TASKS, open_texts
    from mamba_attn.evaluation.texts import DROP, MEASURES, UNKNOWN, TextPlan

    for name in measures or ():
        if name not in MEASURES:
            raise ValueError(f"measures={name!r}: texts have no such measure. {nearest(name, MEASURES)}")
    if fill not in (None, UNKNOWN, DROP):
        raise ValueError(f"fill={fill!r}: this is for images; for texts, use {UNKNOWN!r} or {DROP!r}.")
    if data is None:
        learnt = {model: task for task, model in TASKS.items()}
        other = [model.name for model in models if model.name not in learnt]
        if other:
            raise ValueError(
                f"data: {other[0]} was not trained on a task with known answers; give a text file, one text per line."
            )
        data = [learnt[model.name] for model in models]
    found = [open_texts(each) for each in dict.fromkeys(data)]
    return TextPlan(models, found, methods, unasked, measures or MEASURES, fill or UNKNOWN, limit, seed)


def write_texts(plan: "TextPlan", tables: "Sequence[Table]", folder: Path, call: str) -> tuple[list[str], bool]:
    """Write compare.html, .txt, .csv and .json; return the notes on them, and whether something failed.

    Args:
        plan: the comparison.
        tables: its figures.
        folder: where to.
        call: how to make them again.
    """
    import torch

    from mamba_attn.evaluation.page import text_page
    from mamba_attn.evaluation.tables import TEXT_LEGEND, as_csv, as_json, published_of_texts, text_tables

    failed = [
        f"{table.model.name}, {table.data.name}, {name}: {count} texts missing: {reason}"
        for table in tables
        for name, reasons in table.failed.items()
        for reason, count in reasons.items()
    ]
    flags = [f"{table.model.name}, {table.data.name}: {flag}" for table in tables for flag in table.flags]
    notes = [*dict.fromkeys([*plan.notes, *flags, *failed])]
    about: dict[str, Any] = {
        "command": call, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "options": {"fill": plan.fill, "seed": plan.seed}, "notes": notes,
    }  # fmt: skip
    shown = [*text_tables(tables), *published_of_texts(tables)]
    files = {
        "compare.txt": "\n".join([*(plain(*each) for each in shown), TEXT_LEGEND, *notes, ""]),
        "compare.csv": as_csv(tables),
        "compare.json": as_json(tables, about, {}),
        "compare.html": text_page(plan, tables, about),
    }
    write_files(folder, files)
    return notes, bool(failed)


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write texts, each in one step: several jobs of an array may find everything there and write at once.

    Args:
        folder: where to.
        files: texts by name.
    """
    from mamba_attn.analytics.places import LocalPlace

    for name, text in files.items():
        LocalPlace(folder).replace(name, text.encode())


def compared_texts(plan: "TextPlan", out: str | Path | None, call: str) -> "list[Table]":
    """Run a plan, and write its files where there is a folder.

    Args:
        plan: the comparison.
        out: the folder; None writes nothing.
        call: how to make them again.
    """
    from mamba_attn.evaluation.store import Store
    from mamba_attn.evaluation.texts import measure_texts

    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if out is None else writable(str(out))
        tables = measure_texts(plan, Store(folder / STORE))
        if out is not None:
            write_texts(plan, tables, folder, call)
    return tables
