"""The command line: ``mamba-attn`` and its commands."""

import argparse
import sys
from collections.abc import Sequence

from mamba_attn.commands import bench, collect, compare, erf, explain, explore, findings, report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default the process's own, and return the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="mamba-attn", description="Hidden attention of vision Mamba models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    explain.add_parser(commands)
    compare.add_parser(commands)
    collect.add_parser(commands)
    findings.add_parser(commands)
    erf.add_parser(commands)
    bench.add_parser(commands)
    explore.add_parser(commands)
    report.add_parser(commands)
    args = parser.parse_args(given)
    return int(args.run(args, given))


if __name__ == "__main__":
    sys.exit(main())
