"""The command line: ``mamba-attn`` and its commands.

Nothing here or at the top of a command's file imports torch, which would delay help by seconds.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import mamba_attn
from mamba_attn.commands import bench, collect, compare, doctor, erf, explain, explore, findings, models, report
from mamba_attn.commands.exit_codes import MEANING, exit_code, show_decisions
from mamba_attn.commands.options import CommandParser

_EXAMPLES = f"""\
examples:
  mamba-attn explain photo.jpg
  mamba-attn explain photo.jpg --model net.py:build --weights best.pth
  mamba-attn explore
  mamba-attn COMMAND --help

{MEANING}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default the process's own, and return the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    reader = parser()
    for word in given:
        if word.startswith("--") and word.endswith("=--"):  # argparse would take it for no value at all
            reader.error(f"{word}: expected a value after the sign =, got --.")
    args = reader.parse_args(given)
    if args.command is None:
        reader.print_help()
        return 0
    args.call = f"mamba-attn {shlex.join(word for word in given if word not in ('-v', '--verbose'))}"
    if args.verbose:
        show_decisions(args.command)
    return exit_code(args.command, lambda: int(args.run(args)), vars(args), args.stopped)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    made = argparse.ArgumentParser(
        prog="mamba-attn",
        description="See what vision Mamba models look at.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"mamba-attn {mamba_attn.__version__}")
    commands = made.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=CommandParser)
    for each in (explain, explore, compare, collect, report, findings, erf, bench, models, doctor):
        each.add_parser(commands)
    return made


if __name__ == "__main__":
    sys.exit(main())
