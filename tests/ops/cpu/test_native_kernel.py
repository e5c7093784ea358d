"""What the laws do not reach: threads, blocks, segments, shared sources, sub-grids, other write orders."""

from collections.abc import Iterator

import pytest
import torch

from mamba_attn import ops, orders
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import MatrixTooLargeError
from mamba_attn.ops import blocked, dispatch, linear
from tests.ops.cases import Case, double, make
from tests.ops.test_gradients import gradients, leaves


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def everything(record: ScanRecord) -> list[torch.Tensor]:
    own = leaves(record)
    y = ops.selective_scan(own, backend="native")
    folds = [ops.hidden_attention(record, fold=fold, backend="native") for fold in ("mean", "positive", "each")]
    return [y.detach(), *folds, *gradients(own, y, torch.ones_like(y))]


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing(batch: int, two_threads: None) -> None:
    record = make(Case(batch=batch, channels=40, states=16, grid=(7, 19)))
    torch.set_num_threads(1)
    alone = everything(record)
    torch.set_num_threads(2)
    for _ in range(2):
        for value, expected in zip(everything(record), alone, strict=True):
            assert torch.equal(value, expected)


def test_denormal_numbers_survive_outside_the_kernel(two_threads: None) -> None:
    everything(make(Case(channels=40, grid=(7, 19))))
    assert (torch.full((1000,), 1e-40) * 0.5 > 0).all()


def test_segments_restart_in_every_route_and_block_of_channels() -> None:
    case = Case(batch=1, routes=2, channels=32, states=16, grid=(15, 20))
    record, truth_record = leaves(make(case)), leaves(make(case, torch.float64))
    truth_y = ops.selective_scan(truth_record, backend="reference")
    head = torch.randn_like(truth_y)
    y = ops.selective_scan(record, backend="native")
    for value, truth in zip(gradients(record, y, head), gradients(truth_record, truth_y, head), strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=2e-6 * truth.abs().max().item())


def unusual(frame: str, dtype: torch.dtype) -> ScanRecord:
    """Sub-grids, one walked twice and one by nobody; the routes share sources, or write elsewhere than they read."""
    torch.manual_seed(3)
    cells = [(0, 0, False), (0, 1, True), (1, 0, False), (0, 0, True)]
    order = torch.stack([orders.sub_grid(4, 6, slice(i, None, 2), slice(j, None, 2), turned) for i, j, turned in cells])
    sources = 1 if frame == "tokens" else 4
    steps = 6 if frame == "scan" else 24

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    return ScanRecord(
        source_u=normal(2, sources, 5, steps), source_delta=normal(2, sources, 5, steps).abs(),
        A=-normal(4, 5, 3).abs() - 0.1, source_B=normal(2, sources, 1, 3, steps),
        source_C=normal(2, sources, 1, 3, steps), D=normal(4, 5), read_order=order,
        write_order=order if frame != "scan" else torch.stack([torch.randperm(24)[:6] for _ in range(4)]),
        tokens=24, scale=0.3, source_frame="scan" if frame == "scan" else "tokens",
    )  # fmt: skip


@pytest.mark.parametrize("frame", ["tokens", "own tokens", "scan"])
@pytest.mark.parametrize("backend", ["blocked", "native"])
def test_sub_grids_shared_sources_and_other_write_orders(frame: str, backend: str) -> None:
    record = unusual(frame, torch.float32)
    w = {"row_weight": torch.randn(2, 5, 24), "col_weight": torch.randn(2, 5, 24), "fold": "sum"}
    each = ops.hidden_attention(double(record), backend="reference", fold="each")
    truth = torch.einsum("bci,bcij,bcj->bij", w["row_weight"].double(), each, w["col_weight"].double())
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ops.hidden_attention(record, backend=backend, **w).double(), truth, **close)
    vector = torch.randn(2, 24)
    left, right = ops.left_product(record, vector=vector, **w), ops.right_product(record, vector=vector, **w)
    torch.testing.assert_close(left.double(), torch.einsum("bi,bij->bj", vector.double(), truth), **close)
    torch.testing.assert_close(right.double(), torch.einsum("bij,bj->bi", truth, vector.double()), **close)
    for token in (0, 7, 23):
        torch.testing.assert_close(ops.attention_row(record, row=token, **w).double(), truth[:, token], **close)
        torch.testing.assert_close(ops.attention_column(record, column=token, **w).double(), truth[..., token], **close)
    own, exact_own = leaves(record), leaves(double(record))
    y, truth_y = ops.selective_scan(own, backend=backend), ops.selective_scan(exact_own, backend="reference")
    torch.testing.assert_close(y.double(), truth_y, **close)
    head = torch.randn_like(truth_y)
    for value, expected in zip(gradients(own, y, head), gradients(exact_own, truth_y, head), strict=True):
        torch.testing.assert_close(value.double(), expected, **close)


def test_channel_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(Case(channels=37, states=3, grid=(4, 5)), torch.float64)
    rows = torch.randn(2, 37, 20, dtype=torch.float64)
    vector = torch.randn(2, 20, dtype=torch.float64)

    def results() -> list[torch.Tensor]:
        w = {"row_weight": rows, "col_weight": rows.flip(1)}
        folds = [ops.hidden_attention(record, fold=fold, **w) for fold in ("mean", "sum", "each", "absolute")]
        lines = [ops.attention_row(record, row=9, fold=fold, **w) for fold in ("sum", "each")]
        return [*folds, *lines, ops.left_product(record, vector=vector, **w)]

    whole = results()
    monkeypatch.setattr(blocked, "_WORKSPACE", 1)
    monkeypatch.setattr(linear, "_WORKSPACE", 1)
    for value, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_native_channel_blocks_add_up() -> None:
    record = make(Case(batch=1, routes=2, channels=19, states=128, grid=(3, 47)))  # 14 channels fit the kernel's cache
    value = ops.hidden_attention(record, backend="native")
    truth = ops.hidden_attention(double(record), backend="blocked")
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5)


# so long that no task makes a matrix of its own: bands of 16 rows; 24 x 24 is 36 of them, and routes that walk the
# same rows backwards are written together
@pytest.mark.parametrize(("grid", "states"), [((24, 24), 1), ((19, 29), 3), ((19, 29), 128)])
def test_long_sequences(grid: tuple[int, int], states: int, two_threads: None) -> None:
    case = Case(batch=2 if states == 1 else 1, routes=4, channels=7 if states < 128 else 2, states=states, grid=grid)
    record, exact = make(case), make(case, torch.float64)
    for fold in ("mean", "positive", "each") if states == 3 else ("mean",):
        value = ops.hidden_attention(record, fold=fold, backend="native")
        torch.set_num_threads(1)
        assert torch.equal(value, ops.hidden_attention(record, fold=fold, backend="native"))
        torch.set_num_threads(2)
        truth = ops.hidden_attention(exact, fold=fold, backend="blocked")
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5)


def test_long_sequences_of_routes_kept_apart_of_sub_grids_and_in_pairs() -> None:
    order = torch.stack([torch.randperm(640)[:544] for _ in range(2)])
    record = make(Case(routes=2, channels=3, states=2, grid=(17, 32)))
    record = record.replace(read_order=order, write_order=order.flip(1).clone(), tokens=640)
    weights = [(torch.randn(2, 3, 640), None), (None, torch.randn(2, 3, 640))]
    for value, (rows, columns) in zip(ops.hidden_attentions(record, weights, ["sum", "mean"]), weights, strict=True):
        fold = "sum" if columns is None else "mean"
        truth = ops.hidden_attention(record, row_weight=rows, col_weight=columns, fold=fold, backend="reference")
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)
    call = torch.rand(2, 3, 544), -torch.rand(3, 2), torch.randn(2, 2, 544), torch.randn(2, 2, 544)
    truth = ops.hidden_attention(*call, backend="reference")
    torch.testing.assert_close(ops.hidden_attention(*call, backend="native"), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_native_products(weighted: bool) -> None:
    record = make(Case(channels=20, states=3, grid=(4, 5)))
    rows, columns = torch.randn(2, 20, 20), torch.randn(2, 20, 20)
    w = {"row_weight": rows, "col_weight": columns} if weighted else {}
    matrix = ops.hidden_attention(record, **w)
    vector = torch.randn(2, 20)
    left, right = ops.left_product(record, vector=vector, **w), ops.right_product(record, vector=vector, **w)
    torch.testing.assert_close(left, torch.einsum("bi,bij->bj", vector, matrix), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right, torch.einsum("bij,bj->bi", matrix, vector), rtol=1e-4, atol=1e-5)


def test_float32_products_are_differentiable_in_everything() -> None:
    record = make(Case(channels=4, grid=(3, 4)))
    for wanted in range(3):
        given = [torch.randn(2, 12), torch.randn(2, 4, 12), torch.randn(2, 4, 12)]
        given[wanted].requires_grad_()
        vector, rows, columns = given
        w = {"row_weight": rows, "col_weight": columns}
        truth = torch.einsum("bij,bj->bi", ops.hidden_attention(record, backend="blocked", **w), vector)
        value = ops.right_product(record, vector=vector, **w)
        a, b = (torch.autograd.grad((x**2).sum(), given[wanted])[0] for x in (value, truth))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_native_attention_gradient_of_a_row_weight() -> None:
    record = make(Case(channels=6, grid=(4, 5)))
    rows = torch.randn(2, 6, 20, requires_grad=True)
    head = torch.randn(2, 20, 20)
    found = [
        torch.autograd.grad((ops.hidden_attention(record, row_weight=rows, backend=backend) * head).sum(), rows)[0]
        for backend in ("native", "blocked")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_orders_and_precision_and_memory_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, A, B, C = torch.rand(2, 4, 3), -torch.ones(4, 2), torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    for bad, text in (
        ([-2, 0, 1], r"visits -2\.\.1; tokens count from 0 to 4, and -1 is a step without one"),
        ([0, 1, 5], r"0\.\.5, but there are 5 tokens"),
    ):
        with pytest.raises(ValueError, match=f"hidden_attention.*: orders .*{text}"):
            ops.hidden_attention(delta, A, B, C, orders=torch.tensor([bad]), tokens=5)
    assert ops.selective_scan(delta.double(), delta, A, B, C).dtype == torch.float64
    with pytest.raises(ValueError, match="5 channels cannot be shared by 4 heads and 1 groups"):
        ops.selective_scan(torch.randn(2, 5, 3), delta, A, B, C)
    monkeypatch.setattr(dispatch, "_UNASKED", 0)
    monkeypatch.setattr(dispatch, "free_bytes", lambda device: 0)
    with pytest.raises(MatrixTooLargeError, match="needs 72 bytes"):
        ops.selective_scan(delta, delta, A, B, C, attention="mean")
    with pytest.raises(MatrixTooLargeError, match="needs 288 bytes"):
        ops.hidden_attention(delta, A, B, C, fold="each")


def test_free_memory_is_the_smaller_of_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for machine, container, expected in [(10, 7, 7), (7, 10, 7), (None, 9, 9), (9, None, 9), (None, None, None)]:
        monkeypatch.setattr(dispatch, "_meminfo_available", lambda machine=machine: machine)
        monkeypatch.setattr(dispatch, "_cgroup_available", lambda container=container: container)
        assert dispatch.free_bytes(cpu) == expected
