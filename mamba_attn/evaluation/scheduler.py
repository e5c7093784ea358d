"""Runs all tasks of a plan, in this or several processes, with a progress bar; writes results to disk at once.

Several processes are a pool of this one, or ranks of one launch, perhaps on several machines. Images are explained in
the same batches whoever does it, so that figures do not depend on how many there are.
"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from rich.progress import Progress

from mamba_attn.core.decisions import decided
from mamba_attn.datasets.samples import Data
from mamba_attn.distributed import Ranks
from mamba_attn.evaluation.plan import CHUNK, Plan, Task
from mamba_attn.evaluation.specs import Model
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.worker import Record, Worker

_SHOWN = 4  # methods in the sentence about the cost
_worker: Worker | None = None  # of a process of the pool, which ends with the run
_Done = Iterator[tuple[Task, list[Record], float]]  # and the seconds


def run(
    plan: Plan,
    store: Store,
    workers: int = 1,
    progress: Progress | None = None,
    budget: float | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Measure everything that the store lacks.

    With a budget or ``tell``, the first image of every model and collection is measured piece by piece, and the rest is
    estimated from it. With a budget, the cheapest methods come first, and what would not end in time is left to the
    next run; ``plan.notes`` says so. A piece that has begun is not stopped, and the first one always runs.

    Args:
        plan: the comparison.
        store: existing results; every finished task adds to it.
        workers: number of processes; 1 uses this one.
        progress: shows the bar.
        budget: seconds.
        tell: takes the sentence about what the rest will cost.

    Raises:
        OSError: the store cannot be written.
    """
    tasks, start = list(plan.tasks(store)), time.monotonic()
    bar = None if progress is None else progress.add_task("comparing", total=sum(task.records for task in tasks))
    pieces: list[Task] = []
    rest = tasks
    if budget is not None or tell is not None:
        heads = {(task.selector, task.model): task for task in reversed(tasks)}.values()
        pieces = [piece for task in heads for piece in _pieces(_first_image(task))]
        later = {id(task): _later_images(task) for task in heads}
        rest = [each for task in tasks if (each := later.get(id(task), task)) is not None]
    rates = _Rates()

    def add(done: _Done, *, note: bool) -> None:
        for task, records, seconds in done:
            store.add(records)
            if note:
                rates.note(task, seconds)
            if progress is not None and bar is not None:
                data = plan.data[task.selector].name
                progress.update(bar, advance=task.records, description=f"{task.model.name}, {data}")

    left: list[Task] = []

    def in_time(tasks: Iterable[Task]) -> Iterator[Task]:
        for task in tasks:
            if budget is not None and time.monotonic() - start + rates.seconds(task) > budget and task is not pieces[0]:
                left.append(task)
            else:
                yield task

    add(_done(in_time(pieces), workers, plan.data), note=True)
    if rest and tell is not None:
        tell(rates.sentence(rest, workers))
    if budget is not None:
        rest = sorted((piece for task in rest for piece in _by_method(task)), key=rates.rate)
    add(_done(in_time(rest), workers, plan.data), note=False)
    if left and budget is not None:
        methods = dict.fromkeys(method for task in left for method in task.needs)
        plan.notes.append(
            f"stopped within the budget of {budget / 60:.3g} minutes: {', '.join(methods)} "
            f"{'does' if len(methods) == 1 else 'do'} not have all images yet; the same command resumes."
        )


def run_shared(
    plan: Plan, store: Store, ranks: Ranks, advance: Callable[[int, int], None] = lambda done, wanted: None
) -> int:
    """Measure what the store lacks together with other processes, each its shares.

    Args:
        plan: the comparison.
        store: existing results, shared by the processes; every share adds a file to it.
        ranks: this process among all.
        advance: called with the figures that are done, by all processes, and those that are wanted.

    Returns:
        How many shares have no figures yet: those of processes that run at another time.

    Raises:
        OSError: the store cannot be written.
    """
    shares, worker = _shares(plan), Worker(plan.data)
    wanted = sum(task.records for task in plan.tasks(store))
    advance(0, wanted)

    def make(number: int) -> None:
        tasks = _tasks_of(plan, shares[number], store)
        store.look([key for task in tasks for key in plan.keys(task)])
        tasks = _tasks_of(plan, shares[number], store)
        records = [line for task in tasks for line in worker.work(task)]
        store.add(records)
        advance(min(wanted, ranks.count("figures", len(records))), wanted)

    def missing() -> int:
        store.refresh()
        return sum(_untried(plan, each, store) for each in shares)

    return ranks.work("compare", len(shares), make, missing)


_Share = tuple[str, Model, int, int]  # a pair, its first image, and behind its last


def _shares(plan: Plan) -> list[_Share]:
    """Divide a plan in shares: a pair's first image, which a process alone measures by itself too, then its chunks."""
    found: list[_Share] = []
    for selector, model in plan.pairs:
        count = len(plan.chosen[selector])
        starts = [0, 1, *range(CHUNK, count, CHUNK)]
        found += [(selector, model, at, min(end, count)) for at, end in pairwise([*starts, count]) if at < end]
    return found


def _tasks_of(plan: Plan, share: _Share, store: Store) -> list[Task]:
    selector, model, start, stop = share
    task = plan.task(selector, model, start, stop, store)
    return [] if task is None else _pieces(task) if start == 0 else [task]


def _untried(plan: Plan, share: _Share, store: Store) -> bool:
    """Whether a share has figures that no process has tried."""
    task = plan.task(*share, store)
    return task is not None and any(store.get(key) is None for key in plan.keys(task))


@dataclass
class _Rates:
    """Seconds per image of every model's methods and measures, from the first images.

    Args:
        known: by model, method and measure: seconds and images.
    """

    known: dict[tuple[str, str, str], tuple[float, int]] = field(default_factory=dict)

    def note(self, piece: Task, seconds: float) -> None:
        """Note what a piece of one method and one measure took."""
        for method, its in piece.needs.items():
            for measure in {measure for measures in its.values() for measure in measures}:
                before, images = self.known.get((piece.model.name, method, measure), (0.0, 0))
                self.known[piece.model.name, method, measure] = before + seconds, images + len(its)

    def seconds(self, task: Task) -> float:
        """Return the estimate of a task; what was never measured counts nothing."""
        total = 0.0
        for method, its in task.needs.items():
            for measure in (measure for measures in its.values() for measure in measures):
                seconds, images = self.known.get((task.model.name, method, measure), (0.0, 1))
                total += seconds / images
        return total

    def rate(self, piece: Task) -> float:
        """Return the seconds per image."""
        return self.seconds(piece) / max(1, max(len(its) for its in piece.needs.values()))

    def sentence(self, tasks: Iterable[Task], workers: int) -> str:
        """Say what tasks will take, and which methods most of it."""
        cost: dict[str, float] = {}
        for task in tasks:
            for method, its in task.needs.items():
                cost[method] = cost.get(method, 0.0) + self.seconds(replace(task, needs={method: its}))
        dearest = sorted(cost, key=lambda method: -cost[method])[:_SHOWN]
        shares = ", ".join(f"{method} {_duration(cost[method] / workers)}" for method in dearest if cost[method])
        timed = (
            f"about {_duration(sum(cost.values()) / workers)} from here on: {shares}{', ...' * (len(cost) > _SHOWN)}"
        )
        unknown = [method for method, seconds in cost.items() if not seconds]
        return f"{timed}; not timed within the budget: {', '.join(unknown)}" if unknown else timed


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 60
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _first_image(task: Task) -> Task:
    """The first image of every method."""
    return replace(task, needs={method: dict(list(its.items())[:1]) for method, its in task.needs.items()})


def _later_images(task: Task) -> Task | None:
    """The others; None where there are none."""
    needs = {method: dict(list(its.items())[1:]) for method, its in task.needs.items() if len(its) > 1}
    return replace(task, needs=needs) if needs else None


def _by_method(task: Task) -> list[Task]:
    return [replace(task, needs={method: its}) for method, its in task.needs.items()]


def _pieces(task: Task) -> list[Task]:
    """Divide a task by method and measure, so that each is timed."""
    found = []
    for part in _by_method(task):
        ((method, its),) = part.needs.items()
        for measure in dict.fromkeys(measure for measures in its.values() for measure in measures):
            needs = {index: (measure,) for index, measures in its.items() if measure in measures}
            found.append(replace(part, needs={method: needs}))
    return found


def _done(tasks: Iterable[Task], workers: int, data: Mapping[str, Data]) -> _Done:
    if workers == 1:
        worker = Worker(data)
        for task in tasks:
            yield task, *_timed(worker, task)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    decided("compare: %d processes of %d threads", workers, threads)
    with ProcessPoolExecutor(workers, context, _prepare, (threads,)) as pool:
        try:
            yield from _in_flight(pool, iter(tasks), 2 * workers)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_flight(pool: ProcessPoolExecutor, waiting: Iterator[Task], most: int) -> _Done:
    """Yield results in the order of the tasks, with at most ``most`` tasks in the pool."""
    running: deque[tuple[Task, Future[tuple[list[Record], float]]]] = deque()
    while True:
        while len(running) < most and (task := next(waiting, None)) is not None:
            running.append((task, pool.submit(_work, task)))
        if not running:
            return
        task, future = running.popleft()
        yield task, *future.result()


def _timed(worker: Worker, task: Task) -> tuple[list[Record], float]:
    start = time.monotonic()
    return worker.work(task), time.monotonic() - start


def _prepare(threads: int) -> None:
    global _worker
    _worker = Worker()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(task: Task) -> tuple[list[Record], float]:
    if _worker is None:
        raise RuntimeError("this process is not prepared for tasks; start it with _prepare.")
    return _timed(_worker, task)


def _end_with_parent() -> None:
    """End this worker with its parent; it would otherwise wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
