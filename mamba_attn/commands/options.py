"""The parser of a command, the options that several commands share, and what is done with them alike."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

Commands = Any  # argparse's object that takes new commands; its class is private

_PARAMETERS_PER_THREAD = 5_000_000  # threads that share less wait for each other longer than they work


class CommandParser(argparse.ArgumentParser):
    """A parser whose last part of the help may be a function, called when the help is printed."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the help."""
        if self.more is not None:
            self.epilog, self.more = f"{self.epilog}\n{self.more()}", None
        return super().format_help()


def command(
    commands: Commands, name: str, what: str, *, examples: str, notes: str, run: Callable[[argparse.Namespace], int],
    stopped: str = "stopped.", more: Callable[[], str] | None = None,
) -> argparse.ArgumentParser:  # fmt: skip
    """Add a command and return its parser.

    Args:
        commands: of ``mamba-attn``.
        name: of the command.
        what: it does, in a line.
        examples: calls, one a line, without ``mamba-attn``; what stands after # explains.
        notes: printed below as they stand, at most 80 columns wide.
        run: what it does with the arguments.
        stopped: what is printed after Ctrl+C.
        more: returns what else the help ends with; called when it is printed.
    """
    shown = "\n".join(f"  mamba-attn {name} {line}".rstrip() for line in examples.splitlines())
    parser: CommandParser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"examples:\n{shown}\n\n{notes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
    """Add ``--device``."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the image files, as arguments without a flag."""
    what = "files, folders or patterns; default: six sample photos"
    parser.add_argument("image", nargs="*", metavar="IMAGE", help=what)


def add_limit(parser: argparse.ArgumentParser, what: str = "use the first N images; default: all") -> None:
    """Add ``--limit``."""
    parser.add_argument("--limit", type=int, metavar="N", help=what)


def add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--out``, a folder."""
    parser.add_argument("--out", default=default, metavar="FOLDER", help=f"default: ./{default}")


def require_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers that are too small; an option that was not given fits.

    Args:
        args: of the command.
        least: the smallest number by option.

    Raises:
        ValueError: the option, and what it takes.
    """
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value}: expected a number from {smallest} on.")


def settle_threads(parameters: Iterable[int], workers: int = 1) -> None:
    """Use no more threads than the smallest model keeps busy.

    Args:
        parameters: of every model.
        workers: processes that share the machine.
    """
    import torch

    useful = min(parameters) // _PARAMETERS_PER_THREAD
    torch.set_num_threads(max(1, min(torch.get_num_threads() // workers, useful)))
