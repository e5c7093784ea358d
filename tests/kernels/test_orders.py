"""Every patch order in every type: the output and each fold, of one launch."""

import pytest
import torch

from mamba_attn import ops
from mamba_attn.orders import ORDERS
from tests.kernels.machines import MACHINES, machine
from tests.ops.bounds import excess, magnitude
from tests.ops.cases import Case, double, make

FOLDS = ("mean", "sum", "each", "positive", "absolute")


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
def test_every_order_type_and_fold(name: str, order: str, dtype: torch.dtype) -> None:
    with machine(name) as there:
        record = make(Case(batch=2, routes=4, channels=3, states=2, grid=(4, 6), order=order, frame="tokens"), dtype)
        exact = double(record)
        y_truth = ops.selective_scan(exact, backend="reference")
        y_bound = ops.selective_scan(magnitude(exact), backend="reference")
        for fold in FOLDS:
            y, matrix = ops.selective_scan(record, attention=fold, backend="fused")
            truth = ops.hidden_attention(exact, fold=fold, backend="reference")
            bound = ops.hidden_attention(magnitude(exact), fold=fold, backend="reference")
            assert excess(matrix, truth, bound) <= 5e-7 + 2 * there.unit
            assert excess(y, y_truth, y_bound) <= 5e-7 + 2 * there.unit
        assert len(there.launched) == len(FOLDS)
