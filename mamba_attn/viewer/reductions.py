"""Dimension reductions that take seconds, each in a process of its own: the page stays usable and can cancel them."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from mamba_attn.viewer.points import FIRST, METHODS, Scatter
from mamba_attn.viewer.state import Pane

_AT_ONCE = 2  # two panes may wait for one each; an older one gives way
_KEPT = 64  # finished ones whose state is remembered


@dataclass(eq=False)
class Job:
    """A reduction on its way.

    Args:
        scatter: where its points go.
        pane: whose points.
        process: that computes.
        folder: with its input and output.
        state: "running", "done", "failed" or "cancelled".
        why: it failed.
    """

    scatter: Scatter
    pane: Pane
    process: "subprocess.Popen[bytes]"
    folder: "tempfile.TemporaryDirectory[str]"
    state: str = "running"
    why: str = ""
    started: float = field(default_factory=time.monotonic)

    def described(self) -> dict[str, Any]:
        """Return what the page shows, as JSON values."""
        what = "blocks of images" if self.pane.mode == "blocks" else "patches"
        name = f"{METHODS[self.pane.method]} of {self.scatter.count(self.pane):,} {what}"
        return {"state": self.state, "what": name, "seconds": time.monotonic() - self.started, "error": self.why}

    def settle(self) -> None:
        """Fetch the points if the process has ended."""
        if self.state != "running" or self.process.poll() is None:
            return
        folder = Path(self.folder.name)
        if self.process.returncode:
            lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
            self.state, self.why = "failed", lines[-1] if lines else f"The process ended ({self.process.returncode})."
        else:
            self.scatter.save(self.pane, np.load(folder / "points.npy", allow_pickle=False), {})
            self.state = "done"
        self.folder.cleanup()

    def cancel(self) -> None:
        """Stop the process, if it runs."""
        if self.state == "running":
            self.process.kill()
            self.process.wait()
            self.state = "cancelled"
            self.folder.cleanup()


class Jobs:
    """The reductions that this process has started."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._lock = RLock()
        self._last = 0

    def start(self, scatter: Scatter, pane: Pane) -> int:
        """Start a reduction, or return the number of the same one that is already running."""
        with self._lock:
            running = {number: job for number, job in self._jobs.items() if job.state == "running"}
            for number, job in running.items():
                if job.scatter is scatter and scatter.name(job.pane) == scatter.name(pane):
                    return number
            for number in list(running)[: len(running) - _AT_ONCE + 1]:
                running[number].cancel()
            for number in list(self._jobs)[:-_KEPT]:
                del self._jobs[number]
            folder = tempfile.TemporaryDirectory(prefix="mamba_attn_points_")
            np.save(Path(folder.name) / "features.npy", scatter.features(pane))
            command = [sys.executable, "-c", f"from {__name__} import reduce; reduce()", folder.name, pane.method]
            paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            with (Path(folder.name) / "error.txt").open("wb") as errors:
                process = subprocess.Popen(
                    [*command, str(FIRST if pane.first else 0)], env=paths, stdout=subprocess.DEVNULL, stderr=errors
                )
            self._last += 1
            self._jobs[self._last] = Job(scatter, pane, process, folder)
            return self._last

    def get(self, number: int) -> Job | None:
        """Return a job, settled."""
        with self._lock:
            job = self._jobs.get(number)
            if job is not None:
                job.settle()
            return job

    def close(self) -> None:
        """Cancel all."""
        with self._lock:
            for job in self._jobs.values():
                job.cancel()


def reduce() -> None:
    """Reduce the features in a folder; the process of a job: folder, method and components are its arguments."""
    from mamba_attn.analytics.embed import embed

    folder, method, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    found = embed(np.load(folder / "features.npy", allow_pickle=False), method, first=first or None)
    np.save(folder / "points.npy", found.points)
