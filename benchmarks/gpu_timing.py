"""Parts of gpu_run.sh that measure: a table of times on real shapes, and launches for a profiler.

    DEVICE=cuda OUT=FOLDER python -m benchmarks.gpu_timing [profile]

Two times a row: back to back, as a user meets it, and of the GPU alone, by replays of a captured graph.
"""

import contextlib
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_smoke import GPU, HERE, KERNELS, on_device, save, sync
from benchmarks.kernel import calls, ceilings, heads
from benchmarks.kernel.subjects import Configuration, Model
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import dispatch
from mamba_attn.ops.cuda import fused, kernels, operators
from tests.kernels.machines import machine

SECONDS = float(os.environ.get("SECONDS_OF_TIMING", "180"))
SIZES = [("vim_small", 224), ("vmamba_tiny_s1l8", 224)] if GPU else [("vmamba_micro", 32)]
BATCHES = (8, 1, 64) if GPU else (1,)
DTYPES = ("float32", "bfloat16") if GPU else ("float32",)
STEPS_OF_HEADS = 2048 if GPU else 64
ROUND = 0.12  # seconds of a row


def events(call: Callable[[], object], count: int) -> float:
    """Seconds of a call, from ``count`` of them."""
    if not GPU:
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / count


def measured(call: Callable[[], object]) -> dict[str, Any]:
    """Seconds of a call, back to back ("call") and of the GPU alone ("gpu"): medians of five."""
    if not GPU:
        return {"call": events(call, 1), "gpu": None}
    for _ in range(2):
        call()
    sync()
    count = max(1, min(200, int(ROUND / 5 / max(events(call, 1), 1e-6))))
    row: dict[str, Any] = {"call": statistics.median(events(call, count) for _ in range(5)), "gpu": None}
    try:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        sync()
        row["gpu"] = statistics.median(events(graph.replay, count) for _ in range(5))
    except RuntimeError as error:  # what waits for the GPU cannot be captured
        row["graph"] = str(error).partition("\n")[0][:160]
        sync()
    return row


class Table:
    """Rows, written after each; none starts after the time is over."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.told: dict[str, Any] = {"rows": [], "left out": []}

    def add(self, head: dict[str, Any], call: Callable[[], object]) -> None:
        """Measure a row."""
        if time.perf_counter() - self.began > SECONDS:
            self.told["left out"].append(head)
            return
        try:
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            row = head | measured(call)
            if GPU:
                row["peak bytes"] = torch.cuda.max_memory_allocated()
        except (RuntimeError, ImportError) as error:
            row = head | {"error": f"{type(error).__name__}: {error}"[:300]}
            if GPU:
                torch.cuda.empty_cache()
        self.told["rows"].append(row)
        save("timing.json", self.told)
        times = {clock: f"{row[clock] * 1e6:.1f} us" for clock in ("call", "gpu") if row.get(clock)}
        print(*head.values(), times, row.get("error", ""))

    def totals(self) -> None:
        """All layers of a model together."""
        totals: dict[str, dict[str, float]] = {}
        for row in self.told["rows"]:
            own = totals.setdefault(" | ".join(str(row[key]) for key in ("model", "batch", "dtype", "what", "how")), {})
            for clock in ("call", "gpu"):
                if row.get(clock):
                    own[clock] = own.get(clock, 0.0) + row[clock] * row["times"]
        self.told["all layers, seconds"] = totals
        save("timing.json", self.told)
        for name, its in totals.items():
            print(f"{name:70s}", *(f"{clock} {1e3 * seconds:.3f} ms" for clock, seconds in its.items()))


def operator_rows(
    record: ScanRecord, length: int, batch: int, dtype: str
) -> dict[tuple[str, str], Callable[[], object]]:
    """What is measured of one layer."""
    backend, launcher, none = fused.BACKEND, operators.launcher, (None, None)
    rows: dict[tuple[str, str], Callable[[], object]] = {
        ("scan", "fused"): lambda: backend.selective_scan(record, True),
        ("scan + attention", "fused"): lambda: backend.scan_and_attention(record, "mean", True),
    }
    for kernel in KERNELS:
        if kernel != "attention_direct" or batch * length < 60_000:
            rows["attention", kernel] = functools.partial(
                kernels.attention, launcher, record, none, "mean", True, False, kernel
            )
    if dtype == "float32":
        blocked = dispatch.BACKENDS["blocked"]
        rows["scan", "blocked"] = lambda: blocked.selective_scan(record, True)
        if batch <= 8:
            rows["attention", "blocked"] = lambda: blocked.hidden_attention(record, None, None, "mean", True)
        if batch == 8:
            head = torch.ones_like(backend.selective_scan(record, True))
            rows["attention, positive", "fused"] = lambda: backend.hidden_attention(
                record, None, None, "positive", True
            )
            rows["scan backward", "fused"] = lambda: kernels.backward(launcher, record, head, True)
            rows["row", "fused"] = lambda: backend.attention_line(record, "row", length // 2, none, "mean", True)
    return rows


def mamba2() -> ScanRecord:
    """One layer of mamba2-130m, one sequence, on the device."""
    device = torch.device("cuda" if GPU else "cpu")
    return on_device(heads.layer(STEPS_OF_HEADS).map_tensors(lambda x: x.to(device)))


def heads_rows(record: ScanRecord) -> dict[tuple[str, str], Callable[[], object]]:
    """A layer by heads, and on a GPU the kernels that take its channels one by one, minutes on a host."""
    launcher, none = operators.launcher, (None, None)
    scans, matrices = ["attention_heads"], ["attention_heads"]
    if GPU:
        scans.append("selective_scan")
        matrices.append("attention_factored_64")
    rows: dict[tuple[str, str], Callable[[], object]] = {}
    for kernel in scans:
        rows["scan", kernel] = functools.partial(kernels.scan, launcher, record, True, kernel)
    for kernel in matrices:
        rows["attention", kernel] = functools.partial(
            kernels.attention, launcher, record, none, "mean", True, False, kernel
        )
    return rows


def timing() -> int:
    """The table."""
    device = torch.device("cuda", 0) if GPU else torch.device("cpu")
    table = Table()
    with ceilings.tf32(False):
        table.told["ceilings"] = ceilings.measure(device, rounds=3 if GPU else 1, quick=not GPU).as_dict()
    print(table.told["ceilings"])
    with contextlib.nullcontext() if GPU else machine(HERE), torch.no_grad():
        head = {"model": "mamba2-130m", "batch": 1, "dtype": "float32"}
        its = {"shape": f"L {STEPS_OF_HEADS}", "times": 24}
        for (what, how), call in heads_rows(mamba2()).items():
            table.add({**head, "what": what, "how": how, **its}, call)
        for dtype in DTYPES:
            for batch in BATCHES:
                for name, pixels in SIZES:
                    model = Model(Configuration(name, pixels, batch, dtype), device)
                    head = {"model": name, "batch": batch, "dtype": dtype}
                    for scans, record in zip(model.scans, model.records(batch), strict=True):
                        its = {"shape": str(scans), "times": scans.layers}
                        for (what, how), call in operator_rows(record, scans.length, batch, dtype).items():
                            table.add({**head, "what": what, "how": how, **its}, call)
                    images = model.images(batch)
                    whole = {"forward": calls._plain, "forward + attention": calls._traced}
                    for what, make in whole.items():
                        table.add(
                            {**head, "what": what, "how": "model", "shape": None, "times": 1},
                            make(model.module, images),
                        )
                    if importlib.util.find_spec("mamba_ssm") and dtype == "float32":
                        records = functools.partial(model.records, batch)
                        for part in calls._mamba_ssm(model, batch, records).parts:
                            table.add(
                                {
                                    **head,
                                    "what": "scan",
                                    "how": "mamba-ssm",
                                    "shape": str(part.scans),
                                    "times": part.times,
                                },
                                part.make(),
                            )
                    del model, images
                    if GPU:
                        torch.cuda.empty_cache()
    table.totals()
    return 0


def profile() -> int:
    """Launches of real shapes, once each, between the profiler's start and stop."""
    none = (None, None)
    with torch.no_grad():
        for name, pixels in SIZES:
            record = Model(Configuration(name, pixels, 8, "float32"), torch.device("cuda", 0)).records(8)[0]
            sync()
            torch.cuda.profiler.start()
            y = fused.BACKEND.selective_scan(record, True)
            for kernel in KERNELS:
                kernels.attention(operators.launcher, record, none, "mean", True, False, kernel)
            kernels.attention(operators.launcher, record, none, "mean", True, True)
            kernels.backward(operators.launcher, record, torch.ones_like(y), True)
            sync()
            torch.cuda.profiler.stop()
        record = mamba2()
        sync()
        torch.cuda.profiler.start()
        kernels.attention(operators.launcher, record, none, "mean", True, True, "attention_heads")
        sync()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(profile() if "profile" in sys.argv[1:] else timing())
