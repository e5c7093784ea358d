"""Backward passes against float64 finite differences and against each other."""

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from tests.ops.cases import Case, make

FIELDS = ("source_u", "source_delta", "A", "source_B", "source_C", "D")
GRADIENT_CASES = [
    Case(),
    Case(routes=4, channels=16, states=1, grid=(5, 9), frame="tokens"),
    Case(routes=2, channels=18, states=8, grid=(4, 9), class_token=True),
    Case(routes=1, channels=12, heads=3, groups=2, states=4, grid=(5, 6), shared_states=True),
    Case(routes=1, channels=16, states=16, grid=(17, 31)),  # several segments of kept states
]


def leaves(record: ScanRecord) -> ScanRecord:
    return record.map_tensors(lambda x: x.detach().clone().requires_grad_())


def gradients(record: ScanRecord, result: torch.Tensor, head: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(result, [getattr(record, name) for name in FIELDS], head.to(result.dtype)))


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.id)
def test_native_scan_gradients_equal_autograd_in_float64(case: Case) -> None:
    truth_record = leaves(make(case, torch.float64))
    truth_y = ops.selective_scan(truth_record, backend="reference")
    head = torch.randn_like(truth_y)
    record = leaves(make(case))
    y = ops.selective_scan(record, backend="native")
    for name, value, truth in zip(
        FIELDS, gradients(record, y, head), gradients(truth_record, truth_y, head), strict=True
    ):
        scale = truth.abs().max().item()
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_blocked_scan_gradcheck() -> None:
    record = leaves(make(Case(batch=1, channels=2, states=2, grid=(2, 3)), torch.float64))
    tensors = [getattr(record, name) for name in FIELDS]

    def scan(*values: torch.Tensor) -> torch.Tensor:
        return ops.selective_scan(record.replace(**dict(zip(FIELDS, values, strict=True))), backend="blocked")

    assert torch.autograd.gradcheck(scan, tensors)


@pytest.mark.parametrize("fold", ["mean", "sum", "each"])
def test_blocked_attention_gradcheck(fold: str) -> None:
    record = leaves(make(Case(batch=1, channels=2, states=2, grid=(2, 3)), torch.float64))
    names = ("source_delta", "A", "source_B", "source_C")
    rows = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)

    def attention(row_weight: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        own = record.replace(**dict(zip(names, values, strict=True)))
        return ops.hidden_attention(own, row_weight=row_weight, fold=fold, backend="blocked")

    assert torch.autograd.gradcheck(attention, [rows, *(getattr(record, name) for name in names)])


@pytest.mark.parametrize("fold", ["mean", "positive", "each"])
def test_native_attention_gradients_equal_blocked(fold: str) -> None:
    case = Case(routes=2, channels=6, states=3, grid=(4, 5))
    results = []
    for backend in ("native", "blocked"):
        record = leaves(make(case))
        columns = torch.ones(2, 6, 20, requires_grad=True)
        attention = ops.hidden_attention(record, col_weight=columns, fold=fold, backend=backend)
        wanted = [record.source_delta, record.A, record.source_B, record.source_C, columns]
        torch.manual_seed(1)
        results.append(torch.autograd.grad(attention, wanted, torch.randn_like(attention)))
    for native, blocked in zip(*results, strict=True):
        torch.testing.assert_close(native, blocked, rtol=1e-4, atol=1e-5)


def test_products_and_rows_are_differentiable() -> None:
    record = leaves(make(Case(routes=2, channels=4, grid=(3, 4)), torch.float64))
    vector = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    matrix = ops.hidden_attention(record, backend="blocked")
    wanted = [record.source_delta, record.source_B, vector]
    truth = torch.autograd.grad((torch.einsum("bi,bij->bj", vector, matrix) ** 2).sum(), wanted)
    value = torch.autograd.grad((ops.left_product(record, vector=vector) ** 2).sum(), wanted)
    for a, b in zip(value, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
def test_the_matrix_asks_for_no_gradient_because_of_u_or_d(backend: str) -> None:
    record = make(Case(batch=2, routes=2, channels=3, states=2, grid=(2, 3)))
    assert record.D is not None
    trained = record.replace(source_u=record.source_u.requires_grad_(), D=record.D.requires_grad_())
    assert not ops.hidden_attention(trained, backend=backend).requires_grad
