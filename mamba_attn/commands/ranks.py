"""What commands say while several processes work together: one bar for all, and what is left to others."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_attn.commands.terminal import progress_bar

if TYPE_CHECKING:
    from mamba_attn.distributed import Ranks


@contextmanager
def ranks_bar(ranks: "Ranks", what: str) -> Iterator[Callable[[int, int], None]]:
    """Show one bar for processes that run together, and one for each that runs by itself.

    Args:
        ranks: this process among all.
        what: they do.

    Yields:
        A function to call with what is done, and of how much.
    """
    if ranks.launcher and not ranks.together:  # every process has a terminal, or a file, of its own
        print(f"mamba-attn: rank {ranks.rank} of {ranks.world} ({ranks.launcher})", file=sys.stderr)
    if not ranks.reports:
        yield lambda done, wanted: None
        return
    with progress_bar() as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, wanted: progress.update(bar, completed=done, total=wanted)


def left_to_others(ranks: "Ranks", left: int, folder: Path) -> int:
    """Say that shares are missing, where this process reports at all; return the exit code.

    Args:
        ranks: this process among all.
        left: shares that are missing.
        folder: of the results.
    """
    if ranks.reports:
        shares = "1 share is" if left == 1 else f"{left} shares are"
        print(f"{shares} left to other processes; the last one to end, or the same command, completes {folder}")
    return 0
