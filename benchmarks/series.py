"""Train what docs/findings.md compares: models that differ in their seed alone, VMambas of more blocks, stages, orders.

    python benchmarks/series.py --data FOLDER --teacher TEACHER --runs runs [--minutes 60]
    python benchmarks/run.py findings --data FOLDER --runs runs

Every training starts from random weights, at 64 pixels, and learns from the teacher of benchmarks/distil.py. A killed
call, or one that ended after ``--minutes``, resumes; a run that has its card is left alone. Trainings are made in the
order of RUNS: each seed of all models, or orders, before the next one, so that an early end leaves pairs that can be
compared.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

from benchmarks import train

PIXELS = 64
SEEDS = (0, 1, 2)
ORDER_SEEDS = (0, 1, 2, 3, 4)
ORDERS = ("raster", "diagonal", "morton", "spiral", "random")
EPOCHS = 6
NARROW = 24  # channels of the first stage of the VMambas of several depths
DEPTHS = ((1, 1, 2, 1), (2, 2, 4, 2), (2, 2, 8, 2), (2, 2, 15, 2), (2, 2, 4, 2, 2))
LEARNING = ("--optimizer", "muon", "--lr", "2e-3", "--drop-path", "0", "--mixup", "0.3", "--val-every", str(EPOCHS))


class Training(NamedTuple):
    """One run.

    Attributes:
        folder: of the runs' folder.
        model: a name of mamba_attn.models.
        seed: of weights, order and crops of the images.
        options: of the model.
    """

    folder: str
    model: str
    seed: int
    options: dict[str, Any]


def of_seeds() -> list[Training]:
    """Return the demo models, each from several seeds."""
    models = ("vmamba_micro", "vit_micro", "vim_micro")
    return [Training(f"seeds/{model}_{seed}", model, seed, {}) for seed in SEEDS for model in models]


def of_depths() -> list[Training]:
    """Return narrow VMambas of more and more blocks, and one of five stages."""
    return [
        Training(f"depths/{'-'.join(map(str, depths))}", "vmamba_micro", 0, {"depths": list(depths), "dims": NARROW})
        for depths in DEPTHS
    ]


def of_orders() -> list[Training]:
    """Return the smallest of these VMambas in every patch order, each from several seeds."""
    options = {"depths": list(DEPTHS[0]), "dims": NARROW}
    return [
        Training(f"orders/{order}_{seed}", "vmamba_micro", seed, {**options, "order": order})
        for seed in ORDER_SEEDS
        for order in ORDERS
    ]


RUNS = (*of_depths(), *of_seeds(), *of_orders())


def command(run: Training, args: argparse.Namespace, minutes: float | None) -> list[str]:
    """Return the arguments of benchmarks/train.py.

    Args:
        run: what is trained.
        args: of this script.
        minutes: left.
    """
    given = ["--data", str(args.data), "--out", str(args.runs / run.folder), "--pixels", str(PIXELS)]
    given += ["--epochs", str(args.epochs), "--seed", str(run.seed), "--options", json.dumps(run.options), *LEARNING]
    given += [] if args.teacher is None else ["--teacher", str(args.teacher)]
    given += ["--cache", str(args.cache or args.runs / "cache")]
    given += [] if args.limit is None else ["--limit", str(args.limit)]
    return [run.model, *given, *([] if minutes is None else ["--minutes", str(minutes)])]


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with imagenette128.zip and clothing128.zip")
    add("--runs", type=Path, default=Path("runs"), help="folder of the trained models; default: ./runs")
    add("--teacher", type=Path, help="folder of distil.py")
    add("--cache", type=Path, help="folder of the decoded images; default: cache, in the folder of the runs")
    add("--only", help="runs whose folder begins so, e.g. seeds/vmamba")
    add("--epochs", type=int, default=EPOCHS)
    add("--limit", type=int, help="use only N images of each split (smoke tests)")
    add("--minutes", type=float, help="stop after this time; call again to resume")
    args = parser.parse_args(argv)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for run in RUNS:
        card = args.runs / run.folder / f"{run.model}.json"
        if card.is_file() or (args.only and not run.folder.startswith(args.only)):
            continue
        minutes = None if deadline is None else (deadline - time.monotonic()) / 60
        if minutes is not None and minutes <= 0:
            return
        print(run.folder, flush=True)
        train.main(command(run, args, minutes))


if __name__ == "__main__":
    main()
