"""Patch orders: the reference tables, what each curve promises, and the laws of routes on any grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_attn import orders

SIDE = st.integers(1, 12)
NAME = st.sampled_from(sorted(orders.ORDERS))

# raster indices on 4 x 4
TABLE = {
    "raster": "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "column": "0 4 8 12 1 5 9 13 2 6 10 14 3 7 11 15",
    "diagonal": "0 1 4 2 5 8 3 6 9 12 7 10 13 11 14 15",
    "zigzag": "0 4 1 2 5 8 12 9 6 3 7 10 13 14 11 15",
    "morton": "0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15",
    "spiral": "0 1 2 3 7 11 15 14 13 12 8 4 5 6 10 9",
    "hilbert": "0 1 5 4 8 12 13 9 10 14 15 11 7 6 2 3",
}

# on 14 x 14: mean |rank difference| of 4-neighbours, longest hop between consecutive cells
STATISTICS = {
    "raster": (7.5, 14),
    "diagonal": (9.5, 25),
    "zigzag": (9.5, 2),
    "morton": (7.698, 14),
    "spiral": (16.643, 1),
}


def hops(order, width):
    """Grid distance between consecutive cells."""
    row, column = order // width, order % width
    return row.diff().abs() + column.diff().abs()


def neighbour_distance(order, height, width):
    """Mean |rank difference| over horizontal and vertical neighbours."""
    rank = orders.inverse(order).view(height, width)
    return torch.cat([rank.diff(dim=0).flatten(), rank.diff(dim=1).flatten()]).abs().double().mean().item()


@pytest.mark.parametrize("name", TABLE)
def test_table_on_4x4(name):
    assert orders.order(name, 4, 4).tolist() == [int(cell) for cell in TABLE[name].split()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raster", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("column", [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
        ("diagonal", [0, 1, 4, 2, 5, 8, 3, 6, 9, 7, 10, 11]),
        ("zigzag", [0, 4, 1, 2, 5, 8, 9, 6, 3, 7, 10, 11]),
        ("morton", [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]),
        ("spiral", [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
        ("hilbert", [0, 1, 5, 4, 8, 9, 10, 11, 7, 6, 2, 3]),
    ],
)
def test_table_on_3x4(name, expected):
    assert orders.order(name, 3, 4).tolist() == expected


@pytest.mark.parametrize("name", STATISTICS)
def test_neighbour_statistics_on_14x14(name):
    order = orders.order(name, 14, 14)
    mean, longest = STATISTICS[name]
    assert neighbour_distance(order, 14, 14) == pytest.approx(mean, abs=5e-4)
    assert hops(order, 14).max() == longest


@given(NAME, SIDE, SIDE)
def test_every_order_is_a_permutation_and_has_an_inverse(name, height, width):
    order = orders.order(name, height, width)
    cells = torch.arange(height * width)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, cells)
    assert torch.equal(order[orders.inverse(order)], cells)
    assert torch.equal(orders.inverse(order)[order], cells)


@given(SIDE, SIDE)
def test_spiral_walks_to_neighbours_on_any_grid(height, width):
    order = orders.spiral(height, width)
    assert order[0] == 0
    assert hops(order, width).eq(1).all()


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_walks_to_neighbours_on_powers_of_two(side):
    order = orders.hilbert(side, side)
    assert order[0] == 0
    assert order[-1] == side - 1  # ends in the other upper corner
    assert hops(order, side).eq(1).all()


@given(st.sampled_from(["hilbert", "morton"]), SIDE, SIDE)
def test_cells_outside_are_skipped_and_the_rest_keep_their_sequence(name, height, width):
    side = 1 << (max(height, width) - 1).bit_length()  # the Hilbert curve depends on the enclosing power of two
    whole = orders.order(name, side, side)
    row, column = whole // side, whole % side
    inside = (row < height) & (column < width)
    expected = (row * width + column)[inside]
    assert torch.equal(orders.order(name, height, width), expected)


@given(SIDE, SIDE)
def test_diagonals(height, width):
    for name in ("diagonal", "zigzag"):
        order = orders.order(name, height, width)
        assert (order // width + order % width).diff().ge(0).all()
    assert hops(orders.zigzag(height, width), width).le(2).all()


def test_random_is_fixed_by_its_seed():
    assert torch.equal(orders.random(5, 7), orders.random(5, 7))
    assert not torch.equal(orders.random(5, 7), orders.random(5, 7, seed=1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    orders.random(5, 7)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (5, 2), (1, 7)])
def test_cross_scan_routes(height, width):
    rows = [h * width + w for h in range(height) for w in range(width)]
    columns = [h * width + w for w in range(width) for h in range(height)]
    assert orders.cross("raster", height, width).tolist() == [rows, columns, rows[::-1], columns[::-1]]


@given(NAME, SIDE, SIDE, st.sampled_from(["transpose", "mirror"]))
def test_cross_routes_are_permutations_and_reversals(name, height, width, second):
    routes = orders.cross(name, height, width, second)
    assert routes.shape == (4, height * width)
    assert torch.equal(routes.sort(dim=1).values, torch.arange(height * width).expand(4, -1))
    assert torch.equal(routes[2:], routes[:2].flip(1))


@given(SIDE, SIDE)
def test_the_second_route_walks_the_other_view_of_the_grid(height, width):
    transposed = orders.cross("spiral", height, width)[1]
    row, column = transposed // width, transposed % width
    assert torch.equal(column * height + row, orders.spiral(width, height))
    mirrored = orders.cross("diagonal", height, width, "mirror")[1]
    row, column = mirrored // width, mirrored % width
    assert torch.equal(row * width + (width - 1 - column), orders.diagonal(height, width))


@given(NAME, SIDE, SIDE, st.sampled_from(["transpose", "mirror"]))
def test_coverage_of_a_cross_scan(name, height, width, second):
    """Any pair of different cells is causal in exactly 2 of 4 routes, the diagonal in all 4."""
    cells = height * width
    causal = torch.ones(cells, cells).tril()
    covered = torch.zeros(cells, cells)
    for route in orders.cross(name, height, width, second):
        covered[route[:, None], route[None, :]] += causal
    assert torch.equal(covered, torch.full((cells, cells), 2.0) + 2 * torch.eye(cells))


@given(NAME, SIDE, SIDE)
def test_both_ways(name, height, width):
    order = orders.order(name, height, width)
    routes = orders.both_ways(order)
    assert routes.shape == (2, height * width)
    assert torch.equal(routes[0], order)
    assert torch.equal(routes[1].flip(0), order)


def test_sub_grids_of_efficient_vmamba_on_4x6():
    even, odd = slice(0, None, 2), slice(1, None, 2)
    routes = [
        orders.sub_grid(4, 6, even, even),
        orders.sub_grid(4, 6, odd, even, transpose=True),
        orders.sub_grid(4, 6, even, odd),
        orders.sub_grid(4, 6, odd, odd, transpose=True),
    ]
    assert [route.tolist() for route in routes] == [
        [0, 2, 4, 12, 14, 16],
        [6, 18, 8, 20, 10, 22],
        [1, 3, 5, 13, 15, 17],
        [7, 19, 9, 21, 11, 23],
    ]


@given(SIDE, SIDE, st.integers(1, 3))
def test_sub_grids_cover_every_cell_once(height, width, stride):
    starts = [slice(start, None, stride) for start in range(stride)]
    routes = [orders.sub_grid(height, width, rows, columns) for rows in starts for columns in starts]
    assert torch.equal(torch.cat(routes).sort().values, torch.arange(height * width))
    for rows in starts:
        for columns in starts:
            plain = orders.sub_grid(height, width, rows, columns)
            transposed = orders.sub_grid(height, width, rows, columns, transpose=True)
            assert torch.equal(plain, transposed.sort().values)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([], [2, 0, 3, 1]),
        ([0], [0, 3, 1, 4, 2]),
        ([2], [3, 0, 2, 4, 1]),
        ([4], [2, 0, 3, 1, 4]),
        ([1, 4], [3, 1, 0, 5, 4, 2]),
        ([4, 1], [3, 1, 0, 5, 4, 2]),
    ],
)
def test_insert_tokens_into_2031(positions, expected):
    assert orders.insert_tokens(torch.tensor([2, 0, 3, 1]), positions).tolist() == expected


@given(NAME, SIDE, SIDE, st.data())
def test_inserted_tokens_stay_and_patches_keep_their_sequence(name, height, width, data):
    order = orders.order(name, height, width)
    extra = data.draw(st.integers(0, 3))
    everywhere = st.integers(0, height * width + extra - 1)
    positions = data.draw(st.lists(everywhere, unique=True, min_size=extra, max_size=extra))
    tokens = orders.insert_tokens(order, positions)
    assert torch.equal(tokens.sort().values, torch.arange(len(tokens)))
    assert tokens[positions].tolist() == positions
    patches = [token for token in tokens.tolist() if token not in positions]
    raster = sorted(patches)
    assert [raster.index(token) for token in patches] == order.tolist()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: orders.order("hilbertt", 4, 4), r"order\('hilbertt'\): no such order. Did you mean 'hilbert'\?"),
        (lambda: orders.order("x", 4, 4), r"no such order. Known: 'raster', 'column', .*'random'\."),
        (lambda: orders.order("raster", 0, 4), r"order\('raster', 0, 4\): a grid has at least one row and one column"),
        (lambda: orders.order("raster", 4, -1), r"at least one row and one column"),
        (lambda: orders.cross("snake", 4, 4), r"order\('snake'\): no such order"),
        (lambda: orders.cross("raster", 4, 4, "flip"), r"cross\(second='flip'\): expected 'transpose' or 'mirror'"),
        (lambda: orders.insert_tokens(torch.arange(4), [5]), r"positions \(5,\) must be distinct and in 0\.\.4"),
        (lambda: orders.insert_tokens(torch.arange(4), [-1]), r"positions \(-1,\) must be distinct and in 0\.\.4"),
        (lambda: orders.insert_tokens(torch.arange(4), [1, 1]), r"positions \(1, 1\) must be distinct and in 0\.\.5"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
