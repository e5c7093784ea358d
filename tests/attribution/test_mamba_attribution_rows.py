"""The sum of all rows from the scans' own gradients, against left products."""

import pytest
import torch

from mamba_attn.attribution import MambaAttribution, mamba_attribution
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError
from mamba_attn.ops import left_product, selective_scan
from mamba_attn.tracing.layers import ScanLayer
from tests.attribution.cases import images, vmamba


def records():
    """Records of every frame: sources shared or not, in the token frame or not, on part of the tokens, D or none."""
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    routes, channels, states, tokens = 2, 3, 2, 6
    A = -tensor(routes, channels, states).exp()
    whole = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    part = torch.tensor([[0, 3, 5, 1], [2, 4, 1, 0]])
    written = torch.tensor([[1, 0, 2, 3], [5, 4, 3, 2]])
    for D in (None, tensor(routes, channels)):
        for shared in (1, routes):
            u, delta = tensor(2, shared, channels, tokens), tensor(2, routes, channels, tokens).exp()
            B, C = tensor(2, routes, 1, states, tokens), tensor(2, routes, 1, states, tokens)
            yield ScanRecord.from_tokens(u, delta, A, B, C, D, order=whole, scale=0.5)
            yield ScanRecord.from_tokens(u, delta, A, B, C, D, order=part)
            cut = [x.expand(-1, routes, -1, -1)[..., :4] for x in (u, delta)]
            record = ScanRecord.from_scan(*cut, A, B[..., :4], C[..., :4], D, order=part, tokens=tokens, scale=0.5)
            yield record
            yield record.replace(write_order=written)
            yield ScanRecord.from_tokens(u, delta, A, B, C, D, order=part).replace(write_order=written)


@pytest.mark.parametrize("record", list(records()))
def test_summed_rows_are_a_left_product(record):
    rules = mamba_attribution.OwnInputs()
    with torch.enable_grad():
        record = rules.scan(record)
        y = selective_scan(record)
        layer = ScanLayer("x", record.replace(layout=TokenLayout((2, 3))), y=y)
        weights = torch.randn(y.shape, dtype=y.dtype)
        _, (own,) = mamba_attribution.own_gradients([layer], (y * weights).sum())
    ones = torch.ones(2, 6, dtype=y.dtype)
    detached = record.map_tensors(torch.Tensor.detach)
    expected = left_product(detached, vector=ones, fold="sum", row_weight=weights, col_weight=detached.u)
    torch.testing.assert_close(mamba_attribution.summed_rows(layer, weights, own), expected, rtol=1e-10, atol=1e-12)


def test_a_target_that_depends_on_nothing():
    with pytest.raises(TraceError, match="the value to explain does not depend on this forward pass"):
        MambaAttribution(vmamba(), rollout=False).attribute(images(1), lambda y: y.detach()[:, 0])
