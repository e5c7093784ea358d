"""Runs all tasks of a plan, in this or several processes, with a progress bar; writes results to disk at once."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor

import torch
from rich.progress import Progress

from mamba_attn.datasets.samples import Data
from mamba_attn.evaluation.plan import Plan, Task
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.worker import Record, Worker

_worker: Worker | None = None  # of a process of the pool, which ends with the run


def run(plan: Plan, store: Store, workers: int = 1, progress: Progress | None = None) -> None:
    """Measure everything that the store lacks.

    Args:
        plan: the comparison.
        store: existing results; every finished task adds to it.
        workers: number of processes; 1 uses this one.
        progress: shows the bar.

    Raises:
        OSError: the store cannot be written.
    """
    tasks = list(plan.tasks(store))
    bar = None if progress is None else progress.add_task("comparing", total=sum(task.records for task in tasks))
    for task, records in _done(tasks, workers, plan.data):
        store.add(records)
        if progress is not None and bar is not None:
            data = plan.data[task.selector].name
            progress.update(bar, advance=task.records, description=f"{task.model.name}, {data}")


def _done(tasks: Iterable[Task], workers: int, data: Mapping[str, Data]) -> Iterator[tuple[Task, list[Record]]]:
    if workers == 1:
        worker = Worker(data)
        for task in tasks:
            yield task, worker.work(task)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, context, _prepare, (threads,)) as pool:
        try:
            yield from _in_flight(pool, deque(tasks), 2 * workers)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_flight(pool: ProcessPoolExecutor, waiting: deque[Task], most: int) -> Iterator[tuple[Task, list[Record]]]:
    """Yield results in the order of the tasks, with at most ``most`` tasks in the pool."""
    running: deque[tuple[Task, Future[list[Record]]]] = deque()
    while waiting or running:
        while waiting and len(running) < most:
            task = waiting.popleft()
            running.append((task, pool.submit(_work, task)))
        task, future = running.popleft()
        yield task, future.result()


def _prepare(threads: int) -> None:
    global _worker
    _worker = Worker()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(task: Task) -> list[Record]:
    if _worker is None:
        raise RuntimeError("this process is not prepared for tasks; start it with _prepare.")
    return _worker.work(task)


def _end_with_parent() -> None:
    """End this worker with its parent; it would otherwise wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
