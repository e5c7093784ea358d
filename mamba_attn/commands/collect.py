"""``mamba-attn collect``: its arguments, the run, what it says.

Exit codes: 0 all done, 1 some images could not be used, 2 nothing was done because of how it was called, 130 stopped by
the user.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from mamba_attn.core.requirements import exit_code, require_extras, subcommand

if TYPE_CHECKING:
    from mamba_attn.analytics.collecting import Collected
    from mamba_attn.analytics.request import Request

_NEEDED = {"zarr": "zarr", "PIL": "pillow", "rich": "rich"}
_SHOWN = 10
_PARAMETERS_PER_THREAD = 5_000_000  # threads that share less wait for each other longer than they work
_EPILOG = """\
data: a folder of images, with or without class folders; a zip of them; ZIP:PART, a folder in it. Images are taken in
the order of the hashes of their names, so that the first N are a fair sample.

STORE receives, per layer, the mean and variance of the attention over the images (of every route and of their sum), the
moments of the states, a row of features per image, what the model saw of each, and with --keep the matrices of the
first N in full, or of the images that are named: by their path in the folder or zip, or the end of it. Called again, or
after a kill, the same command goes on from there; a larger --limit adds images.
--merge makes one store of two that were collected from the same model on other images.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = subcommand(commands, "collect", "the attention of a model over many images, into a store", _EPILOG)
    add = parser.add_argument
    add("--model", default="vim_micro", metavar="NAME", help="default: vim_micro")
    add("--weights", default="demo", metavar="demo|FILE|official", help="default: demo, those of this package")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR|ZIP[:PART]|FILE.mat", help="the images")
    source.add_argument("--merge", nargs=2, metavar="STORE", help="two stores, instead of images")
    add("--limit", type=int, metavar="N", help="images; default: all")
    add("--out", required=True, metavar="STORE", help="a folder, new or of a store to go on with")
    add("--keep", default="0", metavar="N|NAME,NAME", help="matrices kept in full: of the first N images, or of those "
        "named; default: 0")  # fmt: skip
    add("--batch", type=int, metavar="N", help="images at once; default: what the matrices' size allows")
    add("--layer", nargs="+", action="extend", metavar="LAYER", help="names or patterns; default: all")
    add("--routes", default="each", choices=("each", "sum"), help="statistics of each route, or of their sum alone; "
        "default: each")  # fmt: skip
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Do what the arguments say, and return the exit code."""
    stopped = "stopped; the same command goes on from the last checkpoint."
    return exit_code("collect", lambda: _run(args, f"mamba-attn {shlex.join(command)}"), stopped)


def _run(args: argparse.Namespace, command: str) -> int:
    require_extras(_NEEDED, "analytics")
    return _merge(args) if args.merge else _collect(_request(args, command), args.out)


def _request(args: argparse.Namespace, command: str) -> "Request":
    from mamba_attn.analytics.request import Request, keep_from
    from mamba_attn.datasets import loaded_model, open_data

    data = open_data(args.data)  # before the model, which takes longer
    keep = keep_from(args.keep, data, args.limit)
    subject = loaded_model.load(args.model, args.weights, args.device)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), subject.parameters // _PARAMETERS_PER_THREAD)))
    return Request(
        subject, data, args.limit, keep, args.batch, args.layer,
        args.routes, command=command,
    )  # fmt: skip


def _collect(request: "Request", out: str) -> int:
    from rich.console import Console

    from mamba_attn.analytics.collecting import collect
    from mamba_attn.core.terminal import bar

    progress = bar(Console(stderr=True))
    task = progress.add_task("collecting", total=None)
    with ExitStack() as shown:

        def advance(done: int, wanted: int) -> None:
            if not progress.live.is_started:  # not before: what is refused shows no bar
                shown.enter_context(progress)
            progress.update(task, completed=done, total=wanted)

        found = collect(request, out, advance=advance)
    return _report(found, out)


def _report(found: "Collected", out: str) -> int:
    for reason in list(found.unreadable.values())[:_SHOWN]:
        print(f"skipped: {reason}", file=sys.stderr)
    more = len(found.unreadable) - _SHOWN
    if more > 0:
        print(f"skipped: {more} more; store.json lists all.", file=sys.stderr)
    skipped = f", {len(found.unreadable)} skipped" if found.unreadable else ""
    print(f"{found.new} images added, {found.counted} in {out}{skipped}")
    return 1 if found.unreadable else 0


def _merge(args: argparse.Namespace) -> int:
    from mamba_attn.analytics.merging import merge_stores

    count = merge_stores(args.merge[0], args.merge[1], args.out)
    print(f"{count} images in {args.out}")
    return 0
