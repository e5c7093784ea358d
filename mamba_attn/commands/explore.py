"""``mamba-attn explore``: its arguments, and the server.

Exit codes: 0 stopped by the user, 2 nothing was done because of how it was called.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from mamba_attn.core.requirements import exit_code, require_extras, subcommand

_NEEDED = {"dash": "dash", "plotly": "plotly", "PIL": "pillow", "zarr": "zarr"}
_EPILOG = """\
Two linked views of the attention between patches: points (a stage's blocks over images, or a block's patches) and the
patch grid over the image. Click, drag a box or a lasso in one; the other follows. Several STOREs, e.g. of models with
other patch orders, can be seen side by side. The page's address holds what is shown. Ctrl+C stops.

The explorer answers to this machine only, unless --host says otherwise; whoever reaches it sees the store's images.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = subcommand(commands, "explore", "linked views of attention between patches, in a browser", _EPILOG)
    add = parser.add_argument
    add("store", nargs="*", metavar="STORE", help="of mamba-attn collect; default: this package's images")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine only")
    add("--port", default=8050, type=_port, metavar="P", help="default: 8050; 0: any that is free")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Do what the arguments say, and return the exit code."""
    return exit_code("explore", lambda: _explore(args))


def _explore(args: argparse.Namespace) -> int:
    require_extras(_NEEDED, "app")
    serve(_stores(args.store), args.host, args.port)
    return 0


def serve(stores: Sequence[Any], host: str, port: int) -> None:
    """Serve stores until Ctrl+C.

    Args:
        stores: ``AttentionStore`` objects.
        host: address to bind to.
        port: 0 for any that is free.

    Raises:
        OSError: the port is in use, or the address cannot be bound.
        ValueError: a store without images.
    """
    from mamba_attn.viewer.app import build
    from mamba_attn.viewer.serving import bound

    with bound(build(stores, host=host), host, port) as server:
        name = f"[{host}]" if ":" in host else host
        print(f"mamba-attn explore: http://{name}:{server.port}/ (Ctrl+C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _stores(paths: Sequence[str]) -> list[Any]:
    from mamba_attn.analytics import AttentionStore
    from mamba_attn.viewer.demo import demo_store

    return [AttentionStore.open(path) for path in (paths or [str(demo_store())])]


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: a port is a number in 0..65535")
    return int(text)
