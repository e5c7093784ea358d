"""``mamba-attn collect``: arguments, the run, its report."""

import argparse
import shlex
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

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

_NEEDED = {"zarr": "zarr", "PIL": "pillow", "rich": "rich"}
_SHOWN = 10
_EXAMPLES = """\
--data photos --out store
--data photos.zip --limit 200 --keep 4 --out store
--model hf:./my-model --data photos --out store
--merge store1 store2 --out both"""
_NOTES = """\
data: a folder of images, with or without class folders; a zip of them;
ZIP:PART, a folder in a zip. Images come in the order of the hashes of their
names: the first N are a fair sample.

STORE receives, per layer, the mean and variance of the attention over images
(of every route and of their sum), the moments of the states, a row of features
per image, and the images as the model saw them. --keep adds the full matrices
of the first N images, or of the images you name: by path in the folder or zip,
or any unique suffix of it. After an interruption the same command resumes; a
larger --limit adds images. --merge combines two stores of the same model,
collected on different images.
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
        stopped="stopped; the same command resumes at the last checkpoint.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR|ZIP[:PART]|FILE.mat", help="the images")
    source.add_argument("--merge", nargs=2, metavar="STORE", help="two stores, instead of images")
    add("--out", required=True, metavar="STORE", help="a new folder, or a store to resume")
    add_model(parser)
    add_limit(parser)
    add(
        "--keep",
        default="0",
        metavar="N|NAME,NAME",
        help="keep the matrices of the first N images, or of these images; default: 0",
    )
    add("--batch", type=int, metavar="N", help="images at once; default: what the matrices' size allows")
    add("--layer", nargs="+", action="extend", metavar="LAYER", help="names or patterns; default: all")
    add(
        "--routes",
        default="each",
        choices=("each", "sum"),
        help="statistics of each route, or of their sum alone; default: each",
    )


def run(args: argparse.Namespace) -> int:
    """Collect, or merge two stores."""
    require_extras(_NEEDED, "analytics")
    return _merge(args) if args.merge else _collect(_request(args), args.out, args)


def _request(args: argparse.Namespace) -> "Request":
    from mamba_attn.analytics.request import Request, keep_from
    from mamba_attn.datasets import open_data

    data = open_data(args.data)  # before the model, which takes longer
    keep = keep_from(args.keep, data, args.limit)
    subject = load_model(args)
    settle_threads([subject.parameters])
    return Request(subject, data, args.limit, keep, args.batch, args.layer, args.routes, command=args.call)


def _collect(request: "Request", out: str, args: argparse.Namespace) -> int:
    from mamba_attn.analytics.collecting import collect

    progress = progress_bar()
    task = progress.add_task("collecting", total=None)
    with ExitStack() as shown:

        def advance(done: int, wanted: int) -> None:
            if not progress.live.is_started:  # not earlier: refused requests show no bar
                shown.enter_context(progress)
            progress.update(task, completed=done, total=wanted)

        found = collect(request, out, advance=advance)
    return _report(found, out, _next(request, out, args))


def _next(request: "Request", out: str, args: argparse.Namespace) -> str:
    """Return the command to type next; code of the user's has to be named again."""
    from mamba_attn.datasets.user_code import names_code

    again = f" {spelt_model(args)}" if names_code(request.subject.spec) else ""
    return f"mamba-attn explore {shlex.quote(out)}{again}"


def _report(found: "Collected", out: str, then: str) -> int:
    for reason in list(found.unreadable.values())[:_SHOWN]:
        print(f"skipped: {reason}", file=sys.stderr)
    more = len(found.unreadable) - _SHOWN
    if more > 0:
        print(f"skipped: {more} more; store.json lists all.", file=sys.stderr)
    skipped = f", {len(found.unreadable)} skipped" if found.unreadable else ""
    print(f"{found.new} images added, {found.counted} in {out}{skipped}; next: {then}")
    return 1 if found.unreadable else 0


def _merge(args: argparse.Namespace) -> int:
    from mamba_attn.analytics.merging import merge_stores

    count = merge_stores(args.merge[0], args.merge[1], args.out)
    print(f"{count} images in {args.out}; next: mamba-attn explore {shlex.quote(args.out)}")
    return 0
