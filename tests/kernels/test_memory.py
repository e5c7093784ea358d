"""Kernels touch nothing outside their tensors, and use every part of their scratch memory; on the host."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core import order_check
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.cuda import fused, kernels, operators
from mamba_attn.ops.cuda.kernel_args import call, output
from tests.emulation import Emulator, emulated
from tests.ops.bounds import weights
from tests.ops.cases import Case, make

PAGE = mmap.PAGESIZE
CASES = [
    Case(batch=1, routes=2, channels=19, states=3, grid=(7, 10), frame="tokens"),
    Case(batch=1, routes=1, channels=18, heads=9, groups=2, states=17, grid=(1, 131), shared_states=True),
    Case(
        batch=1, routes=2, channels=20, heads=4, groups=2, states=17, grid=(7, 10), frame="tokens", shared_states=True
    ),
]
Given = list[torch.Tensor | None]


def guarded(x: torch.Tensor, at_the_end: bool) -> torch.Tensor:
    """A copy whose last byte, or first, borders on memory that must not be touched."""
    size = x.numel() * x.itemsize
    if size == 0:
        return x.clone()
    room = math.ceil(size / PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for page in (address, address + PAGE + room):
        assert protect(page, PAGE, 0) == 0
    offset = PAGE + (room - size if at_the_end else 0)
    inner = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).reshape(x.shape)
    return inner.copy_(x)


def run(record: ScanRecord, w: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every kernel once, or more."""
    results: Given = []
    for merged in (True, False):
        y = fused.BACKEND.selective_scan(record, merged)
        results += [y, *kernels.backward(operators.launcher, record, torch.ones_like(y), merged)]
        rows_and_columns = (w["row_weight"] if merged else None, w["col_weight"])
        by_heads = ["attention_heads"] if kernels.shares_matrices(record) else []
        if by_heads:
            results.append(kernels.scan(operators.launcher, record, merged, "attention_heads"))
        for kernel in (*kernels._TILES, *by_heads):
            results += kernels.attention(operators.launcher, record, rows_and_columns, "mean", merged, True, kernel)
        for axis in ("row", "column"):
            results.append(fused.BACKEND.attention_line(record, axis, 65, rows_and_columns, "each", merged))
    return [x for x in results if x is not None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_nothing_outside_a_tensor_is_touched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(case)
    w = weights(record)
    allocate = ((torch, "zeros"), (torch, "empty"), (torch.Tensor, "new_empty"))
    usual = [getattr(owner, name) for owner, name in allocate]
    with emulated():
        expected = run(record, w)
        for at_the_end in (True, False):
            inside = partial(guarded, at_the_end=at_the_end)
            orders = {name: inside(getattr(record, name)) for name in ("read_order", "write_order")}
            tensors = record.map_tensors(inside).replace(**orders), {name: inside(weight) for name, weight in w.items()}
            with monkeypatch.context() as patched:
                for (owner, name), function in zip(allocate, usual, strict=True):
                    patched.setattr(
                        owner, name, lambda *sizes, f=function, g=inside, **options: g(f(*sizes, **options))
                    )
                found = run(*tensors)
            for value, other in zip(found, expected, strict=True):
                assert torch.equal(value, other)


def test_memory_outside_a_tensor_is_noticed() -> None:
    record = make(Case(batch=1, routes=1, channels=1, states=1, grid=(1, 9))).map_tensors(lambda x: guarded(x, True))
    y = torch.zeros(10)
    told = call(record, None, None)
    told.y, told.length = output(y, ("position",)), 10
    with pytest.raises(AssertionError, match="a block touched memory outside its tensors"):
        Emulator().launch("selective_scan", 1, 32, 2052, told, y.device)


class Watcher(Emulator):
    """Looks at the scratch memory that a launch leaves."""

    def launch(self, name: str, *rest: Any) -> None:
        super().launch(name, *rest)
        job = rest[3]
        told = getattr(job, "call", job)
        rows = told.batch * told.routes
        if name == "selective_scan_backward":
            self.scratch = self.floats(job.entering, (rows * told.channels, math.ceil(told.length / 128), told.states))

    def floats(self, address: int, shape: Sequence[int]) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_float * math.prod(shape)).from_address(address), dtype=torch.float32).reshape(
            *shape
        ).clone()  # fmt: skip


def test_every_channel_keeps_its_own_states() -> None:
    """The backward pass's scratch: each block has a part of its own, whatever runs beside it."""
    record = make(Case(routes=2, channels=6, groups=2, states=2, grid=(1, 300)))
    with emulated(Watcher()) as watcher:
        y = ops.selective_scan(record.map_tensors(lambda x: x.requires_grad_()), backend="fused")
        y.sum().backward()
    scratch = watcher.scratch
    assert scratch.isfinite().all()  # memory comes filled with NaN
    assert (scratch[:, 0] == 0).all()
    last = scratch[:, 1:].flatten(1)
    assert all((a != b).all() for a, b in pairwise(last))


def test_orders_that_point_outside_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody could look at them before, while a CUDA graph is captured."""
    monkeypatch.setattr(order_check, "capturing", lambda order: True)
    record = make(Case(batch=1, routes=2, channels=3, states=2, grid=(2, 3)))
    with emulated():
        usual = ops.selective_scan(record, attention="mean", backend="fused")
        for outside in (-1, 6, 2**40, -(2**40)):
            order = record.write_order.clone()
            order[1, 2] = outside
            y, matrix = ops.selective_scan(record.replace(write_order=order), attention="mean", backend="fused")
            rest = [t for t in range(6) if t != record.write_order[1, 2]]
            torch.testing.assert_close(y[..., rest], usual[0][..., rest])
            torch.testing.assert_close(matrix[:, rest], usual[1][:, rest])


def test_orders_of_any_layout_and_integer_type() -> None:
    record = make(Case(routes=2, channels=3, states=2, grid=(3, 4), frame="tokens"))
    with emulated():
        usual = ops.hidden_attention(record, backend="fused")
        for change in (torch.Tensor.int, lambda order: order.t().contiguous().t()):
            again = record.replace(read_order=change(record.read_order), write_order=change(record.write_order))
            assert torch.equal(ops.hidden_attention(again, backend="fused"), usual)


def test_a_block_that_scans_has_room_for_its_states() -> None:
    record = make(Case(batch=1, routes=1, channels=4, states=2400, grid=(1, 3)))
    with emulated() as emulator:
        y, _ = kernels.attention(emulator, record, (None, None), "mean", True, with_y=True, kernel="attention_direct")
    torch.testing.assert_close(y, ops.selective_scan(record, backend="blocked"), rtol=1e-4, atol=1e-4)
    for kernel, (_, threads) in kernels._TILES.items():
        assert kernels._attention_shared(kernel, 9999) == 2**15 + threads // 32 * 9999 * 4
