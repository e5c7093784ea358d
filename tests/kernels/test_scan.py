"""The scan kernel, its backward pass, rows, columns and products."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.cuda import fused, kernels
from tests.kernels.machines import HOSTS, MACHINES, Recorder, machine
from tests.ops.bounds import assert_within, excess, magnitude, weights
from tests.ops.cases import CASES, Case, double, make

FIELDS = ("source_u", "source_delta", "A", "source_B", "source_C", "D")
FOLDS = ("mean", "sum", "each", "positive", "absolute")
LONG = [
    Case(routes=1, channels=3, states=2, grid=(1, 129)),
    Case(batch=1, routes=2, channels=17, states=16, grid=(14, 14), class_token=True),
    Case(batch=1, routes=4, channels=9, states=1, grid=(15, 20), frame="tokens"),
    Case(batch=1, routes=1, channels=70, states=40, grid=(1, 40)),
]
cases = pytest.mark.parametrize("case", CASES + LONG, ids=lambda case: case.id)


@pytest.fixture(params=MACHINES)
def there(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with machine(request.param) as recorder:
        yield recorder


def leaves(record: ScanRecord) -> ScanRecord:
    return record.map_tensors(lambda x: x.detach().clone().requires_grad_())


def gradients(record: ScanRecord, y: torch.Tensor, head: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name in FIELDS if getattr(record, name) is not None]
    found = torch.autograd.grad(y, [getattr(record, name) for name in names], head.to(y.dtype))
    return dict(zip(names, found, strict=True))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_y_equals_the_reference(there: Recorder, case: Case, dtype: torch.dtype) -> None:
    record = make(case, dtype)
    value = ops.selective_scan(record, backend="fused")
    assert there.launched == ["selective_scan"]
    truth = ops.selective_scan(double(record), backend="reference")
    bound = ops.selective_scan(magnitude(double(record)), backend="reference")
    plain = excess(ops.selective_scan(record, backend="blocked"), truth, bound)
    assert value.dtype == torch.float32
    assert excess(value, truth, bound) <= max(2 * plain, 2.4e-7) + there.unit


@cases
def test_gradients_equal_autograd_in_float64(there: Recorder, case: Case) -> None:
    truth_record = leaves(make(case, torch.float64))
    truth_y = ops.selective_scan(truth_record, backend="reference")
    head = torch.randn_like(truth_y)
    record = leaves(make(case))
    found = gradients(record, ops.selective_scan(record, backend="fused"), head)
    assert there.launched == ["selective_scan", "selective_scan_backward"]
    for name, truth in gradients(truth_record, truth_y, head).items():
        scale = truth.abs().max().item()
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(
            found[name].double(), truth, rtol=0, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradients_of_one_route_in_scan_order(there: Recorder) -> None:
    tensors = [x.requires_grad_() for x in (torch.randn(2, 5, 30), torch.rand(2, 5, 30), -torch.rand(5, 3) - 0.1)]
    tensors += [torch.randn(2, 3, 30, requires_grad=True) for _ in range(2)]
    results = []
    for backend in ("fused", "blocked"):
        y = ops.selective_scan(*tensors, backend=backend)
        results.append(torch.autograd.grad((y * y).sum(), tensors))
    for value, plain in zip(*results, strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-4)


def test_a_step_shared_by_routes_gets_the_sum_of_their_gradients(there: Recorder) -> None:
    results = []
    for backend in ("fused", "blocked"):
        record = make(Case(channels=4, grid=(3, 4), frame="tokens"))
        record = leaves(record.replace(source_delta=record.source_delta[:, :1]))
        y = ops.selective_scan(record, backend=backend)
        results.append(gradients(record, (y * y).sum(), torch.ones(())))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_half_precision_gradients_have_their_inputs_types(there: Recorder) -> None:
    record = leaves(make(Case(), torch.bfloat16))
    y = ops.selective_scan(record, backend="fused")
    found = gradients(record, y, torch.ones_like(y))
    assert {x.dtype for x in found.values()} == {torch.bfloat16}


def test_the_matrix_beside_y_has_gradients_too(there: Recorder) -> None:
    results = []
    for backend in ("fused", "blocked"):
        record = leaves(make(Case(routes=2, channels=4, grid=(3, 4))))
        y, matrix = ops.selective_scan(record, attention="mean", backend=backend)
        total = (y * y).sum() + (matrix * matrix).sum()
        results.append(gradients(record, total, torch.ones(())))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["selective_scan", "selective_scan_backward", "attention_line"])
@pytest.mark.parametrize(
    "sizes", [(18, 3), (3, 1)], ids=str
)  # with one state or channel nothing else keeps lanes together
def test_results_do_not_depend_on_the_schedule(name: str, sizes: tuple[int, int], host: str) -> None:
    results = []
    for schedule in (0, 1, 2, 3, 77):
        with machine(host, schedule=schedule):
            record = leaves(make(Case(batch=1, routes=1, channels=sizes[0], states=sizes[1], grid=(1, 150))))
            y = ops.selective_scan(record, backend="fused")
            lines = [fused.BACKEND.attention_line(record, "column", 3, (None, None), f, True) for f in ("mean", "each")]
            backward = gradients(record, y, torch.ones_like(y)).values()
            results.append({"selective_scan": [y], "attention_line": lines}.get(name, list(backward)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@cases
@pytest.mark.parametrize("fold", [fold for fold in FOLDS if fold != "sum"])
def test_rows_and_columns_are_the_matrix_own(there: Recorder, case: Case, fold: str) -> None:
    record = make(case)
    w = weights(record)
    exact, absolute = ({key: f(weight.double()) for key, weight in w.items()} for f in (torch.clone, torch.abs))
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
    bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)
    for token in {0, record.tokens // 3, record.tokens - 1}:
        row = ops.attention_row(record, row=token, fold=fold, **w)
        column = ops.attention_column(record, column=token, fold=fold, **w)
        assert_within(row, truth[..., token, :], bound[..., token, :], 1e-5)
        assert_within(column, truth[..., :, token], bound[..., :, token], 1e-5)
    assert set(there.launched) == {"attention_line"}


def test_lines_keep_their_digits_over_thousands_of_steps(there: Recorder) -> None:
    record = make(Case(batch=1, routes=1, channels=1, states=1, grid=(1, 1500), delta_scale=0.2))
    for line in (partial(ops.attention_row, row=1499), partial(ops.attention_column, column=0)):
        assert excess(line(record), line(double(record)), line(magnitude(double(record)))) <= 1e-6
    assert there.launched == ["attention_line"] * 2


@pytest.mark.parametrize("axis", ["row", "column"])
def test_lines_take_weights_of_tokens(there: Recorder, axis: str) -> None:
    record = make(Case(channels=4, grid=(3, 5), order="spiral", frame="tokens"))
    record = record.replace(write_order=torch.stack([torch.randperm(15) for _ in range(2)]))
    tokens = (torch.rand(2, 4, 15), torch.rand(2, 4, 15))
    matrix = kernels.attention(there, record, tokens, "each", True)[1]
    line = fused.BACKEND.attention_line(record, axis, 4, tokens, "each", True)
    torch.testing.assert_close(line, matrix[..., 4, :] if axis == "row" else matrix[..., 4], rtol=1e-5, atol=1e-6)


def test_lines_are_differentiable_in_their_weights(there: Recorder) -> None:
    record, columns = make(Case()), torch.ones(2, 5, 15, requires_grad=True)
    row = ops.attention_row(record, row=7, col_weight=columns, fold="each")
    torch.testing.assert_close(torch.autograd.grad(row.sum(), columns)[0], row.detach(), rtol=1e-5, atol=1e-6)


def test_rows_of_raw_tensors_keep_their_routes(there: Recorder) -> None:
    record = make(Case(routes=2, channels=70, states=2, grid=(1, 140)))
    matrix = ops.hidden_attention(record.delta, record.A, record.B, record.C, fold="sum", backend="reference")
    row = ops.attention_row(record.delta, record.A, record.B, record.C, row=130, fold="sum")
    column = ops.attention_column(record.delta, record.A, record.B, record.C, column=5, fold="sum")
    assert there.launched == ["attention_line"] * 2
    torch.testing.assert_close(row, matrix[:, :, 130], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(column, matrix[:, :, :, 5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fold", ["mean", "sum"])
def test_products_are_scans(there: Recorder, fold: str) -> None:
    record = make(Case(channels=20, states=5, grid=(7, 7), order="hilbert", class_token=True))
    w, vector = weights(record), torch.randn(2, 50)
    matrix = ops.hidden_attention(record, fold=fold, backend="reference", **w)
    left = ops.left_product(record, vector=vector, fold=fold, **w)
    right = ops.right_product(record, vector=vector, fold=fold, **w)
    assert set(there.launched) == {"selective_scan", "selective_scan_backward"}
    torch.testing.assert_close(left, torch.einsum("bi,bij->bj", vector, matrix), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, torch.einsum("bij,bj->bi", matrix, vector), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():  # where no backward pass can stand for the transposed scan
        again = ops.left_product(record, vector=vector, fold=fold, **w)
    torch.testing.assert_close(again, left, rtol=1e-4, atol=1e-4)
