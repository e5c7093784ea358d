"""Rows in factors against the matrices of every channel, by the definition."""

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.row_blocks import row_blocks


def record(heads, groups, length, tokens, *, gain=False, shared=False):
    torch.manual_seed(length)
    batch, routes, channels, states = 2, 3, 4, 3
    return ScanRecord.from_scan(
        torch.randn(batch, routes, channels, length).double(),
        torch.rand(batch, routes, heads, length).double() * 3,
        -torch.rand(routes, heads, 1 if shared else states).double() - 0.1,
        torch.randn(batch, routes, groups, states, length).double(),
        torch.randn(batch, routes, groups, states, length).double(),
        torch.randn(routes, channels).double(),
        gain=torch.randn(batch, routes, heads, length).double() if gain else None,
        order=torch.stack([torch.arange(length), torch.arange(length).flip(0), torch.randperm(tokens)[:length]]),
        tokens=tokens,
        scale=0.5,
    )


@pytest.mark.parametrize("rows", [[4, 1, 2, 3, 0, 6], [6], [0], range(7), [5, 1]])
@pytest.mark.parametrize("options", [{}, {"gain": True}, {"shared": True}])
@pytest.mark.parametrize("sizes", [(4, 1, 13, 13), (2, 2, 7, 9)])
def test_blocks_sum_to_the_rows_of_every_channel(sizes, options, rows):
    its, rows = record(*sizes, **options), torch.tensor(list(rows))
    found = torch.zeros(2, 4, len(rows), its.tokens).double()
    for block in row_blocks(its, rows):
        found.index_add_(2, block.places, (block.queries @ block.keys).index_add(3, block.columns, block.square))
    truth = ops.hidden_attention(its, fold="each", backend="reference")[:, :, rows]
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12 * float(truth.abs().max()))


def test_orders_of_single_images_are_refused():
    its = record(4, 1, 5, 5)
    orders = its.read_order.expand(2, -1, -1)
    with pytest.raises(ValueError, match="row_blocks"):
        next(row_blocks(its.replace(read_order=orders, write_order=orders), torch.arange(5)))
