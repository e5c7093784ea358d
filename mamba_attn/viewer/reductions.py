"""Dimension reductions that take seconds, each in a process of its own: the page stays usable and can cancel them."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
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
        panes: whose points are still to come.
        process: that computes.
        folder: with its input and output.
        state: "running", "done", "failed" or "cancelled".
        why: it failed.
        done: panes whose points are there.
    """

    scatter: Scatter
    panes: list[Pane]
    process: "subprocess.Popen[bytes]"
    folder: "tempfile.TemporaryDirectory[str]"
    state: str = "running"
    why: str = ""
    done: list[Pane] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def described(self) -> dict[str, Any]:
        """Return what the page shows, as JSON values."""
        first = (self.panes or self.done)[0]
        what = "blocks of images" if first.mode == "blocks" else "patches"
        name = f"{METHODS[first.method]} of {self.scatter.count(first):,} {what}"
        seconds = time.monotonic() - self.started
        return {"state": self.state, "what": name, "seconds": seconds, "left": len(self.panes), "error": self.why}

    def settle(self) -> None:
        """Fetch the points that are finished; as far as they are."""
        if self.state != "running":
            return
        folder, ended = Path(self.folder.name), self.process.poll() is not None
        for path in sorted(folder.glob("*.points.npy")):
            pane = Pane(**json.loads(path.with_suffix("").with_suffix(".json").read_text()))
            self.scatter.save(pane, np.load(path, allow_pickle=False), {})
            self.panes.remove(pane)
            self.done.append(pane)
            path.unlink()
        if ended and self.process.returncode:
            lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
            self.state, self.why = "failed", lines[-1] if lines else f"The process ended ({self.process.returncode})."
        elif ended:
            self.state = "done"
        if ended:
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

    def start(self, scatter: Scatter, *panes: Pane) -> int:
        """Start a reduction, or several one after the other; return the number of the one that is already running."""
        with self._lock:
            running = {number: job for number, job in self._jobs.items() if job.state == "running"}
            for number, job in running.items():
                if job.scatter is scatter and scatter.name(panes[0]) in map(scatter.name, job.panes):
                    return number
            for number in list(running)[: len(running) - _AT_ONCE + 1]:
                running[number].cancel()
            for number in list(self._jobs)[:-_KEPT]:
                del self._jobs[number]
            folder = tempfile.TemporaryDirectory(prefix="mamba_attn_points_")
            for number, pane in enumerate(panes):
                np.save(Path(folder.name) / f"{number:03d}.features.npy", scatter.features(pane))
                (Path(folder.name) / f"{number:03d}.json").write_text(json.dumps(asdict(pane)))
            command = [sys.executable, "-c", f"from {__name__} import reduce; reduce()", folder.name, str(FIRST)]
            paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            with (Path(folder.name) / "error.txt").open("wb") as errors:
                process = subprocess.Popen(command, env=paths, stdout=subprocess.DEVNULL, stderr=errors)
            self._last += 1
            self._jobs[self._last] = Job(scatter, list(panes), process, folder)
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


def reduce() -> None:
    """Reduce the features in a folder, file by file; the process of a job: folder and components are its arguments."""
    from mamba_attn.analytics.embed import embed

    folder, first = Path(sys.argv[1]), int(sys.argv[2])
    files = sorted(folder.glob("*.features.npy"))
    if len(files) > 1 and hasattr(os, "nice"):
        os.nice(10)  # nobody waits for it
    for file in files:
        name = file.name.partition(".")[0]
        pane = Pane(**json.loads((folder / f"{name}.json").read_text()))
        found = embed(np.load(file, allow_pickle=False), pane.method, first=first if pane.first else None)
        np.save(folder / f"{name}.new.npy", found.points)
        (folder / f"{name}.new.npy").rename(folder / f"{name}.points.npy")
