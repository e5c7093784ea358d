"""Parts of gpu_run.sh that ask whether the kernels are right: environment, checks, launches.

    DEVICE=cuda OUT=FOLDER python -m benchmarks.gpu_smoke environment

With DEVICE=cpu, NVRTC's PTX on the host takes the GPU's place.
"""

import functools
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import dispatch
from mamba_attn.ops.cuda import fused, kernels, operators
from mamba_attn.ops.cuda.launcher import LAUNCHER
from tests.kernels.machines import machine
from tests.ops.bounds import excess, magnitude
from tests.ops.cases import Case, double, make

GPU = os.environ.get("DEVICE", "cuda") == "cuda"
OUT = Path(os.environ.get("OUT", "."))
HERE = "device" if GPU else "ptx"
KERNELS = tuple(kernels._TILES)
WORST = 1e-5  # of the absolute terms; tests/kernels holds the finer bounds
INPUTS = ("source_u", "source_delta", "A", "source_B", "source_C", "D")
CASES = (
    [
        Case(batch=2, routes=2, channels=19, states=16, grid=(14, 14), class_token=True, frame="tokens"),
        Case(batch=1, routes=4, channels=33, states=1, grid=(15, 20), frame="tokens"),
        Case(batch=1, routes=1, channels=18, heads=9, groups=2, states=17, grid=(1, 131), shared_states=True),
        Case(batch=2, routes=2, channels=70, heads=2, states=70, grid=(9, 15), frame="tokens", shared_states=True),
    ]
    if GPU
    else [
        Case(batch=1, routes=2, channels=5, states=3, grid=(3, 5), frame="tokens"),
        Case(batch=1, routes=1, channels=34, heads=2, states=16, grid=(1, 9), shared_states=True),
    ]
)


def kernels_for(record: ScanRecord) -> tuple[str, ...]:
    """The attention kernels that take a record."""
    return (*KERNELS, "attention_heads") if kernels.shares_matrices(record) else KERNELS


def sync() -> None:
    """Wait for the device."""
    if GPU:
        torch.cuda.synchronize()


def save(name: str, data: object) -> None:
    """Write a JSON file of the run."""
    (OUT / name).write_text(json.dumps(data, indent=1))


def on_device(record: ScanRecord) -> ScanRecord:
    """The record with its orders on the device too: a graph cannot copy them from the host."""
    where = "cuda" if GPU else "cpu"
    return record.replace(read_order=record.read_order.to(where), write_order=record.write_order.to(where))


def exact(record: ScanRecord) -> ScanRecord:
    """The record in float64 on the host."""
    host = double(record).map_tensors(torch.Tensor.cpu)
    return host.replace(read_order=record.read_order.cpu(), write_order=record.write_order.cpu())


def environment() -> int:
    """What machine this is, and whether the kernels compile and load."""
    told: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version}
    if GPU:
        if not torch.cuda.is_available():
            print("torch sees no CUDA device here; for a rehearsal set DEVICE=cpu")
            return 3
        its = torch.cuda.get_device_properties(0)
        told |= {"gpu": its.name, "capability": [its.major, its.minor], "multiprocessors": its.multi_processor_count}
        told |= {"memory": its.total_memory}
        began = time.perf_counter()
        told["problem"] = LAUNCHER.problem(torch.device("cuda", 0))
        told["seconds to compile and load"] = time.perf_counter() - began
        if told["problem"] is None:
            told["shared memory of a block"] = LAUNCHER.shared_limit(torch.device("cuda", 0))
    save("environment.json", told)
    print(told)
    return 3 if told.get("problem") else 0


def launches() -> int:
    """Every kernel once or more, small: for the sanitizers."""
    with machine(HERE):
        for case in (CASES[0], CASES[-1]) if os.environ.get("SHORT") else CASES:
            record = on_device(make(case)).map_tensors(lambda x: x.requires_grad_())
            plain = record.map_tensors(torch.Tensor.detach)
            for kernel in kernels_for(plain):
                kernels.attention(operators.launcher, plain, (None, None), "mean", True, True, kernel)
            kernels.attention(operators.launcher, plain, (None, None), "each", False, True, "attention_direct")
            for axis in ("row", "column"):
                fused.BACKEND.attention_line(plain, axis, 7, (None, None), "mean", True)
            ops.selective_scan(record, backend="fused").sum().backward()  # type: ignore[no-untyped-call]
            sync()
    return 0


class Checks:
    """Named checks: a number is an error (of the absolute terms), text or False a failure."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.bad: list[str] = []

    def check(self, name: str, call: Callable[[], float | bool | str]) -> None:
        """Run one; an exception fails it, the others still run."""
        began = time.perf_counter()
        value: float | bool | str
        try:
            value = call()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            traceback.print_exc()
            value = f"{type(error).__name__}: {error}"[:600]
        wrong = isinstance(value, str) or value is False or (isinstance(value, float) and not value <= WORST)
        self.found[name] = {"value": value, "seconds": round(time.perf_counter() - began, 3)}
        self.bad += [name] if wrong else []
        print("BAD" if wrong else "ok ", name, value)
        save("smoke.json", {"bad": self.bad, "found": self.found})


def poison() -> None:
    """Fill freed memory with NaN: what torch.empty hands out next shows whether a kernel reads it."""
    if GPU:
        held = [torch.full((1 << bits,), math.nan, device="cuda") for bits in range(8, 25, 2)]
        sync()
        del held


def scan_error(record: ScanRecord, truth: ScanRecord, merged: bool) -> float:
    """Error of y."""
    poison()
    y = fused.BACKEND.selective_scan(record, merged)
    sync()
    with torch.device("cpu"):
        spec = dispatch.BACKENDS["reference"]
        return excess(y.cpu(), spec.selective_scan(truth, merged), spec.selective_scan(magnitude(truth), merged))


def attention_error(record: ScanRecord, truth: ScanRecord, kernel: str, fold: str, merged: bool) -> float | str:
    """Error of a matrix."""
    poison()
    matrix = kernels.attention(operators.launcher, record, (None, None), fold, merged, True, kernel)[1]
    sync()
    with torch.device("cpu"):
        spec = dispatch.BACKENDS["reference"]
        expected = spec.hidden_attention(truth, None, None, fold, merged)
        bound = spec.hidden_attention(magnitude(truth), None, None, fold, merged)
        found = matrix.cpu()
        if not torch.isfinite(found).all():
            return "not finite"
        if (found[bound == 0] != 0).any():
            return "not zero where nothing flows"
        return excess(found, expected, bound)


def line_error(record: ScanRecord, truth: ScanRecord, axis: str) -> float:
    """Error of row or column 7."""
    value = fused.BACKEND.attention_line(record, axis, 7, (None, None), "mean", True)
    sync()
    with torch.device("cpu"):
        spec = dispatch.BACKENDS["reference"]
        whole = [spec.hidden_attention(each, None, None, "mean", True) for each in (truth, magnitude(truth))]
        own = [matrix[:, 7] if axis == "row" else matrix[..., 7] for matrix in whole]
        return excess(value.cpu(), *own)


def gradient_error(record: ScanRecord, truth: ScanRecord) -> float:
    """Largest relative error of a gradient, in norm."""
    names = [name for name in INPUTS if getattr(record, name) is not None]
    results: list[tuple[Tensor, ...]] = []
    for own, backend in ((record, "fused"), (truth, "reference")):
        leaves = own.map_tensors(lambda x: x.detach().clone().requires_grad_())
        with torch.device("cpu" if backend == "reference" or not GPU else "cuda"):
            y = ops.selective_scan(leaves, backend=backend)
            head = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device="cpu").reshape(y.shape).to(y)
            results.append(torch.autograd.grad(y, [getattr(leaves, name) for name in names], head))
    errors = [(a.cpu().double() - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(*results, strict=True)]
    return float(max(errors))


def crowded() -> bool | str:
    """More blocks than fit on the card, many times: what runs beside a block must not matter."""
    sizes = {"batch": 64, "channels": 96, "grid": (14, 14)} if GPU else {"batch": 1, "channels": 3, "grid": (3, 3)}
    record = on_device(make(Case(routes=4, states=1, frame="tokens", **sizes)))  # type: ignore[arg-type]
    first = fused.BACKEND.scan_and_attention(record, "mean", False)
    for _ in range(20 if GPU else 1):
        y, matrix = fused.BACKEND.scan_and_attention(record, "mean", False)
        sync()
        if not (torch.equal(y, first[0]) and torch.allclose(matrix, first[1], rtol=1e-5, atol=1e-7)):
            return "runs differ"
    return True


def on_streams(checks: Checks) -> None:
    """What only a GPU has: streams, graphs, threads, determinism, half precision."""
    record = on_device(make(CASES[0]))

    def run() -> tuple[Tensor, Tensor]:
        return fused.BACKEND.scan_and_attention(record, "mean", True)

    usual = run()
    sync()

    def same(pair: tuple[Tensor, Tensor]) -> bool:
        sync()
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(pair, usual, strict=True))

    def side() -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            return same(run())

    def graph() -> bool:
        captured = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(captured):
            pair = run()
        for x in pair:
            x.fill_(math.nan)
        for _ in range(3):
            captured.replay()
        return same(pair)

    def threads() -> bool:
        results: list[bool] = []

        def work() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    pair = run()
                torch.cuda.current_stream().synchronize()
                results.append(same(pair))

        crew = [threading.Thread(target=work) for _ in range(4)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        return len(results) == 4 and all(results)

    def deterministic() -> bool:
        torch.use_deterministic_algorithms(True)
        try:
            one, other = (ops.hidden_attention(record, backend="fused") for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        return torch.equal(one, other)

    checks.check("on another stream", side)
    checks.check("captured in a CUDA graph, replayed three times", graph)
    checks.check("four threads on four streams", threads)
    checks.check("deterministic mode repeats its bits", deterministic)
    for dtype in (torch.bfloat16, torch.float16):
        half = on_device(make(CASES[0], dtype))
        checks.check(
            f"inputs in {dtype}", functools.partial(attention_error, half, exact(half), KERNELS[1], "mean", True)
        )


def check_case(found: Checks, index: int, case: Case) -> None:
    """Every kernel, fold and frame, lines and gradients, of one case."""
    record = on_device(make(case))
    truth = exact(record)
    for merged in (True, False):
        frame = "tokens" if merged else "steps"
        found.check(f"{index} scan, {frame}", functools.partial(scan_error, record, truth, merged))
        for kernel in kernels_for(record):
            signed = kernel.startswith("attention_factored")
            for fold in ("mean",) if signed else ("mean", "each", "positive", "absolute"):
                call = functools.partial(attention_error, record, truth, kernel, fold, merged)
                found.check(f"{index} {kernel}, {fold}, {frame}", call)
    for axis in ("row", "column"):
        found.check(f"{index} {axis}", functools.partial(line_error, record, truth, axis))
    found.check(f"{index} gradients", functools.partial(gradient_error, record, truth))


def checks() -> int:
    """All checks."""
    found = Checks()
    with machine(HERE):
        for index, case in enumerate(CASES):
            check_case(found, index, case)
        found.check("launches of a crowded grid agree", crowded)
        if GPU:
            on_streams(found)
    print(f"{len(found.found)} checks, {len(found.bad)} bad: {found.bad}")
    return int(bool(found.bad))


if __name__ == "__main__":
    sys.exit({"environment": environment, "checks": checks, "launches": launches}[sys.argv[1]]())
