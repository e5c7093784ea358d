"""``mamba-attn collect``: arguments, the run, its report."""

import argparse
import shlex
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mamba_attn.commands.exit_codes import as_flags
from mamba_attn.commands.options import (
    Commands,
    add_limit,
    add_model,
    command,
    load_model,
    settle_threads,
    spelt_model,
)
from mamba_attn.commands.terminal import progress_bar
from mamba_attn.core.requirements import require_extras

if TYPE_CHECKING:
    from mamba_attn.analytics.collecting import Collected
    from mamba_attn.analytics.request import Request
    from mamba_attn.distributed import Ranks

_NEEDED = {"zarr": "zarr", "PIL": "pillow", "rich": "rich"}
_SHOWN = 10
_EXAMPLES = """\
--data photos --out store
--data photos.zip --limit 200 --keep 4 --out store
--data imagenet/train --out s3://bucket/store --plan
--merge store1 store2 --out both"""
_NOTES = """\
data: a folder of images, with or without class folders; a zip of them;
ZIP:PART, a folder in a zip. Images come in the order of the hashes of their
names: the first N are a fair sample.

STORE receives, per layer, the mean and variance of the attention over images
(of every route and of their sum) and the moments of the states; and of the
first 10,000 images, or as many as --features says, a row of features and what
the model saw: these are the images that explore, report and findings show.
--keep adds the full matrices of the first N images, or of the images you name:
by path in the folder or zip, or any unique suffix of it.

A store is a list of parts of --part images. Started by torchrun, by srun or as
a job array, every process makes some of them, on the GPU of its own; numbers
do not depend on how many there are:

  torchrun --nproc-per-node 8 -m mamba_attn collect --device cuda \\
    --data photos --out store

After an interruption the same command
resumes at the parts that were not finished; a larger --limit adds images.
--merge combines stores of the same model, collected on different images; of
one store of an older version it makes one of today's.
"""


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands,
        "collect",
        "save the attention of a model over many images, in a store",
        examples=_EXAMPLES,
        notes=_NOTES,
        run=run,
        stopped="stopped; the same command resumes at the last part.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR|ZIP[:PART]|MAT", help="the images")
    source.add_argument("--merge", nargs="+", metavar="OLD", help="stores, instead of images")
    add("--out", required=True, metavar="STORE", help="a new folder, an address (s3://...), or a store to resume")
    add_model(parser)
    add_limit(parser)
    add(
        "--keep",
        default="0",
        metavar="N|NAME,NAME",
        help="keep the matrices of the first N images, or of these images; default: 0",
    )
    add(
        "--features",
        metavar="N|all",
        help="store features and pixels of the first N images; default: 10000, or what STORE has",
    )
    add("--batch", type=int, metavar="N", help="images at once; default: what the matrices' size allows")
    add("--layer", nargs="+", action="extend", metavar="LAYER", help="names or patterns; default: all")
    add("--part", type=int, metavar="N", help="images of a part, which a kill loses at most; default: 64 to 1,024")
    add("--workers", type=int, metavar="N", help="processes that decode images; default: 4 beside a GPU, else none")
    add("--plan", action="store_true", help="print images, bytes, files, seconds and ranks, and collect nothing")
    add(
        "--routes",
        default="each",
        choices=("each", "sum"),
        help="statistics of each route, or of their sum alone; default: each",
    )


def run(args: argparse.Namespace) -> int:
    """Collect, or merge stores."""
    require_extras(_NEEDED, "analytics")
    if args.merge and args.plan:
        raise ValueError("--plan: it is about images, and --merge has none; leave one of them out.")
    if args.merge:
        return _merge(args)
    from mamba_attn.analytics.places import place
    from mamba_attn.distributed import Ranks

    place("out", args.out)  # before the data and the model, which take longer
    ranks = Ranks.here()
    request = _request(args, ranks)
    return _plan(request, args.out, ranks) if args.plan else _collect(request, args.out, args, ranks)


def _request(args: argparse.Namespace, ranks: "Ranks") -> "Request":
    from mamba_attn.analytics.request import Request, keep_from
    from mamba_attn.datasets import open_data

    data = open_data(args.data)  # before the model, which takes longer
    keep = keep_from(args.keep, data, args.limit)
    args.device = ranks.device(args.device)
    subject = load_model(args)
    settle_threads([subject.parameters], cores=ranks.cores)
    return Request(
        subject,
        data,
        args.limit,
        keep,
        args.batch,
        args.layer,
        args.routes,
        command=args.call,
        part=args.part,
        workers=args.workers,
        features=_features(args.features),
    )


def _features(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"--features {text}: expected a number from 0 on, or all.")
    return int(text)


def _collect(request: "Request", out: str, args: argparse.Namespace, ranks: "Ranks") -> int:
    from mamba_attn.analytics.collecting import collect

    if ranks.launcher and not ranks.together:  # every process has a terminal, or a file, of its own
        print(f"mamba-attn collect: rank {ranks.rank} of {ranks.world} ({ranks.launcher})", file=sys.stderr)
    progress = progress_bar()
    task = progress.add_task("collecting", total=None)
    with ExitStack() as shown:

        def advance(done: int, wanted: int) -> None:
            if ranks.together and not ranks.first:
                return  # one bar for all
            if not progress.live.is_started:  # not earlier: refused requests show no bar
                shown.enter_context(progress)
            progress.update(task, completed=done, total=wanted)

        found = collect(request, out, advance=advance, ranks=ranks)
    if ranks.together and not ranks.first:
        return 0
    skipped = _report(found, out, _next(request, out, args))
    return 0 if ranks.launcher == "torchrun" else skipped  # which would start all again


def _plan(request: "Request", out: str, ranks: "Ranks") -> int:
    from mamba_attn.analytics.planning import plan

    if ranks.first:
        for line in plan(request, out, ranks).lines():
            print(line)
    return 0


def _next(request: "Request", out: str, args: argparse.Namespace) -> str:
    """Return the command to type next; code of the user's has to be named again."""
    from mamba_attn.datasets.user_code import names_code

    again = f" {spelt_model(args)}" if names_code(request.subject.spec) else ""
    return f"mamba-attn explore {shlex.quote(out)}{again}"


def _report(found: "Collected", out: str, then: str) -> int:
    for reason in list(found.unreadable.values())[:_SHOWN]:
        print(f"skipped: {as_flags(reason, ('range',))}", file=sys.stderr)
    more = len(found.unreadable) - _SHOWN
    if more > 0:
        print(f"skipped: {more} more; AttentionStore.open(...).unreadable lists all.", file=sys.stderr)
    skipped = f", {len(found.unreadable)} skipped" if found.unreadable else ""
    if found.left:
        parts = "1 part is" if found.left == 1 else f"{found.left} parts are"
        then = f"{parts} left to other processes, or to the same command once they have ended"
    else:
        then = f"next: {then}"
    print(f"{found.new} images added, {found.counted} in {out}{skipped}; {then}")
    return 1 if found.unreadable else 0


def _merge(args: argparse.Namespace) -> int:
    from mamba_attn.analytics.merging import merge_stores

    count = merge_stores(args.merge, args.out)
    print(f"{count} images in {args.out}; next: mamba-attn explore {shlex.quote(args.out)}")
    return 0
