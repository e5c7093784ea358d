"""What torch's modes and switches change for the fused backend; on the host."""

from collections.abc import Iterator

import pytest
import torch

from mamba_attn import ops
from mamba_attn.ops.cuda import kernels
from tests.emulation import emulated
from tests.ops.cases import CASES, double, make

HAS_NEW_SWITCH = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.fixture
def _precision() -> Iterator[None]:
    yield
    if HAS_NEW_SWITCH:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


def test_orders_may_be_made_in_inference_mode() -> None:
    with torch.inference_mode(), emulated():
        record = make(CASES[2])
        y = ops.selective_scan(record, backend="fused")
        assert torch.allclose(y.double(), ops.selective_scan(double(record), backend="reference"), atol=1e-5)


@pytest.mark.usefixtures("_precision")
def test_tf32_by_the_older_switch() -> None:
    for precision, allowed in (("highest", False), ("high", True), ("medium", True)):
        torch.set_float32_matmul_precision(precision)
        assert kernels._tf32() is allowed


@pytest.mark.usefixtures("_precision")
@pytest.mark.skipif(not HAS_NEW_SWITCH, reason="torch before 2.9")
def test_tf32_by_the_newer_switch() -> None:
    for precision, allowed in (("tf32", True), ("ieee", False)):
        torch.backends.cuda.matmul.fp32_precision = precision
        assert kernels._tf32() is allowed
