"""``mamba-attn findings``: arguments, the stores, its files."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_attn.commands.compare_texts import write_files
from mamba_attn.commands.options import Commands, add_folder, add_model, command, open_stores, require_least
from mamba_attn.commands.ranks import left_to_others, ranks_bar
from mamba_attn.commands.terminal import plain, show
from mamba_attn.core.requirements import require_extras, writable
from mamba_attn.errors import nearest

if TYPE_CHECKING:
    from mamba_attn.analytics.store import AttentionStore
    from mamba_attn.distributed import Ranks
    from mamba_attn.findings.accuracy import Orders
    from mamba_attn.findings.controls import Report

_NEEDED = {"zarr": "zarr", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}
_EXAMPLES = """\
store
store --model net.py:build --weights best.pth
raster morton --seeds 5 --accuracy raster=71.5
store --trained store=seed_1.pth --seeds 40"""
_NOTES = """\
STORE: a folder made by mamba-attn collect. Rebuilds its model and compares
it, on the store's own images, with randomly initialised copies and with
itself under a random scan order. A number counts as outside the range
expected of untrained models by Student's t over their seeds, with Holm's
correction: this is about one trained model. To say what training does, give
--trained weights of further training runs. A model that cannot be rebuilt is
measured by what its store kept.

Writes to FOLDER: findings.html (an offline page), findings.txt, findings.csv,
findings.json and matrices.png; and measured/, each model's results, from which
the same command resumes after an interruption. Started by torchrun, by srun or
as a job array, every process measures some of the images of each model.
"""


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    what = "measure patterns of attention and compare them with those of untrained models"
    parser = command(
        commands,
        "findings",
        what,
        examples=_EXAMPLES,
        notes=_NOTES,
        run=run,
        stopped="stopped; the same command resumes at the last part.",
    )
    add = parser.add_argument
    add("store", nargs="+", metavar="STORE", help="made by mamba-attn collect")
    add_folder(parser, "mamba_attn_findings")
    add(
        "--seeds",
        type=int,
        default=20,
        metavar="N",
        help="randomly initialised copies, at least 2 for a range; default: 20",
    )
    add(
        "--trained",
        action="append",
        default=[],
        metavar="NAME=WEIGHTS",
        help="weights of another training of a store's model, with another seed; may be repeated",
    )
    add("--images", type=int, metavar="N", help="the first N of each store; default: all")
    add(
        "--accuracy",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="top-1 of a store's model in percent; default: what the card next to its weights says",
    )
    add_model(parser, None)


def run(args: argparse.Namespace) -> int:
    """Measure every store and its controls, then print and write everything."""
    require_extras(_NEEDED, "analytics")
    import torch

    from mamba_attn.datasets.loading import require_device
    from mamba_attn.distributed import Ranks
    from mamba_attn.findings.accuracy import over_orders

    ranks = Ranks.here()
    args.device = ranks.device(args.device)
    require_device(args.device)
    require_least(args, seeds=0, images=1)
    stores = named(args.store, args)
    accuracies = _accuracies(args.accuracy, stores)
    trained = _trained(args.trained, stores)
    folder = writable(args.out)
    torch.set_num_threads(1)  # small models: threads would wait for each other longer than they work
    reports = _measured(stores, accuracies, folder / "measured", args, trained, ranks)
    left = sum(report.left for report in reports)
    if left or not ranks.reports:
        return left_to_others(ranks, left, folder)
    orders = over_orders(reports)
    write(folder, reports, orders, stores, args.call)
    for report in reports:
        for note in report.notes:
            print(f"{report.name}: {note}", file=sys.stderr)
    print(f"open {folder / 'findings.html'}")
    failed = any("not measured" in note for report in reports for note in report.notes)
    return 1 if failed and ranks.launcher != "torchrun" else 0  # which would start all again


def named(paths: Sequence[str], args: argparse.Namespace | None = None) -> "dict[str, AttentionStore]":
    """Open stores by the names of their folders; names include as much of the path as needed to differ.

    Args:
        paths: of the stores.
        args: of the command, which may name their model.

    Raises:
        ValueError: a store is named twice.
        StoreError: a folder is not a store, or half written, damaged or of another version.
    """
    from mamba_attn.analytics.places import LocalPlace, place

    places = [place("store", path) for path in paths]
    folders = [each.path.resolve() if isinstance(each, LocalPlace) else Path(str(each)) for each in places]
    twice = next((path for path in folders if folders.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice}: this store is named twice.")
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    opened = open_stores(places, args or argparse.Namespace(model=None))
    return {"/".join(folder.parts[-parts:]): store for folder, store in zip(folders, opened, strict=True)}


def write(
    folder: Path,
    reports: "Sequence[Report]",
    orders: "Sequence[Orders]",
    stores: "dict[str, AttentionStore]",
    command: str,
) -> None:
    """Print the tables, and write findings.html, .txt, .csv, .json and matrices.png.

    Args:
        folder: where to.
        reports: of the stores.
        orders: what goes with accuracy.
        stores: by name.
        command: how to reproduce them.

    Raises:
        OSError: the folder cannot be written.
    """
    from mamba_attn.figures.png import save_png
    from mamba_attn.findings import tables
    from mamba_attn.findings.page import matrices_rgb, page

    every = [tables.summary(report) for report in reports]
    every += [tables.side_by_side(reports)] if len(reports) > 1 else []
    every += [tables.orders_table(each) for each in orders]
    sentences = [tables.orders_sentence(each) for each in orders]
    for each in every:
        show(*each)
    for report in reports:
        print("", *tables.verdicts(report), sep="\n")
    for sentence in sentences:
        print(f"\n{sentence}")
    notes = [f"{report.name}: {note}" for report in reports for note in report.notes]
    text = "".join(plain(*each) for each in every) + "\n" + "\n\n".join([*sentences, *notes, tables.LEGEND, command])
    found = json.dumps(tables.finite(tables.as_json(reports, orders, {"command": command})), indent=1, allow_nan=False)
    save_png(folder / "matrices.png", matrices_rgb(stores))
    files = {"txt": f"{text}\n", "csv": tables.as_csv(reports), "json": f"{found}\n"}
    files["html"] = page(reports, orders, stores, command)
    write_files(folder, {f"findings.{kind}": content for kind, content in files.items()})


def _measured(
    stores: "dict[str, AttentionStore]",
    accuracies: dict[str, float],
    folder: Path,
    args: argparse.Namespace,
    trained: dict[str, list[str]],
    ranks: "Ranks",
) -> "list[Report]":
    from mamba_attn.findings.accuracy import known_accuracy
    from mamba_attn.findings.controls import counted, report, steps

    reports = []
    for name, store in stores.items():
        count = counted(store, args.images)
        weights = trained.get(name, [])
        whole = steps(store, count, args.seeds, len(weights))
        with ranks_bar(ranks, name) as advance:
            found = report(
                name,
                store,
                folder,
                images=args.images,
                seeds=args.seeds,
                weights=weights,
                advance=lambda: advance(min(whole, ranks.count(name, 1)), whole),  # noqa: B023
                ranks=ranks,
                device=args.device,
            )
        if found.rows:
            found.accuracy = accuracies.get(name, known_accuracy(store))
            cards = [known_accuracy(store, path) for path in weights]
            found.other_accuracies = [accuracy for accuracy in cards if accuracy is not None]
        reports.append(found)
    return reports


def _accuracies(texts: Sequence[str], stores: "dict[str, AttentionStore]") -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if name not in stores:
            raise ValueError(f"--accuracy {text}: there is no store {name!r}. {nearest(name, stores)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 100:
            raise ValueError(f"--accuracy {text}: expected NAME=VALUE, a number from 0 to 100.")
        found[name] = number
    return found


def _trained(texts: Sequence[str], stores: "dict[str, AttentionStore]") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        name, _, weights = text.partition("=")
        if name not in stores:
            raise ValueError(f"--trained {text}: there is no store {name!r}. {nearest(name, stores)}")
        if not weights:
            raise ValueError(f"--trained {text}: expected NAME=WEIGHTS, a file.")
        found.setdefault(name, []).append(weights)
    return found
