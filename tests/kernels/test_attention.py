"""The attention kernels: every formulation, fold, order and type against the specification."""

from collections.abc import Iterator

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import blocked, dispatch
from mamba_attn.ops.cuda import kernels
from tests.emulation import library
from tests.kernels.machines import HOSTS, MACHINES, Recorder, machine
from tests.ops.bounds import assert_within, excess, magnitude, weights
from tests.ops.cases import CASES, Case, double, make

FOLDS = ("mean", "sum", "each", "positive", "absolute")
SIGNED = ("mean", "sum")
KERNELS = tuple(kernels._TILES)
LONG = [
    Case(routes=1, channels=3, states=2, grid=(1, 65)),
    Case(batch=1, routes=2, channels=17, states=16, grid=(14, 14), class_token=True),  # Vim's 197 tokens
    Case(batch=1, routes=4, channels=18, states=1, grid=(12, 11), frame="tokens"),
    Case(batch=1, routes=1, channels=35, states=3, grid=(1, 129), delta_scale=0.1),
    Case(batch=1, routes=1, channels=2, states=33, grid=(1, 70), delta_scale=0.01),
    Case(batch=1, routes=1, channels=36, heads=9, groups=2, states=18, grid=(9, 15), shared_states=True),
    Case(batch=1, routes=1, channels=1, states=1, grid=(1, 600), delta_scale=5.0),
]
cases = pytest.mark.parametrize("case", CASES + LONG, ids=lambda case: case.id)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(params=MACHINES)
def there(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with machine(request.param) as recorder:
        yield recorder


def attention(there: Recorder, record: ScanRecord, fold: str = "mean", merged: bool = True, **options) -> torch.Tensor:
    rows_and_columns = options.pop("weights", (None, None))
    return kernels.attention(there, record, rows_and_columns, fold, merged, **options)[1]


def no_worse_than_torch(
    there: Recorder, record: ScanRecord, fold: str, w: dict[str, torch.Tensor], *values: torch.Tensor
) -> None:
    """Within twice the error of plain PyTorch in float32, or 4 units in the last place of the absolute terms.

    A factored entry has the errors of two exponentials.
    """
    exact, absolute = ({key: f(weight.double()) for key, weight in w.items()} for f in (torch.clone, torch.abs))
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
    bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)
    plain = excess(ops.hidden_attention(record, fold=fold, backend="blocked", **w), truth, bound)
    for value in values:
        assert value.dtype == torch.float32
        assert excess(value, truth, bound) <= max(2 * plain, 2.4e-7) + 2 * there.unit


@cases
@pytest.mark.parametrize("fold", SIGNED)
def test_signed_folds_equal_the_reference(there: Recorder, case: Case, fold: str) -> None:
    record = make(case)
    w = weights(record) if fold == "sum" else {}
    rows_and_columns = (w.get("row_weight"), w.get("col_weight"))
    values = [attention(there, record, fold, weights=rows_and_columns, kernel=kernel) for kernel in KERNELS]
    no_worse_than_torch(there, record, fold, w, *values)


@cases
@pytest.mark.parametrize("fold", [fold for fold in FOLDS if fold not in SIGNED])
def test_folds_of_channels_equal_the_reference(there: Recorder, case: Case, fold: str) -> None:
    record = make(case)
    w = weights(record)
    no_worse_than_torch(there, record, fold, w, ops.hidden_attention(record, fold=fold, backend="fused", **w))


@cases
def test_routes_stay_apart_and_nothing_is_above_the_diagonal(there: Recorder, case: Case) -> None:
    record = make(case)
    truth = dispatch.BACKENDS["reference"].hidden_attention(double(record), None, None, "each", False)
    bound = dispatch.BACKENDS["reference"].hidden_attention(magnitude(double(record)), None, None, "each", False)
    each = attention(there, record, "each", merged=False)
    tolerance = (1e-6 if case.delta_scale < 10 else 1e-5) + 2 * there.unit
    assert_within(each, truth, bound, tolerance)
    assert (each.triu(1) == 0).all()
    for kernel in KERNELS:
        mean = attention(there, record, "mean", merged=False, kernel=kernel)
        assert_within(mean, truth.mean(2), bound.mean(2), tolerance)
        assert (mean.triu(1) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_without_loss(there: Recorder, dtype: torch.dtype) -> None:
    """All bit patterns that mean something: zeros, the smallest, the largest, and infinity in the last step's input."""
    record = make(Case(batch=1, channels=19, states=4, grid=(8, 9), frame="tokens"), dtype)
    smallest = torch.tensor([0.0, -0.0, 6e-8, -1e-7, 5e-5, 6.2e-5, 1e-3]).to(dtype)
    record.source_u[..., :7], record.source_B[..., 3, 8:15], record.source_C[..., 2, 2:9] = smallest, smallest, smallest
    record.source_u[..., 5, 60], record.source_u[..., 6, 61] = torch.inf, -torch.inf
    columns = torch.randn(1, 19, 72).to(dtype)
    again, rows = record.map_tensors(torch.Tensor.float), (None, columns.float())
    for kernel in KERNELS:
        half = kernels.attention(there, record, (None, columns), "sum", True, with_y=True, kernel=kernel)
        whole = kernels.attention(there, again, rows, "sum", True, with_y=True, kernel=kernel)
        for a, b in zip(half, whole, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert whole[0].isinf().any()
    no_worse_than_torch(there, record, "sum", {"col_weight": columns}, half[1])


@each_kernel
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
def test_extreme_steps(there: Recorder, kernel: str, scale: float) -> None:
    record = make(Case(routes=1, channels=3, states=2, grid=(1, 150), delta_scale=scale))
    value = attention(there, record, kernel=kernel)
    no_worse_than_torch(there, record, "mean", {}, value)
    if scale == 0.0:
        assert (value == 0).all()


def test_distances_keep_their_digits_over_thousands_of_steps(there: Recorder) -> None:
    record = make(Case(batch=1, routes=1, channels=1, states=1, grid=(1, 1500), delta_scale=0.2))
    no_worse_than_torch(there, record, "mean", {}, *(attention(there, record, kernel=kernel) for kernel in KERNELS))


def test_a_tile_sums_the_steps_between_its_chunks(there: Recorder) -> None:
    record = make(
        Case(batch=1, routes=2, channels=6, heads=3, states=2, grid=(2, 150), frame="tokens", delta_scale=0.02)
    )
    truth, bound = (ops.hidden_attention(x, backend="reference") for x in (double(record), magnitude(double(record))))
    for kernel in KERNELS:
        assert_within(attention(there, record, kernel=kernel), truth, bound, 1e-6 + 2 * there.unit)


@pytest.mark.parametrize("kernel", ["attention_factored_64", "attention_factored_128"])
def test_tf32_is_used_only_when_the_user_allows_it(there: Recorder, kernel: str) -> None:
    record = make(Case(routes=1, channels=17, states=16, grid=(1, 150)))
    exact = attention(there, record, kernel=kernel)
    torch.set_float32_matmul_precision("high")
    try:
        fast = attention(there, record, kernel=kernel)
    finally:
        torch.set_float32_matmul_precision("highest")
    for part in (slice(0, 64), slice(128, 150)):  # on the diagonal, and below it
        error = (fast - exact)[:, part, :64].norm() / exact[:, part, :64].norm()
        assert 1e-6 < error < 1e-3


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("multiprocessors", [3, 1000])
def test_channels_divided_among_blocks(multiprocessors: int, host: str) -> None:
    record = make(Case(batch=1, routes=2, channels=70, states=1, grid=(9, 9)))  # 5 x 16, for 3, 4 or 5 blocks
    with machine(host, multiprocessors=multiprocessors) as there:
        for fold in FOLDS:
            fitting = KERNELS if fold in SIGNED else KERNELS[:1]
            found = [attention(there, record, fold, kernel=kernel) for kernel in fitting]
            no_worse_than_torch(there, record, fold, {}, *found)


def test_every_tile_of_the_longest_matrices_has_its_block() -> None:
    for row in (0, 1, 2, 30, 2047, 2048, 4099, 23170, 46339):
        first = row * (row + 1) // 2
        for column in {0, row // 2, row}:
            assert library().tile_of(64 * 46340, first + column) == (row << 32) + column


def test_a_shape_chooses_its_formulation() -> None:
    def chosen(length: int, fold: str, limit: int = 227 * 1024) -> str:
        return kernels.formulation(make(Case(batch=1, routes=1, grid=(1, length))), fold, limit)

    assert chosen(197, "mean") == "attention_factored_64"
    assert chosen(784, "sum") == "attention_factored_128"
    assert chosen(784, "sum", limit=64 * 1024) == "attention_factored_64"
    assert chosen(9, "mean") == chosen(784, "positive") == chosen(197, "each") == "attention_direct"


def test_routes_and_the_output_are_one_launch_and_nothing_is_permuted(there: Recorder) -> None:
    record = make(Case(batch=1, routes=4, channels=20, states=1, grid=(7, 10), order="hilbert", frame="tokens"))
    y, matrix = ops.selective_scan(record, attention="mean", backend="fused")
    assert there.launched == ["attention_factored_64"]
    truth = ops.selective_scan(double(record), backend="reference")
    assert excess(y, truth, ops.selective_scan(magnitude(double(record)), backend="reference")) <= 1e-6
    no_worse_than_torch(there, record, "mean", {}, matrix)
    assert torch.equal(y, ops.selective_scan(record, backend="fused"))


def test_other_write_orders_and_sub_grids(there: Recorder) -> None:
    record = make(Case(batch=1, routes=2, channels=6, grid=(4, 5)))
    write = torch.stack([torch.randperm(33)[:20] for _ in range(2)])
    record = record.replace(write_order=write, tokens=33)
    for fold in ("sum", "absolute"):
        no_worse_than_torch(there, record, fold, {}, ops.hidden_attention(record, fold=fold, backend="fused"))
    untouched = sorted(set(range(33)) - set(write.flatten().tolist()))
    assert (ops.hidden_attention(record, backend="fused")[:, untouched] == 0).all()


def test_strides_do_not_matter_and_nothing_outside_a_view_is_read(there: Recorder) -> None:
    record = make(Case(channels=17, states=3, grid=(7, 10)))

    def inside_nan(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full([size + 2 for size in x.shape], torch.nan).movedim(1, -1).contiguous().movedim(-1, 1)
        inner = wide[tuple(slice(1, -1) for _ in x.shape)]
        inner.copy_(x)
        return inner

    again = record.map_tensors(inside_nan)
    assert not again.source_delta.is_contiguous()
    channels_last = record.map_tensors(lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2) if x.ndim > 3 else x)
    assert channels_last.source_delta.stride(2) == 1
    for kernel in KERNELS:
        expected = attention(there, record, kernel=kernel)
        for other in (again, channels_last):
            assert torch.equal(attention(there, other, kernel=kernel), expected)


def test_images_and_routes_do_not_leak(there: Recorder) -> None:
    record = make(Case(routes=4, channels=18, states=3, grid=(8, 9), frame="tokens"))
    whole = ops.hidden_attention(record, backend="fused")
    spoilt = record.replace(source_delta=record.source_delta.clone(), source_B=record.source_B.clone())
    spoilt.source_delta[1], spoilt.source_B[1] = 9.0, torch.nan
    again = ops.hidden_attention(spoilt, backend="fused")
    assert torch.equal(again[0], whole[0])
    assert again[1].isnan().any()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_do_not_depend_on_the_schedule(kernel: str, host: str) -> None:
    record = make(Case(batch=1, routes=2, channels=18, states=3, grid=(9, 16), frame="tokens"))
    results = []
    for schedule in (0, 1, 2, 3, 77):
        with machine(host, schedule=schedule) as there:
            results.append(kernels.attention(there, record, (None, None), "sum", True, with_y=True, kernel=kernel))
    assert all(torch.isfinite(x).all() for x in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_are_those_of_the_blocked_path(there: Recorder) -> None:
    results = []
    for backend in ("fused", "blocked"):
        record = make(Case(channels=6, grid=(5, 7), class_token=True)).map_tensors(lambda x: x.requires_grad_())
        columns = torch.ones(2, 6, 36, requires_grad=True)
        matrix = ops.hidden_attention(record, col_weight=columns, fold="positive", backend=backend)
        wanted = [record.source_delta, record.A, record.source_B, record.source_C, columns]
        torch.manual_seed(1)
        results.append(torch.autograd.grad(matrix, wanted, torch.randn_like(matrix)))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert blocked.BACKEND.unavailable(make(Case())) is None
