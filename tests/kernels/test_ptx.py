"""The translator of PTX itself; what it translates is tested wherever a test's id holds ptx."""

import re
from collections.abc import Iterator

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.cuda import kernels
from tests import ptx
from tests.emulation import emulated
from tests.kernels.machines import machine
from tests.ops.bounds import excess, magnitude
from tests.ops.cases import Case, double, make

CASE = Case(batch=1, routes=2, channels=18, states=16, grid=(9, 15), class_token=True)


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Kernels that a test replaces are forgotten after it."""
    yield
    ptx.program.cache_clear()


def signed(record: ScanRecord, launcher: object) -> tuple[torch.Tensor, float]:
    """The mean matrix of the factored kernel, and its error in parts of the absolute terms."""
    value = kernels.attention(launcher, record, (None, None), "mean", True, kernel="attention_factored_64")[1]
    truth = ops.hidden_attention(double(record), fold="mean", backend="reference")
    bound = ops.hidden_attention(magnitude(double(record)), fold="mean", backend="reference")
    return value, excess(value, truth, bound)


@pytest.mark.parametrize(
    "line", ["brkpt;", "vote.sync.all.pred %p1, %p2, -1;", "add.rz.f32 %f1, %f2, %f3;", "mma.sync.other {%r1}, {%r2};"]
)
def test_what_is_not_known_is_an_error(line: str) -> None:
    text = f".visible .entry one(\n\t.param .align 8 .b8 one_param_0[8]\n)\n\n{{\n\t{line}\n}}\n"
    with pytest.raises(ptx.UnknownInstructionError):
        ptx.translate(text)


def test_every_kernel_that_ships_is_translated() -> None:
    assert [kernel.name for kernel in ptx.translate(ptx.ptx())] == list(ptx.KERNELS)


def test_what_runs_is_counted() -> None:
    """Every exponential of one channel and state: 128 steps are one span of a warp, in 4 steps a lane."""
    record = make(Case(batch=1, routes=1, channels=1, states=3, grid=(1, 128)))
    program = ptx.program("selective_scan")
    program.counted()
    with machine("ptx"):
        ops.selective_scan(record, backend="fused")
    counted = program.counted()
    assert counted["ex2.approx.ftz.f32"] == 3 * 4
    assert counted["shfl.sync.up.b32"] == 3 * (2 * 5 + 1)  # five doublings of (decay, state), and one step on
    assert not program.counted()


@pytest.mark.full
@pytest.mark.parametrize("architecture", [75, 80, 100, 120])
def test_ptx_of_other_architectures(architecture: int) -> None:
    record = make(CASE)
    with emulated(ptx.Ptx(architecture=architecture)) as launcher:
        y = ops.selective_scan(record, backend="fused")
        matrix, error = signed(record, launcher)
    assert error <= 1e-6  # before sm_80 there is no matrix unit: sums of float32 products
    with emulated(ptx.Ptx()) as launcher:
        torch.testing.assert_close(y, ops.selective_scan(record, backend="fused"), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(matrix, signed(record, launcher)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.usefixtures("_fresh")
def test_swapped_fragments_of_the_matrix_unit_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated source cannot see this: its own statement of the layout stands in for the instruction."""
    record, text = make(CASE), ptx.ptx()
    swapped, count = re.subn(r"(mma\.sync\S+\s+\{[^}]*\},\s*\{%r\d+), (%r\d+), (%r\d+),", r"\1, \3, \2,", text)
    assert count > 0
    with emulated(ptx.Ptx()) as launcher:
        assert signed(record, launcher)[1] <= 5e-7
    monkeypatch.setattr(ptx, "ptx", lambda architecture=90: swapped)
    ptx.program.cache_clear()
    with emulated(ptx.Ptx()) as launcher:
        error = signed(record, launcher)[1]
    assert not error <= 1e-3
