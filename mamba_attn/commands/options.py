"""The parser of a command, options shared by several commands, and their checks."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

Commands = Any  # argparse's object that takes new commands; its class is private

_PARAMETERS_PER_THREAD = 5_000_000  # with less work, threads wait for each other longer than they compute


class CommandParser(argparse.ArgumentParser):
    """A parser whose help may end with the result of a function, called only when help is printed."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the help, with its lazy last part."""
        if self.more is not None:
            self.epilog, self.more = f"{self.epilog}\n{self.more()}", None
        return super().format_help()


def command(
    commands: Commands,
    name: str,
    what: str,
    *,
    examples: str,
    notes: str,
    run: Callable[[argparse.Namespace], int],
    stopped: str = "stopped.",
    more: Callable[[], str] | None = None,
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: of ``mamba-attn``.
        name: of the command.
        what: what it does, in one line.
        examples: one call per line, without ``mamba-attn``; comments after #.
        notes: printed verbatim below, at most 80 columns wide.
        run: runs the command with its arguments.
        stopped: printed after Ctrl+C.
        more: returns the end of the help; called when help is printed.
    """
    shown = "\n".join(f"  mamba-attn {name} {line}".rstrip() for line in examples.splitlines())
    parser: CommandParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"examples:\n{shown}\n\n{notes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.more = more
    parser.set_defaults(run=run, stopped=stopped)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--weights`` and ``--device``."""
    add = parser.add_argument
    add("--model", default="vim_micro", metavar="NAME", help="default: vim_micro")
    add("--weights", default="demo", metavar="demo|FILE|official", help="default: demo, the bundled ones")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, by default the CPU."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the image files, as arguments without a flag."""
    what = "files, folders or patterns; default: six sample photos"
    parser.add_argument("image", nargs="*", metavar="IMAGE", help=what)


def add_limit(parser: argparse.ArgumentParser, what: str = "use the first N images; default: all") -> None:
    """Add ``--limit``, the number of images."""
    parser.add_argument("--limit", type=int, metavar="N", help=what)


def add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--out``, a folder."""
    parser.add_argument("--out", default=default, metavar="FOLDER", help=f"default: ./{default}")


def require_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers that are too small; options that were not given pass.

    Args:
        args: of the command.
        least: the smallest number by option.

    Raises:
        ValueError: a number is too small.
    """
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value}: expected a number from {smallest} on.")


def settle_threads(parameters: Iterable[int], workers: int = 1) -> None:
    """Limit threads to what the smallest model can keep busy.

    Args:
        parameters: of every model.
        workers: processes that share the machine.
    """
    import torch

    useful = min(parameters) // _PARAMETERS_PER_THREAD
    torch.set_num_threads(max(1, min(torch.get_num_threads() // workers, useful)))
