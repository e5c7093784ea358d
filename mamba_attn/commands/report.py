"""``mamba-attn report``: arguments, and the page it writes."""

import argparse
import os
import sys
from pathlib import Path

from mamba_attn.commands.exit_codes import as_flags
from mamba_attn.commands.options import Commands, command, require_least
from mamba_attn.core.requirements import require_extras
from mamba_attn.errors import local_path

_NEEDED = {"zarr": "zarr", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}
_METHODS = ("pca", "tsne", "umap")
_EXAMPLES = """\
store --out report.html
store --out small.html --size 2 --method pca tsne
store1 store2 --out both.html --size 20 --images 8"""
_NOTES = """\
The page of mamba-attn explore in one file, for grids of up to 32 x 32 patches.
It needs no server and no network: send it, or open it from disk. It contains
the images that it shows, and the names of all.

The most important parts go in first: the means of the blocks, their points,
one image, then, small grids first, the means of each route and the other
--images kept by collect --keep. The page and the command list what does not
fit into --size, and which --size or --images would include it.
"""


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands,
        "report",
        "freeze the explorer's page into one file that needs no server",
        examples=_EXAMPLES,
        notes=_NOTES,
        run=run,
    )
    add = parser.add_argument
    add("store", nargs="+", metavar="STORE", help="made by mamba-attn collect; several share one page")
    add("--out", required=True, metavar="FILE", help="the page, e.g. report.html; an older one is replaced")
    add("--method", nargs="+", default=["pca"], choices=_METHODS, help="of dimension reduction; default: pca")
    add("--images", type=int, default=4, metavar="N", help="images kept in full to show, per store; default: 4")
    add("--size", type=float, default=8.0, metavar="MB", help="largest size of the page in 10^6 bytes; default: 8")


def run(args: argparse.Namespace) -> int:
    """Write the page; print what it leaves out."""
    require_extras(_NEEDED, "analytics")
    from rich.console import Console
    from rich.progress import Progress

    from mamba_attn.analytics import AttentionStore
    from mamba_attn.analytics.index import package_version
    from mamba_attn.viewer.report.content import make

    if not 0.5 <= args.size <= 1000:
        raise ValueError(f"--size {args.size:g}: expected 10^6 bytes, from 0.5 to 1000.")
    require_least(args, images=0)
    path = _file(args.out)
    stores = [AttentionStore.open(store) for store in args.store]
    methods = list(dict.fromkeys(args.method))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("report", total=None)
        text, content = make(
            stores,
            methods,
            args.images,
            args.size,
            f"mamba_attn {package_version()}",
            advance=lambda what: progress.update(task, description=f"report, {what}"),
        )
    _replace(path, text)
    for note in content.notes:
        print(as_flags(note, vars(args)), file=sys.stderr)
    print(f"{len(text.encode()) / 1e6:.1f} MB, {len(content.matrices)} matrices; open {path}")
    return 0


def _file(out: str) -> Path:
    path = local_path("out", out)
    if path.is_dir():
        raise IsADirectoryError(f"--out {out}: this is a folder; give a file, e.g. {path / 'report.html'}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {str(path.parent)!r}.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--out {out}: this folder is not writable; choose another.")
    return path


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically: after an error the old one is still there."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
