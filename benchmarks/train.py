"""Train a small model on the 20 classes of Imagenette and a clothing data set, or on digits; resumes after a kill.

    python benchmarks/train.py vim_micro --data FOLDER --out RUN64 --pixels 64 --epochs 30
    python benchmarks/train.py vim_micro --data FOLDER --out RUN128 --pixels 128 --epochs 3 --init RUN64/last.pt
    python benchmarks/train.py vim_micro --data FOLDER --out RUN --teacher benchmarks/teacher   # of distil.py
    python benchmarks/train.py vim_digits --data FOLDER --out RUN --epochs 30

A run's folder holds last.pt (checkpoint), log.jsonl and, at the end, <name>.safetensors (float16 averaged weights) and
<name>.json (the card).
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import distil, images, zoo
from benchmarks.export import evaluate, export

OPTIMIZERS = {
    "adamw": {"optimizer": "AdamW", "betas": [0.9, 0.999]},
    "muon": {"optimizer": "Muon (timm, nesterov) for matrices, AdamW for the rest", "betas": [0.9, 0.95]},
}
RECIPE = {
    "weight_decay": 0.05,
    "clip_norm": 1.0,
    "warmup": 0.15,
    "schedule": "cosine to 0",
    "label_smoothing": 0.1,
    "ema_decay": 0.999,
    "autocast": "bfloat16",
}


class Run:
    """The state of a training run: everything that a checkpoint holds, and one optimisation step.

    Args:
        args: the parsed command line.
        train: the training images.
    """

    def __init__(self, args: argparse.Namespace, train: images.Images) -> None:
        from timm.data import Mixup
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        self.args, self.train = args, train
        self.batch = min(args.batch, len(train))
        self.steps_per_epoch = len(train) // self.batch
        self.step, self.wall, self.cpu = 0, 0.0, 0.0
        self.losses: list[float] = []  # of this epoch
        options = {"num_classes": len(train.classes), "image_size": args.pixels, **args.options}
        self.model = zoo.create(args.name, drop_path=args.drop_path, weights=args.init, part=args.init_part, **options)
        self.options = options
        groups = zoo.decay_groups(self.model, RECIPE["weight_decay"])
        self.soft = distil.read(args.teacher, train) if args.teacher else None
        self.ema = ModelEmaV3(self.model, decay=RECIPE["ema_decay"], use_warmup=True)  # a copy, without a hook
        components = self.soft.hints.shape[-1] if self.soft else 0
        self.projection = distil.Projection(self.model, components) if components else None
        if self.projection is not None:
            groups.append({"params": list(self.projection.parameters()), "weight_decay": 0.0})
        betas = tuple(OPTIMIZERS[args.optimizer]["betas"])
        if args.optimizer == "muon":
            self.optimizer = create_optimizer_v2(zoo.muon_groups(groups), opt="nmuon", lr=args.lr, betas=betas)
        else:
            self.optimizer = create_optimizer_v2(groups, opt="adamw", lr=args.lr, betas=betas)
        total = args.epochs * self.steps_per_epoch
        warmup = round(RECIPE["warmup"] * total)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(total - warmup, 1),
            warmup_t=warmup,
            warmup_lr_init=1e-6,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.scheduler.step_update(0)
        self.loss = nn.CrossEntropyLoss(label_smoothing=RECIPE["label_smoothing"])
        blend = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.0, "num_classes": self.batch}
        self.mixup = Mixup(prob=args.mixup, **blend) if args.mixup else None

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.args.epochs * self.steps_per_epoch

    def advance(self) -> float:
        """One optimisation step; returns its loss."""
        args, (epoch, place) = self.args, divmod(self.step, self.steps_per_epoch)
        chosen = images.chosen(self.train, self.batch, args.seed, epoch, place, args.balance)
        crops, taught, hints = self.soft.of(epoch, chosen) if self.soft else (None, None, None)
        x, y = images.train_batch(self.train, args.pixels, chosen, args.seed, epoch, place, crops)
        torch.manual_seed(
            args.seed * 1_000_003 + self.step
        )  # drop path; from the step alone, so that resuming is exact
        np.random.seed((args.seed, self.step))  # timm's mixup draws from the global generator
        mixing = None
        if self.mixup is not None:  # with images as classes it answers each image's share in each blend
            x, mixing = self.mixup(x, torch.arange(self.batch))
            y = mixing @ F.one_hot(y, len(self.train.classes)).float()
        self.model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(x)
        loss: Tensor = self.loss(logits.float(), y)
        if taught is not None:
            loss = distil.loss(logits.float(), taught, loss, mixing)
        if self.projection is not None and hints is not None:
            loss = loss + distil.hint_loss(self.projection(), hints, mixing)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.step}: lower --lr (it was {args.lr}) and take another --out."
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), RECIPE["clip_norm"])
        self.optimizer.step()
        self.step += 1
        self.scheduler.step_update(self.step)
        self.ema.update(self.model, step=self.step)
        return loss.item()

    def identity(self) -> dict[str, Any]:
        """What may not change between a checkpoint and its continuation."""
        keys = (
            "name",
            "pixels",
            "epochs",
            "batch",
            "lr",
            "optimizer",
            "drop_path",
            "mixup",
            "balance",
            "seed",
            "options",
        )
        crops = self.soft.card["crops"] if self.soft else 0
        hints = self.soft.hints.shape[-1] if self.soft else 0
        return {
            **{key: getattr(self.args, key) for key in keys},
            "images": len(self.train),
            "crops": crops,
            "hints": hints,
        }

    def recipe(self) -> dict[str, Any]:
        """What a card says of the training."""
        varied = self.train.collection.augmentation
        recipe = {
            **OPTIMIZERS[self.args.optimizer],
            **RECIPE,
            "drop_path": self.args.drop_path,
            "balance": self.args.balance,
        }
        if self.soft is None:
            return {**recipe, "augmentation": varied}
        varied = f"{varied}; {self.soft.card['crops']} fixed crops of each image, by turns"
        return {**recipe, "augmentation": varied, "teacher": self.soft.card}

    def save(self, path: Path) -> None:
        """Write the checkpoint; a kill at any moment leaves the old or the new one."""
        state = {
            "identity": self.identity(),
            "step": self.step,
            "losses": self.losses,
            "wall": self.wall,
            "cpu": self.cpu,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "projection": self.projection.state_dict() if self.projection else {},
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it belongs to a run with other arguments.
        """
        state = torch.load(path, weights_only=True)
        mine = self.identity()
        other = {key: value for key, value in state["identity"].items() if mine.get(key) != value}
        if other:
            raise ValueError(
                f"{path} belongs to a run with {other}, this one has { {key: mine.get(key) for key in other} }: "
                "give the same arguments or another --out."
            )
        self.step, self.wall, self.cpu = state["step"], state["wall"], state["cpu"]
        self.losses = state.get("losses", [])
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.projection is not None:
            self.projection.load_state_dict(state["projection"])
        self.scheduler.step_update(self.step)


class Log:
    """log.jsonl, plain lines, and a progress bar where there is a terminal."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.bar, self.task = path, None, None
        if sys.stdout.isatty():
            from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*Progress.get_default_columns()[:2], *columns)
            self.task = self.bar.add_task("steps", total=total)

    def context(self) -> AbstractContextManager[object]:
        """Show the bar while this is open."""
        return self.bar or nullcontext()

    def advance(self, step: int, loss: float) -> None:
        """Move the bar."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, description=f"loss {loss:.3f}")

    def write(self, **entry: object) -> None:
        """Append an entry to the file and show it."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        say: Callable[..., None] = print if self.bar is None else self.bar.print
        say(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items()
            )
        )
        sys.stdout.flush()


def fit(run: Run, val: images.Images, log: Log, checkpoint: Path, minutes: float | None) -> bool:
    """Train to the end, or for some minutes; returns whether the run is complete."""
    started = saved = time.monotonic()
    wall, cpu = run.wall, run.cpu - time.process_time()
    while run.step < run.total:
        run.losses.append(run.advance())
        log.advance(run.step, run.losses[-1])
        now = time.monotonic()
        run.wall, run.cpu = wall + now - started, cpu + time.process_time()
        epoch_ended = run.step % run.steps_per_epoch == 0
        if epoch_ended:
            epoch = run.step // run.steps_per_epoch
            entry: dict[str, Any] = {"epoch": epoch, "step": run.step, "loss": sum(run.losses) / len(run.losses)}
            if epoch % run.args.val_every == 0 or run.step == run.total:
                entry["top1"] = evaluate(run.ema.module, val, run.args.pixels)["top1"]
            lr = run.optimizer.param_groups[0]["lr"]
            log.write(**entry, lr=lr, cpu_s=round(run.cpu, 1), wall_s=round(run.wall, 1))
            run.losses = []
        out_of_time = minutes is not None and now - started > 60 * minutes
        if epoch_ended or out_of_time or now - saved > 60 * run.args.checkpoint_minutes:
            run.save(checkpoint)
            saved = time.monotonic()
        if out_of_time:
            return run.step == run.total
    return True


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", help="vim_micro, vmamba_micro, vit_micro, those with _digits, or any name of mamba_attn.models")
    add(
        "--data",
        type=Path,
        required=True,
        help="folder with imagenette128.zip and clothing128.zip; for digits localise.zip",
    )
    add("--out", type=Path, required=True, help="folder of the run; a run found there is continued")
    add("--cache", type=Path, help="folder of the decoded images; default: cache, next to --out")
    add("--pixels", type=int, default=64)
    add("--epochs", type=int, default=30)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=2e-3)
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--drop-path", type=float, default=0.05, help="rate of stochastic depth; 0 for a model that does not overfit")
    add("--mixup", type=float, default=0.0, help="share of the batches that mixup (0.2) or cutmix (1.0) blends")
    add("--balance", type=float, default=0.0, help="show images of a class of n in proportion to n ** -balance")
    add("--teacher", type=Path, help="folder of distil.py: learn from its soft targets, on its crops")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="two runs of one thread each beat one run of two")
    add("--init", help="start from these weights, of any resolution (safetensors, or last.pt of another run)")
    add("--init-part", action="store_true", help="take of --init what has a place: of a deeper model, of other classes")
    add("--minutes", type=float, help="stop after this time, with a checkpoint; call again to resume")
    add("--checkpoint-minutes", type=float, default=5.0)
    add("--val-every", type=int, default=1, help="validate every N epochs")
    add("--limit", type=int, help="use only N images of each split (smoke tests)")
    add("--options", type=json.loads, default={}, help="JSON object of further model options")
    add("--export", action="store_true", help="write the averaged weights of an unfinished run, and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, then export."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    cache = args.cache or args.out.resolve().parent / "cache"
    collection = "digits" if args.name.endswith("_digits") else "objects"
    train, val = (images.load(args.data, cache, split, args.limit, collection) for split in ("train", "val"))
    run = Run(args, train)
    checkpoint = args.out / "last.pt"
    if checkpoint.is_file():
        run.resume(checkpoint)
    log = Log(args.out / "log.jsonl", run.total)
    complete = True
    if not args.export:
        parameters = sum(p.numel() for p in run.model.parameters())
        print(
            f"{args.name}: {parameters:,} parameters, step {run.step} of {run.total}, {len(train)} images", flush=True
        )
        with log.context():
            complete = fit(run, val, log, checkpoint, args.minutes)
    if complete:
        card = export(run, val, run.recipe(), argv or sys.argv[1:])
        print(f"{args.out}/{args.name}.safetensors: top-1 {card['top1']:.2f} %")


if __name__ == "__main__":
    main()
