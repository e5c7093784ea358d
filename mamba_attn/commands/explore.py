"""``mamba-attn explore``: arguments, and the server."""

import argparse
from collections.abc import Sequence
from typing import Any

from mamba_attn.commands.options import Commands, add_model, command, open_stores
from mamba_attn.commands.terminal import progress_bar
from mamba_attn.core.requirements import require_extras

NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "jinja2": "jinja2", "PIL": "pillow", "zarr": "zarr"}
_EXAMPLES = """\
                         # a bundled model on six photos
store
store --model net.py:build   # collected with your own code
store1 store2 --port 0   # side by side, on any free port"""
_NOTES = """\
A page that shows where the model looks: a photo, a selected patch, what it
takes from all others, on this photo, usually, and in every block; next to it,
patches and blocks as points. Click a patch or a point, or drag over several.
The page's address holds the whole view; "Save as one page" makes a file of it.

The explorer is reachable only from this machine, unless --host says otherwise;
anyone who reaches it sees the store's images. Ctrl+C stops it.
"""


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands,
        "explore",
        "explore attention between patches in a browser",
        examples=_EXAMPLES,
        notes=_NOTES,
        run=run,
    )
    add = parser.add_argument
    add("store", nargs="*", metavar="STORE", help="made by mamba-attn collect; default: a bundled model on six photos")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine only")
    add("--port", default=8050, type=_port, metavar="P", help="default: 8050; 0: any free one")
    add_model(parser, None)


def run(args: argparse.Namespace) -> int:
    """Serve the stores until Ctrl+C."""
    require_extras(NEEDED, "app")
    serve(_stores(args), args.host, args.port, ahead=not args.store)
    return 0


def serve(stores: Sequence[Any], host: str, port: int, *, ahead: bool = False) -> None:
    """Serve stores until Ctrl+C.

    Args:
        stores: ``AttentionStore`` objects.
        host: address to bind to.
        port: 0 for any free one.
        ahead: compute t-SNE and UMAP of every block in the background, before the page asks for them.

    Raises:
        OSError: the port is in use, or the address cannot be bound.
        ValueError: a store has no images.
    """
    from mamba_attn.viewer.server import Explorer
    from mamba_attn.viewer.serving import bound

    app = Explorer(stores, host=host)
    with bound(app, host, port) as (server, listening):
        name = f"[{host}]" if ":" in host else host
        print(f"mamba-attn explore: http://{name}:{listening.getsockname()[1]}/ (Ctrl+C stops)", flush=True)
        if ahead:
            app.prepare()
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            print()


def _stores(args: argparse.Namespace) -> list[Any]:
    from mamba_attn.viewer.demo import demo_store

    if args.store:
        return open_stores(args.store, args)
    from mamba_attn.analytics import AttentionStore

    require_extras({"rich": "rich"}, "analytics")
    with progress_bar() as progress:
        task = progress.add_task("collecting the demo", total=None, visible=False)

        def advance(done: int, wanted: int) -> None:
            progress.update(task, completed=done, total=wanted, visible=True)

        return [AttentionStore.open(demo_store(advance))]


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: a port is a number in 0..65535")
    return int(text)
