"""Which of several processes this one is, and what each of them does next. Nothing else here knows ranks.

Processes are started by torchrun, by ``srun``, or as a job array of Slurm; alone otherwise. There is no process group,
because nothing is reduced over the network. Under torchrun, shares are drawn one by one from a counter in the agent's
``TCPStore``, so that fast ranks do more; elsewhere share i belongs to rank i mod world. What is done is what stands on
the disk: counters only say who begins what, and begin anew after every restart.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

_WAIT = 0.2  # seconds between two looks at what others have done
_LATE = 300.0  # seconds after which a file of another machine is not on its way any more
_TIMEOUT = timedelta(seconds=60)  # of an answer of the agent's store


@dataclass(frozen=True)
class Ranks:
    """This process among all that do the same work.

    Args:
        rank: of this process.
        world: number of processes.
        local_rank: of this process on its machine.
        local_world: number of processes on this machine.
        launcher: who started them, in words; "" for a process alone.
        counters: a ``torch.distributed.PrefixStore`` of the agent of torchrun; None elsewhere.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = ""
    counters: Any = None
    _own: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # counters of a process without an agent

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or not 0 <= self.local_rank < self.local_world:
            raise ValueError(
                f"Ranks(rank={self.rank}, world={self.world}, local_rank={self.local_rank}, "
                f"local_world={self.local_world}): expected ranks from 0 on, each below its number of processes."
            )

    @classmethod
    def here(cls) -> "Ranks":
        """Return the ranks that the environment names.

        Raises:
            ValueError: a variable of the launcher is no number, or does not fit the others.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            counters = _agent() if _number("WORLD_SIZE") > 1 else None
            here = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
            return cls(_number("RANK"), _number("WORLD_SIZE"), *here, "torchrun", counters)
        rank, world, local, each, launcher = 0, 1, 0, 1, ""
        if "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a step of srun, no batch script
            rank, world, launcher = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), "srun"
            local, each = _number("SLURM_LOCALID", 0), _tasks_here()
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            task, first = _number("SLURM_ARRAY_TASK_ID"), _number("SLURM_ARRAY_TASK_MIN", 0)
            tasks, step = _number("SLURM_ARRAY_TASK_COUNT", 1), _number("SLURM_ARRAY_TASK_STEP", 1)
            rank, world = (task - first) // max(1, step) * world + rank, tasks * world
            launcher = "a job array" if world > 1 else launcher
        return cls(rank, world, local, max(each, local + 1), launcher if world > 1 else "")

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether all run at the same time and can wait for each other; jobs of an array may run one by one."""
        return self.counters is not None

    def named(self) -> dict[str, Any]:
        """Return rank, world and machine, as a part of a store names its writer."""
        return {"rank": self.rank, "world": self.world, "host": socket.gethostname()}

    def device(self, device: str) -> str:
        """Return the device of this process: "cuda" becomes the GPU of its local rank.

        Args:
            device: "cpu", "cuda", or a device with its number, which stays.
        """
        if device != "cuda" or self.local_world == 1:
            return device
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank % count}" if count else device  # which load() refuses

    @property
    def cores(self) -> int:
        """The cores of this machine for one process."""
        known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, known // self.local_world)

    def shares(self, name: str, count: int) -> Iterator[int]:
        """Yield the numbers of this process's shares of some work, each before it is to be done.

        Args:
            name: of the work.
            count: of all shares.
        """
        if self.counters is None:
            yield from range(self.rank, count, self.world)
            return
        while (number := self.count(name, 1) - 1) < count:
            yield number

    def work(self, name: str, count: int, make: Callable[[int], None], missing: Callable[[], int]) -> int:
        """Do this process's shares of some work; the one that reports waits for those that run with it.

        Args:
            name: of the work.
            count: of all shares.
            make: does a share, unless the disk holds it already.
            missing: returns how many shares the disk does not hold, whoever was to do them.

        Returns:
            What is missing in the end: the share of processes that run at another time.

        Raises:
            OSError: the agent of torchrun is gone, or what others have made does not appear on the disk.
        """
        for number in self.shares(name, count):
            make(number)
            self.count(f"{name} made", 1)
        if not self.reports:
            return 0
        while self.together and self.count(f"{name} made") < count:
            wait()
        before, since = -1, time.monotonic()
        while (left := missing()) and self.together:  # a network's disk shows the others' files a little later
            if left != before:
                before, since = left, time.monotonic()
            elif time.monotonic() - since > _LATE:
                raise OSError(
                    f"{left} of {count} shares were made by other processes and are not in the folder of this one: it "
                    "must be a folder that all machines reach."
                )
            wait()
        return left

    @property
    def reports(self) -> bool:
        """Whether this process says and writes what all have done, once it finds everything there."""
        return self.first or not self.together

    def count(self, name: str, more: int = 0) -> int:
        """Add to a number that all processes share, and return it; without torchrun, each has its own.

        Args:
            name: of the number.
            more: to add.
        """
        if self.counters is None:
            self._own[name] = self._own.get(name, 0) + more
            return self._own[name]
        try:
            return int(self.counters.add(name, more))
        except RuntimeError as error:  # of a socket
            raise ConnectionError(  # no error of a model, after which others are tried
                f"rank {self.rank}: the agent of torchrun does not answer; what is counted stays, and the same command "
                "resumes from there."
            ) from error


def wait() -> None:
    """Wait a moment for other processes."""
    time.sleep(_WAIT)


def _agent() -> Any:
    """Return the agent's store, with keys of this run and restart: the dead's counters must not go on."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in every build of torch

    where = (os.environ["MASTER_ADDR"], _number("MASTER_PORT"))
    base = TCPStore(*where, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"mamba_attn/{os.environ['TORCHELASTIC_RUN_ID']}/{restart}", base)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.strip().isdecimal():
        raise ValueError(f"{name}={text!r}: the launcher's variable should be a number; unset it to run alone.")
    return int(text)


def _tasks_here() -> int:
    """Tasks of this step on this machine: SLURM_STEP_TASKS_PER_NODE is like ``8(x2),4``."""
    given = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    nodes: list[int] = []
    for each in given.split(","):
        tasks, _, times = each.partition("(x")
        number = times.rstrip(")")
        nodes += [int(tasks)] * (int(number) if number.isdecimal() else 1) if tasks.isdecimal() else []
    node = _number("SLURM_NODEID", 0)
    return max(1, nodes[node]) if node < len(nodes) else 1
