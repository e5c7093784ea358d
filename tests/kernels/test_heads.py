"""Heads whose channels share a matrix and whose states share a decay, as in Mamba-2: their matrix and their scan."""

import functools
from collections.abc import Iterator

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.cuda import kernels
from tests.kernels.machines import HOSTS, MACHINES, Recorder, machine
from tests.ops.bounds import assert_within, excess, magnitude, weights
from tests.ops.cases import Case, double, make

FOLDS = ("mean", "sum", "each", "positive", "absolute")
CASES = [
    Case(channels=12, heads=4, states=5, grid=(5, 8), order="hilbert", shared_states=True),
    Case(batch=1, channels=10, heads=2, groups=2, states=17, grid=(7, 10), frame="tokens", shared_states=True),
    Case(batch=1, routes=1, channels=70, heads=1, states=70, grid=(1, 131), shared_states=True),  # two slices of a head
    Case(batch=1, routes=1, channels=19, states=2, grid=(1, 150), delta_scale=5.0, shared_states=True),
    Case(batch=1, routes=1, channels=3, states=16, grid=(1, 1), skip=False, shared_states=True),  # a channel a head
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(params=MACHINES)
def there(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with machine(request.param) as recorder:
        yield recorder


def matrix(there: Recorder, record: ScanRecord, fold: str, w: dict[str, torch.Tensor], merged: bool) -> torch.Tensor:
    pair = (w.get("row_weight"), w.get("col_weight"))
    return kernels.attention(there, record, pair, fold, merged, kernel="attention_heads")[1]


@functools.cache  # for all machines whose tensors lie there
def expected(case: Case, fold: str, weighted: tuple[str, ...], where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix, and the sum of its terms' absolute values, in float64."""
    record = make(case)
    w = {name: weight for name, weight in weights(record).items() if name in weighted}
    exact, absolute = ({name: f(weight.double()) for name, weight in w.items()} for f in (torch.clone, torch.abs))
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
    return truth, ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)


WEIGHTED = {
    (): FOLDS,
    ("row_weight",): ("mean", "positive"),
    ("col_weight",): ("absolute", "positive"),
    ("row_weight", "col_weight"): ("sum", "each", "positive", "absolute"),
}


@cases
@pytest.mark.parametrize("weighted", WEIGHTED, ids=str)
def test_every_fold_equals_the_reference(there: Recorder, case: Case, weighted: tuple[str, ...]) -> None:
    record = make(case)
    w = {name: weight for name, weight in weights(record).items() if name in weighted}
    for fold in WEIGHTED[weighted]:
        truth, bound = expected(case, fold, weighted, record.A.device.type)
        assert_within(matrix(there, record, fold, w, merged=True), truth, bound, 1e-6 + 2 * there.unit)
    if not weighted:
        each = matrix(there, record, "each", w, merged=False)
        assert each.shape[:3] == (record.batch, record.routes, record.channels)
        assert (each.triu(1) == 0).all()
        plain = ops.hidden_attention(record, fold="each", backend="blocked")
        torch.testing.assert_close(matrix(there, record, "each", w, merged=True), plain, rtol=1e-4, atol=1e-4)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_y_by_chunks_equals_the_reference(there: Recorder, case: Case, dtype: torch.dtype) -> None:
    record = make(case, dtype)
    truth = ops.selective_scan(double(record), backend="reference")
    bound = ops.selective_scan(magnitude(double(record)), backend="reference")
    y = kernels.scan(there, record, merged=True, kernel="attention_heads")
    assert there.launched == ["attention_heads"]
    assert excess(y, truth, bound) <= 1e-6 + 2 * there.unit
    both = kernels.attention(there, record, (None, None), "mean", True, with_y=True, kernel="attention_heads")
    torch.testing.assert_close(both[0], y, rtol=0, atol=1e-6 * bound.max().item())  # routes meet in any order


def test_the_library_picks_them(there: Recorder) -> None:
    record = make(CASES[2])
    y, mean = ops.selective_scan(record, attention="mean", backend="fused")
    again, absolute = ops.selective_scan(record, backend="fused"), ops.hidden_attention(record, fold="absolute")
    assert there.launched == ["attention_heads"] * 3
    assert torch.equal(y, again)
    assert (mean.abs() <= absolute * (1 + 1e-6)).all()
    few = make(CASES[3])  # too few channels and states to fill the matrix unit
    ops.selective_scan(few, backend="fused")
    apart = make(Case(channels=12, heads=4, groups=3, states=5, shared_states=True))  # a head in two groups
    ops.hidden_attention(apart, backend="fused")
    assert there.launched[3:] == ["selective_scan", "attention_direct"]


def test_gradients_of_y_by_chunks(there: Recorder) -> None:
    results = []
    for backend in ("fused", "blocked"):
        record = make(CASES[2]).map_tensors(lambda x: x.detach().clone().requires_grad_())
        y = ops.selective_scan(record, backend=backend)
        wanted = [record.source_u, record.source_delta, record.A, record.source_B, record.source_C]
        results.append(torch.autograd.grad((y * y).sum(), wanted))
    assert there.launched == ["attention_heads", "selective_scan_backward"]
    for value, plain in zip(*results, strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("host", HOSTS)
def test_heads_divided_among_blocks_and_any_schedule(host: str) -> None:
    record = make(Case(batch=1, channels=72, heads=36, groups=2, states=3, grid=(8, 9), shared_states=True))
    pair, results = (None, weights(record)["col_weight"]), []  # rows of single routes would be weighted by route
    for schedule, multiprocessors in ((0, 1), (1, 1), (3, 1), (77, 1), (0, 1000)):
        with machine(host, schedule=schedule, multiprocessors=multiprocessors) as there:
            results.append(kernels.attention(there, record, pair, "positive", False, True, "attention_heads"))
    for other in results[1:4]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    torch.testing.assert_close(results[4][1], results[0][1], rtol=1e-5, atol=1e-5)  # three blocks add
