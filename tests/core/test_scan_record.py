"""ScanRecord: shapes, and that lazy gathering equals explicit indexing."""

import dataclasses

import pytest
import torch

from mamba_attn import orders
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord

BATCH, ROUTES, CHANNELS, HEADS, GROUPS, STATES, HEIGHT, WIDTH = 2, 4, 6, 3, 2, 5, 3, 4
TOKENS = HEIGHT * WIDTH


def record_in_tokens(routes=1, heads=HEADS, groups=GROUPS, order=None, dtype=torch.float64):
    """A record that keeps the token frame; routes=1 shares every source among the routes."""
    order = orders.cross("raster", HEIGHT, WIDTH) if order is None else order
    return ScanRecord.from_tokens(
        torch.randn(BATCH, routes, CHANNELS, TOKENS, dtype=dtype),
        torch.rand(BATCH, routes, heads, TOKENS, dtype=dtype),
        -torch.rand(len(order), heads, STATES, dtype=dtype) - 0.1,
        torch.randn(BATCH, routes, groups, STATES, TOKENS, dtype=dtype),
        torch.randn(BATCH, routes, groups, STATES, TOKENS, dtype=dtype),
        torch.randn(len(order), CHANNELS, dtype=dtype),
        order=order,
        gate=torch.randn(BATCH, CHANNELS, TOKENS, dtype=dtype),
        bypass=torch.randn(BATCH, 2, TOKENS, dtype=dtype),
        scale=0.5,
        layout=TokenLayout(grid=(HEIGHT, WIDTH)),
    )


def record_in_scan_order(length=7, **options):
    return ScanRecord.from_scan(
        torch.randn(BATCH, ROUTES, CHANNELS, length),
        torch.rand(BATCH, ROUTES, HEADS, length),
        -torch.rand(ROUTES, HEADS, STATES) - 0.1,
        torch.randn(BATCH, ROUTES, GROUPS, STATES, length),
        torch.randn(BATCH, ROUTES, GROUPS, STATES, length),
        **options,
    )


def tensors_of(record):
    names = [field.name for field in dataclasses.fields(record)]
    return {name: getattr(record, name) for name in names if isinstance(getattr(record, name), torch.Tensor)}


def test_sizes_of_a_record_in_scan_order():
    record = record_in_scan_order()
    sizes = (record.batch, record.routes, record.channels, record.heads, record.states, record.length, record.tokens)
    assert sizes == (BATCH, ROUTES, CHANNELS, HEADS, STATES, 7, 7)
    assert record.u is not None
    assert record.u.shape == (BATCH, ROUTES, CHANNELS, 7)
    assert record.delta.shape == (BATCH, ROUTES, HEADS, 7)
    assert record.B.shape == record.C.shape == (BATCH, ROUTES, GROUPS, STATES, 7)
    assert (record.D, record.gate, record.bypass, record.layout, record.scale) == (None, None, None, None, 1.0)
    assert torch.equal(record.read_order, torch.arange(7).expand(ROUTES, 7))
    assert torch.equal(record.write_order, record.read_order)


def test_scan_order_is_given_back_without_a_copy():
    record = record_in_scan_order()
    for name in ("u", "delta", "B", "C"):
        view, source = getattr(record, name), getattr(record, f"source_{name}")
        assert torch.equal(view, source)
        assert view.data_ptr() == source.data_ptr()


def test_shared_routes_are_expanded_without_a_copy():
    record = record_in_scan_order()
    shared = record.replace(source_u=record.source_u[:, :1])
    assert shared.u.shape == (BATCH, ROUTES, CHANNELS, 7)
    assert shared.u.data_ptr() == record.source_u.data_ptr()
    assert all(torch.equal(shared.u[:, route], record.source_u[:, 0]) for route in range(ROUTES))


def test_orders_longer_than_the_route_need_tokens():
    order = torch.stack([torch.arange(0, 14, 2)] * ROUTES)
    record = record_in_scan_order(order=order, tokens=14)
    assert (record.length, record.tokens) == (7, 14)
    assert record.read_order is order


@pytest.mark.parametrize("routes", [1, ROUTES], ids=["shared", "own"])
@pytest.mark.parametrize("name", sorted(orders.ORDERS))
def test_gathering_equals_explicit_indexing(name, routes):
    record = record_in_tokens(routes, order=orders.cross(name, HEIGHT, WIDTH))
    assert (record.length, record.tokens, record.routes) == (TOKENS, TOKENS, ROUTES)
    for name in ("u", "delta", "B", "C"):
        gathered, source = getattr(record, name), getattr(record, f"source_{name}")
        expected = torch.stack(
            [source[:, route if routes > 1 else 0][..., record.read_order[route]] for route in range(ROUTES)], dim=1
        )
        assert torch.equal(gathered, expected), name


def test_channels_around_the_scan_may_be_any_number_of_the_frames_tokens():
    beside = torch.randn(BATCH, 3, 14)
    record = record_in_scan_order(order=torch.stack([torch.arange(0, 14, 2)] * ROUTES), tokens=14, bypass=beside)
    assert record.bypass is beside
    assert record.channels == CHANNELS


def test_sub_grid_routes_gather_fewer_steps_than_tokens():
    even, odd = slice(0, None, 2), slice(1, None, 2)
    order = torch.stack([orders.sub_grid(4, 3, rows, slice(None)) for rows in (even, odd)])
    record = record_in_tokens(order=order)
    assert (record.length, record.tokens) == (6, 12)
    assert torch.equal(record.delta[:, 1], record.source_delta[:, 0][..., order[1]])


WRONG = {
    "repeated": ([0, 3, 3, 5, 6, 8, 9], "visits token 3 more than once on one route"),
    "out of range": ([0, 1, 2, 3, 4, 5, 12], r"visits 0\.\.12, but there are 12 tokens"),
    "negative": ([0, 1, 2, -3, 4, 5, 6], r"visits -3\.\.6; tokens count from 0 to 11"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_order_that_does_not_visit_distinct_tokens_is_refused(name):
    steps, text = WRONG[name]
    right = torch.stack([torch.arange(7)] * ROUTES)
    wrong = right.clone()
    wrong[2] = torch.tensor(steps)
    record = record_in_scan_order(order=right, tokens=12)
    for field in ("read_order", "write_order"):
        with pytest.raises(ValueError, match=f"^ScanRecord: {field} {text}"):
            record.replace(**{field: wrong})
    with pytest.raises(ValueError, match=f"^ScanRecord.from_scan: order {text}"):
        record_in_scan_order(order=wrong, tokens=12)
    with pytest.raises(ValueError, match=f"^ScanRecord.from_tokens: order {text}"):
        record_in_tokens(order=wrong)
    with torch.inference_mode(), pytest.raises(ValueError, match=text):
        record.replace(write_order=wrong.clone())


def test_the_default_order_needs_as_many_tokens_as_steps():
    assert record_in_scan_order(tokens=9).write_order.max() == 6
    with pytest.raises(ValueError, match=r"from_scan: order visits 0\.\.6, but there are 5 tokens"):
        record_in_scan_order(tokens=5)


def test_an_order_is_looked_at_once_and_again_when_it_changed(monkeypatch):
    order = torch.stack([torch.arange(7)] * ROUTES)
    looks = []
    usual = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, dim: looks.append(1) or usual(self, dim=dim))
    record = record_in_scan_order(order=order)
    record.replace(scale=2.0).map_tensors(torch.Tensor.detach).select_routes(slice(1, 3)).select_routes(slice(0, 1))
    record_in_scan_order(order=order)
    record_in_scan_order()
    with torch.inference_mode():
        record_in_scan_order()
    assert looks == [1]
    order[0, 0] = 5
    with pytest.raises(ValueError, match="order visits token 5 more than once"):
        record_in_scan_order(order=order)
    with pytest.raises(ValueError, match="order visits token 5 more than once"):
        record.select_routes(slice(0, 2))


def test_gradients_reach_the_token_frame():
    record = record_in_tokens()
    source = record.source_u.requires_grad_()
    weight = torch.randn(BATCH, ROUTES, CHANNELS, TOKENS, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((record.u * weight).sum(), source)
    expected = torch.zeros_like(source)
    for route in range(ROUTES):
        expected[:, 0, :, record.read_order[route]] += weight[:, route]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("routes", [1, ROUTES], ids=["shared", "own"])
@pytest.mark.parametrize("chosen", [slice(0, 1), slice(1, 3), slice(None, None, 2)])
def test_select_routes_equals_slicing_and_copies_nothing(chosen, routes):
    record = record_in_tokens(routes)
    part = record.select_routes(chosen)
    assert part.routes == len(range(ROUTES)[chosen])
    for name in ("u", "delta", "B", "C"):
        assert torch.equal(getattr(part, name), getattr(record, name)[:, chosen])
    for name in ("A", "D", "read_order", "write_order"):
        assert torch.equal(getattr(part, name), getattr(record, name)[chosen])
    assert (part.gate is record.gate, part.bypass is record.bypass) == (True, True)
    assert (part.scale, part.tokens) == (0.5, TOKENS)
    for name, tensor in tensors_of(part).items():
        assert tensor.untyped_storage().data_ptr() == getattr(record, name).untyped_storage().data_ptr(), name


def test_map_tensors_reaches_every_floating_point_tensor_and_no_order():
    record = record_in_tokens()
    mapped = record.map_tensors(lambda tensor: tensor.float() * 2)
    for name, tensor in tensors_of(record).items():
        if tensor.is_floating_point():
            assert getattr(mapped, name).dtype == torch.float32, name
            assert torch.equal(getattr(mapped, name), tensor.float() * 2), name
        else:
            assert getattr(mapped, name) is tensor, name
    assert (mapped.scale, mapped.layout, mapped.source_frame) == (0.5, record.layout, "tokens")
    assert record_in_scan_order().map_tensors(torch.Tensor.detach).D is None


def test_replace_changes_one_field():
    record = record_in_tokens()
    before = record.u
    changed = record.replace(source_u=record.source_u + 1)
    assert torch.equal(changed.u, before + 1)
    assert torch.equal(record.u, before)
    assert changed.source_delta is record.source_delta
    with pytest.raises(TypeError, match="sorce_u"):
        record.replace(sorce_u=record.source_u)


def test_a_record_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record_in_tokens().scale = 1.0
