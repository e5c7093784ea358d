"""Dimension reductions that take seconds, each in a process of its own: the page stays usable and can cancel them."""

import json
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
SLOW = ("tsne", "umap")
_FEWEST = 3  # points of a plane


@dataclass(eq=False)
class Job:
    """Reductions on their way, in one process.

    Args:
        scatter: where their points go.
        panes: whose points are still to come, by number.
        first: of all panes.
        process: that computes.
        folder: with its input and output.
        state: "running", "done", "failed" or "cancelled".
        why: it failed.
    """

    scatter: Scatter
    panes: dict[int, Pane]
    first: Pane
    process: "subprocess.Popen[bytes]"
    folder: "tempfile.TemporaryDirectory[str]"
    state: str = "running"
    why: str = ""
    started: float = field(default_factory=time.monotonic)

    def described(self) -> dict[str, Any]:
        """Return what the page shows, as JSON values."""
        pane, seconds = next(iter(self.panes.values()), self.first), time.monotonic() - self.started
        kind = "blocks of images" if pane.mode == "blocks" else "patches"
        what = f"{METHODS[pane.method]} of {self.scatter.count(pane):,} {kind}"
        return {"state": self.state, "what": what, "seconds": seconds, "left": len(self.panes), "error": self.why}

    def settle(self) -> None:
        """Fetch the points that are finished; as far as they are."""
        if self.state != "running":
            return
        folder, ended = Path(self.folder.name), self.process.poll() is not None
        for number in [number for number in self.panes if _points(folder, number).exists()]:
            self.scatter.save(self.panes.pop(number), np.load(_points(folder, number), allow_pickle=False), {})
        if ended and self.process.returncode:
            lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
            self.why = lines[-1] if lines else f"The process ended ({self.process.returncode})."
        if ended:
            self._end("failed" if self.process.returncode else "done")

    def cancel(self) -> None:
        """Stop the process, if it runs."""
        if self.state == "running":
            self.process.kill()
            self.process.wait()
            self._end("cancelled")

    def _end(self, state: str) -> None:
        self.state = state
        self.folder.cleanup()


class Jobs:
    """The reductions that this process has started."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._lock = RLock()
        self._last = 0

    def start(self, scatter: Scatter, *panes: Pane) -> int:
        """Start a reduction, or several one after the other; return the number of the one that is already running."""
        with self._lock:
            running = {number: job for number, job in self._jobs.items() if job.state == "running"}
            for number, job in running.items():
                if job.scatter is scatter and scatter.name(panes[0]) in map(scatter.name, job.panes.values()):
                    return number
            for job in list(running.values())[: len(running) - _AT_ONCE + 1]:
                job.cancel()
            for number in list(self._jobs)[:-_KEPT]:
                del self._jobs[number]
            self._last += 1
            self._jobs[self._last] = _started(scatter, panes)
            return self._last

    def ahead(self, scatter: Scatter) -> int | None:
        """Start all slow reductions of a store that its page offers first; None if there are none to do."""
        layers = range(len(scatter.source.layers))
        wanted = [
            Pane(layer=layer, mode=mode, method=method)
            for method in SLOW
            for mode in ("patches", "blocks")
            for layer in layers
            if mode == "patches" or scatter.source.stage(Pane(layer=layer))[0] == layer
        ]
        panes = [pane for pane in wanted if scatter.count(pane) >= _FEWEST and scatter.known(pane) is None]
        return self.start(scatter, *panes) if panes else None

    def get(self, number: int) -> Job | None:
        """Return a job, settled."""
        self.settle()
        return self._jobs.get(number)

    def settle(self) -> None:
        """Fetch all points that are finished."""
        with self._lock:
            for job in self._jobs.values():
                job.settle()

    def close(self) -> None:
        """Cancel all."""
        with self._lock:
            for job in self._jobs.values():
                job.cancel()


def _started(scatter: Scatter, panes: tuple[Pane, ...]) -> Job:
    folder = tempfile.TemporaryDirectory(prefix="mamba_attn_points_")
    for number, pane in enumerate(panes):
        np.save(Path(folder.name) / f"{number}.npy", scatter.features(pane))
    how = json.dumps([[pane.method, FIRST if pane.first else None] for pane in panes])
    command = [sys.executable, "-c", f"from {__name__} import reduce; reduce()", folder.name, how]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (Path(folder.name) / "error.txt").open("wb") as errors:
        process = subprocess.Popen(command, env=paths, stdout=subprocess.DEVNULL, stderr=errors)
    return Job(scatter, dict(enumerate(panes)), panes[0], process, folder)


def reduce() -> None:
    """Reduce the features in a folder, file by file; the process of a job: its arguments are the folder and how."""
    from mamba_attn.analytics.embed import embed

    folder, each = Path(sys.argv[1]), json.loads(sys.argv[2])
    if len(each) > 1 and hasattr(os, "nice"):
        os.nice(10)  # nobody waits for it
    for number, (method, first) in enumerate(each):
        found = embed(np.load(folder / f"{number}.npy", allow_pickle=False), method, first=first)
        np.save(folder / "new.npy", found.points)
        (folder / "new.npy").rename(_points(folder, number))  # in one step: never half a file


def _points(folder: Path, number: int) -> Path:
    return folder / f"{number}.points.npy"
