"""Scans of heads by chunks of products: values and gradients are those of the recurrence, at any length."""

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import chunk_scan, reference
from mamba_attn.ops.cpu import native


def make(
    batch: int, routes: int, heads: int, width: int, groups: int, states: int, length: int, gain: bool
) -> ScanRecord:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return ScanRecord.from_scan(
        normal(batch, routes, heads * width, length),
        normal(batch, routes, heads, length).abs(),
        -normal(routes, heads, 1).abs(),
        normal(batch, routes, groups, states, length),
        normal(batch, routes, groups, states, length),
        normal(routes, heads * width),
        gain=normal(batch, routes, heads, length) if gain else None,
        scale=0.5,
    )


SIZES = [(2, 3, 4, 4, 2, 5, 131), (1, 1, 2, 6, 4, 3, 64), (2, 1, 3, 2, 1, 7, 65), (1, 2, 2, 2, 2, 1, 1)]
sizes = pytest.mark.parametrize("size", SIZES)


@sizes
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_are_the_references(size: tuple[int, ...], gain: bool, dtype: torch.dtype, allowed: float) -> None:
    exact = make(*size, gain).map_tensors(lambda x: x.float().double())
    record = exact.map_tensors(lambda x: x.to(dtype))
    for merged in (False, True):
        y = reference.selective_scan(exact)
        truth = reference.merge_tokens(exact, y) if merged else y
        found = chunk_scan.selective_scan(record, merged)
        assert found.dtype == dtype
        assert float((found - truth).abs().max()) <= allowed * float(truth.abs().max())


@sizes
def test_gradients_are_those_of_the_recurrence(size: tuple[int, ...]) -> None:
    record = make(*size, True)
    names = ("source_u", "source_delta", "A", "source_B", "source_C", "D", "source_gain")
    leaves = [getattr(record, name).clone().requires_grad_() for name in names]
    weight = torch.randn(record.u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    again = record.replace(**dict(zip(names, leaves, strict=True)))
    pairs = (
        torch.autograd.grad((run(again) * weight).sum(), leaves)
        for run in (lambda x: chunk_scan.selective_scan(x, False), reference.selective_scan)
    )
    for found, truth in zip(*pairs, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_decays_to_nothing_stay_finite() -> None:
    record = make(1, 1, 2, 3, 1, 4, 150, False)
    record = record.replace(source_delta=50 * record.source_delta).map_tensors(torch.Tensor.float)
    delta = record.source_delta.clone().requires_grad_()
    y = chunk_scan.selective_scan(record.replace(source_delta=delta), True)
    (gradient,) = torch.autograd.grad(y.sum(), delta)
    assert bool(y.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_the_kernel_leaves_wide_heads_to_products(monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(1, 1, 2, 8, 1, 4, 9, False).map_tensors(torch.Tensor.float)
    loop = ops.selective_scan(record, backend="native")
    monkeypatch.setattr(native, "_PRODUCTS", 32)
    monkeypatch.setattr(native.Native, "_scan_group", None)
    torch.testing.assert_close(ops.selective_scan(record, backend="native"), loop, rtol=1e-5, atol=1e-6)
