"""The kernels as operators of torch: registered right, compiled, deterministic where asked; and what they refuse."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_attn import ops
from mamba_attn.core import order_check
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import BackendUnavailableError, MambaAttnError, MatrixTooLargeError
from mamba_attn.ops import dispatch
from mamba_attn.ops.cuda import fused, kernel_args, kernels, operators
from mamba_attn.ops.flat_records import flatten
from tests import emulation
from tests.kernels.machines import MACHINES, Recorder, machine
from tests.ops.bounds import weights
from tests.ops.cases import Case, make

SMALL = Case(batch=1, routes=2, channels=3, states=2, grid=(2, 3))


@pytest.fixture(params=MACHINES)
def there(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with machine(request.param) as recorder:
        yield recorder


def leaves(record: ScanRecord) -> ScanRecord:
    return record.map_tensors(lambda x: x.detach().clone().requires_grad_())


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.15 warns of what its own check does
def test_opcheck(there: Recorder, merged: bool, skip: bool) -> None:
    record = leaves(make(Case(batch=1, routes=2, channels=3, states=2, grid=(2, 3), skip=skip)))
    fields = flatten(record)
    rows = torch.randn(1, 2, 3, 6, requires_grad=True)
    checks = (
        (operators.selective_scan, (*fields, merged)),
        (operators.scan_and_attention, (*fields, merged, "mean")),
        (operators.hidden_attention, (*fields, merged, rows, None, "sum")),
        (operators.hidden_attention, (*fields, merged, None, None, "each")),
    )
    for operator, arguments in checks:
        torch.library.opcheck(operator, arguments)
    with torch.no_grad():
        y = operators.selective_scan(*fields, merged)
        detached = flatten(record.map_tensors(torch.Tensor.detach))
        torch.library.opcheck(operators.selective_scan_backward, (torch.ones_like(y), *detached, merged))


COMPILED = """
import sys, torch
from mamba_attn.ops.cuda import fused
from tests.kernels.machines import machine
from tests.ops.bounds import weights
from tests.ops.cases import Case, make

with machine(sys.argv[1]):
    record = make(Case(batch=1, routes=2, channels=3, states=2, grid=(2, 3)))

    def run(u, delta):
        own = record.replace(source_u=u, source_delta=delta)
        y, matrix = fused.BACKEND.scan_and_attention(own, "mean", True)
        return y, matrix, fused.BACKEND.selective_scan(own, False)

    results = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        inputs = [x.detach().clone().requires_grad_() for x in (record.source_u, record.source_delta)]
        y, matrix, each = call(*inputs)
        gradients = torch.autograd.grad(y.sum() + (matrix * matrix).sum() + (each * each).sum(), inputs)
        results.append([y, matrix, each, *gradients])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
print("same")
"""


@pytest.mark.parametrize("name", [name for name in MACHINES if name in ("host", "device")])
def test_under_torch_compile_in_one_graph(name: str) -> None:
    root = Path(__file__).parents[
        2
    ]  # a process of its own: dynamo cannot trace the checks of shapes that tests install
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, name], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.stdout == "same\n", done.stderr


def test_left_alone_the_library_picks_the_kernels_where_they_run(there: Recorder) -> None:
    record = make(SMALL)
    ops.hidden_attention(record)
    assert there.launched == ["attention_direct"]
    ops.hidden_attention(record.map_tensors(torch.Tensor.double))
    assert len(there.launched) == 1  # float64 is not for them


def test_deterministic_algorithms_take_one_route_after_the_other(there: Recorder) -> None:
    record = make(Case(batch=1, routes=4, channels=40, states=1, grid=(4, 5), frame="tokens"))
    usual = ops.hidden_attention(record, backend="fused")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.allclose(ops.hidden_attention(record, backend="fused"), usual, rtol=1e-5, atol=1e-6)
        assert there.launched == ["attention_factored_64"] * 5
        with pytest.raises(BackendUnavailableError, match="its backward adds in no fixed order and deterministic"):
            ops.selective_scan(leaves(record), backend="fused")
        ops.selective_scan(leaves(record))  # another backend goes on
        assert len(there.launched) == 5
        wide = make(Case(batch=1, routes=1, channels=130, states=1, grid=(1, 9)))
        row = ops.attention_row(wide, row=7)
        assert there.launched[5:] == ["attention_line"] * 3  # 64 channels at a time
        torch.testing.assert_close(row, ops.hidden_attention(wide, backend="reference")[:, 7], rtol=1e-5, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def test_deterministic_launches_have_one_writer_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(Case(batch=1, routes=4, channels=70, states=1, grid=(4, 5), frame="tokens"))
    w = weights(record)
    writers = []

    def launch(self: emulation.Emulator, *rest: Any) -> None:
        call = getattr(rest[4], "call", rest[4])
        blocks = 1 if call.fold == kernels._FOLDS["each"] else rest[1] if rest[0] == "attention_line" else call.splits
        writers.append(call.routes * blocks)
        usual(self, *rest)

    usual = emulation.Emulator.launch
    monkeypatch.setattr(emulation.Emulator, "launch", launch)
    calls = (
        lambda: ops.hidden_attention(record, backend="fused", **w),
        lambda: ops.attention_row(record, row=7, **w),
        lambda: ops.attention_row(record, row=7, fold="each", **w),
        lambda: ops.attention_column(record, column=7, fold="positive", **w),
    )
    with machine("host", multiprocessors=1000):
        expected = [call() for call in calls]
        assert min(writers) > 1
        writers.clear()
        torch.use_deterministic_algorithms(True)
        try:
            found = [call() for call in calls]
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)
    assert set(writers) == {1}
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_structures_are_those_of_the_source() -> None:
    library = emulation.library()
    mirrored = {"Call": kernel_args.CCall, "Backward": kernel_args.CBackward, "Line": kernel_args.CLine}
    for name, structure in mirrored.items():
        assert library.size_of(name.encode()) == ctypes.sizeof(structure)
    for kernel in (*kernels._TILES, "attention_heads"):
        assert library.size_of(kernel.encode()) == kernels._attention_shared(kernel, 1)
    assert library.size_of(b"ChunkMemory") == kernels._chunk_shared(0)


def test_arrays_through_the_emulator() -> None:
    generator = np.random.default_rng(0)
    delta, A = generator.random((2, 5, 40), np.float32), -generator.random((5, 3), np.float32) - 0.1
    B, C, u = (generator.standard_normal((2, n, 40)).astype(np.float32) for n in (3, 3, 5))
    truth = ops.hidden_attention(*map(torch.from_numpy, (delta, A, B, C)), fold="absolute", backend="reference")
    found = emulation.hidden_attention(delta, A, B, C, fold="absolute")
    np.testing.assert_allclose(found, truth.numpy(), rtol=1e-5, atol=1e-6)
    y, matrix = emulation.selective_scan(u, delta, A, B, C, attention="each")
    np.testing.assert_allclose(y, np.einsum("bcij,bcj->bci", matrix, u), rtol=1e-4, atol=1e-4)


def test_an_order_that_points_outside_is_refused_and_never_followed(
    there: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make(SMALL)
    order = record.write_order.clone()
    wrong = record.replace(write_order=order)
    order[1, 2] = 6
    with pytest.raises(ValueError, match=r"write_order visits 0\.\.6, but there are 6 tokens"):
        ops.hidden_attention(wrong, backend="fused")
    order[1, 2] = record.write_order[1, 2]
    ops.selective_scan(wrong, backend="fused")
    order[1, 2] = -1
    with pytest.raises(ValueError, match=r"write_order visits -1\.\.5"):  # the same tensor, changed since
        ops.selective_scan(wrong, backend="fused")
    monkeypatch.setattr(order_check, "capturing", lambda order: True)  # no look is possible while a graph is captured
    found = ops.hidden_attention(wrong, backend="fused")
    rest = [t for t in range(6) if t != record.write_order[1, 2]]
    torch.testing.assert_close(found[:, rest], ops.hidden_attention(record, backend="fused")[:, rest])


def test_an_order_is_looked_at_once(there: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(SMALL)
    ops.hidden_attention(record, backend="fused")
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, dim: pytest.fail("looked again"))
    ops.hidden_attention(record, backend="fused")


def test_out_of_memory_says_what_helps() -> None:
    class Full(emulation.Emulator):
        def launch(self, *arguments: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    record = make(SMALL)
    with emulation.emulated(Full()), pytest.raises(MambaAttnError, match=r"1 images.*CUDA out of memory\. Use fewer"):
        ops.hidden_attention(record, backend="fused")


def test_what_the_kernels_do_not_take_is_a_sentence() -> None:
    record = make(SMALL)
    with machine("host", shared_limit=9000):
        wide = make(Case(batch=1, routes=1, channels=2, states=40, grid=(1, 4)))
        fused._warned.clear()
        with pytest.warns(UserWarning, match="skips its CUDA kernel here .*: 40 states need 34,048 bytes"):
            assert ops.selective_scan(wide).isfinite().all()
        with pytest.raises(
            BackendUnavailableError, match=r"40 states need 34,048 bytes of shared memory .* has 9,000; use"
        ):
            ops.selective_scan(wide, backend="fused")
    with machine("host"):
        with pytest.raises(BackendUnavailableError, match=r"an input is torch\.float64; use backend='blocked'"):
            ops.selective_scan(record.map_tensors(torch.Tensor.double), backend="fused")
        with pytest.raises(BackendUnavailableError, match="on several devices, cpu and meta"):
            ops.selective_scan(record.replace(D=record.D.to("meta")), backend="fused")
        one = torch.ones(())
        endless = make(Case(batch=1, routes=1, channels=1, states=1, grid=(1, 1))).replace(
            source_u=one.expand(1, 1, 1, 2**23), source_delta=one.expand(1, 1, 1, 2**23),
            source_B=one.expand(1, 1, 1, 1, 2**23), source_C=one.expand(1, 1, 1, 1, 2**23),
            read_order=torch.arange(2**23)[None], write_order=torch.arange(2**23)[None], tokens=2**23,
        )  # fmt: skip
        with pytest.warns(UserWarning, match="more than 2,147,483,647 blocks; split the batch"):
            assert fused.BACKEND.unavailable(endless)
        deep = make(Case(batch=1, routes=1, channels=1, states=1, grid=(1, 1), skip=False)).replace(
            source_u=one.expand(1, 1, 2**31, 1), source_delta=one.expand(1, 1, 2**31, 1), A=one.expand(1, 2**31, 1)
        )
        with pytest.warns(UserWarning, match="2147483648 channels x 1 steps need more than"):
            assert fused.BACKEND.unavailable(deep)
        with pytest.raises(MatrixTooLargeError, match="attention_row"):
            dispatch.require_memory(ops.arguments.Call(endless, True, True, "call"), "mean")
    far = make(SMALL).map_tensors(lambda x: torch.empty_strided(x.shape, x.stride(), device="meta"))
    assert kernels.limits(far, emulation.Emulator()) is None
    apart = far.source_B.shape, [*far.source_B.stride()[:-1], 2**30]
    reason = kernels.limits(far.replace(source_B=torch.empty_strided(*apart, device="meta")), emulation.Emulator())
    assert reason is not None
    assert reason.startswith("B spans 4,294,967,296 bytes or more")
    assert "B.contiguous()" in reason
    with pytest.raises(BackendUnavailableError, match="it runs on CUDA devices and the tensors are on cpu"):
        ops.selective_scan(record, backend="fused")
