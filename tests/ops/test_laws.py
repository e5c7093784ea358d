"""The laws of the design, for every backend, case, fold and precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_attn import ops
from mamba_attn.ops import reference
from tests.ops.bounds import assert_within, magnitude, weights
from tests.ops.cases import CASES, Case, double, make

FOLDS = ("mean", "sum", "each", "positive", "absolute")
FAST = [("blocked", torch.float32), ("blocked", torch.float64), ("native", torch.float32)]
TOLERANCE = {("native", torch.float32): 1e-6, ("blocked", torch.float32): 1e-5, ("blocked", torch.float64): 1e-13}

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
fast = pytest.mark.parametrize(("backend", "dtype"), FAST, ids=lambda x: str(x).removeprefix("torch."))


@cases
@fast
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_law_5_fast_equals_reference(case: Case, backend: str, dtype: torch.dtype, fold: str, weighted: bool) -> None:
    record = make(case, dtype)
    w = weights(record) if weighted else {}
    value = ops.hidden_attention(record, fold=fold, backend=backend, **w)
    exact = {key: weight.double() for key, weight in w.items()}
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
    absolute = {key: weight.abs() for key, weight in exact.items()}
    bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)
    assert value.dtype == dtype
    assert_within(value, truth, bound, TOLERANCE[backend, dtype])


@cases
@fast
@pytest.mark.parametrize("count", [2, 3])
def test_law_5_several_matrices_at_once_are_those_of_single_calls(
    case: Case, backend: str, dtype: torch.dtype, count: int
) -> None:
    record = make(case, dtype)
    w = weights(record)
    pairs = [(w["row_weight"], w["col_weight"]), (None, None), (None, w["col_weight"])][:count]
    folds = ["sum", "mean", "mean"][:count]
    found = ops.hidden_attentions(record, pairs, folds, backend=backend)
    positive = magnitude(double(record))
    for value, (rows, columns), fold in zip(found, pairs, folds, strict=True):
        given = {"row_weight": rows, "col_weight": columns}
        exact = {key: None if x is None else x.double() for key, x in given.items()}
        truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
        absolute = {key: None if x is None else x.abs() for key, x in exact.items()}
        bound = ops.hidden_attention(positive, fold=fold, backend="reference", **absolute)
        assert_within(value, truth, bound, TOLERANCE[backend, dtype])


def test_several_matrices_keep_their_graphs_and_need_a_fold_each() -> None:
    record = make(Case(states=4, frame="tokens"))
    leaf = record.source_delta.clone().requires_grad_()
    rows = torch.randn(record.batch, record.channels, record.tokens)
    pairs, folds = [(rows, None), (None, None)], ["sum", "mean"]
    one, other = ops.hidden_attentions(record.replace(source_delta=leaf), pairs, folds)
    (gradient,) = torch.autograd.grad(one.sum() + other.sum(), leaf)
    alone = (ops.hidden_attention(record.replace(source_delta=leaf), row_weight=rows, fold="sum"),)
    alone += (ops.hidden_attention(record.replace(source_delta=leaf)),)
    torch.testing.assert_close(gradient, torch.autograd.grad(alone[0].sum() + alone[1].sum(), leaf)[0])
    with pytest.raises(ValueError, match="1 folds for 2 pairs of weights; expected one for each"):
        ops.hidden_attentions(record, pairs, ["sum"])


@cases
@fast
def test_law_5_scan_equals_reference(case: Case, backend: str, dtype: torch.dtype) -> None:
    record = make(case, dtype)
    value = ops.selective_scan(record, backend=backend)
    truth = ops.selective_scan(double(record), backend="reference")
    bound = ops.selective_scan(magnitude(double(record)), backend="reference")
    assert_within(value, truth, bound, TOLERANCE[backend, dtype])


@cases
def test_law_1_matrices_reproduce_the_scan(case: Case) -> None:
    record = make(case, torch.float64)
    M = reference.channel_matrices(record)
    y = torch.einsum("brcij,brcj->brci", M, record.u)
    if record.D is not None:
        y = y + record.D.unsqueeze(-1) * record.u
    torch.testing.assert_close(y, reference.selective_scan(record), rtol=0, atol=1e-12)


def test_law_1_shared_u_allows_one_merged_matrix() -> None:
    record = make(Case(routes=4, channels=7, states=3, grid=(4, 5), frame="tokens", skip=False), torch.float64)
    merged = ops.hidden_attention(record, fold="each")
    y = torch.einsum("bcij,bcj->bci", merged, record.source_u[:, 0])
    torch.testing.assert_close(y, ops.selective_scan(record), rtol=0, atol=1e-12)


@cases
@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("fold", FOLDS)
def test_law_2_exactly_zero_above_the_diagonal(case: Case, backend: str, fold: str) -> None:
    record = make(case)
    for route in range(record.routes):
        own = record.select_routes(slice(route, route + 1))
        merged = ops.hidden_attention(own, fold=fold, backend=backend)
        in_order = merged[..., own.write_order[0], :][..., own.read_order[0]]
        assert (in_order.triu(1) == 0).all()
        assert in_order.tril().any()


@fast
def test_law_3_backward_route_is_the_forward_route_of_flipped_inputs(backend: str, dtype: torch.dtype) -> None:
    record = make(Case(routes=1, channels=17, states=4, grid=(1, 37)), dtype)
    backwards = record.replace(read_order=record.read_order.flip(1), write_order=record.write_order.flip(1))
    flipped = ops.hidden_attention(record, backend=backend).flip(1, 2)
    assert torch.equal(ops.hidden_attention(backwards, backend=backend), flipped)
    y = ops.selective_scan(record, backend=backend)
    assert torch.equal(ops.selective_scan(backwards, backend=backend), y.flip(-1))


@fast
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 50])
def test_law_4_extreme_steps(backend: str, dtype: torch.dtype, scale: float, length: int) -> None:
    record = make(Case(routes=1, channels=3, states=2, grid=(1, length), delta_scale=scale), dtype)
    for fold in FOLDS:
        assert torch.isfinite(ops.hidden_attention(record, fold=fold, backend=backend)).all()
    y = ops.selective_scan(record, backend=backend)
    assert torch.isfinite(y).all()
    if scale == 0.0:
        assert (ops.hidden_attention(record, backend=backend) == 0).all()
        assert torch.equal(y, record.scale * record.D.unsqueeze(-1) * record.u[:, 0])


@fast
def test_law_4_length_one_is_c_b_delta(backend: str, dtype: torch.dtype) -> None:
    record = make(Case(routes=1, channels=3, states=4, grid=(1, 1)), dtype)
    expected = (record.C * record.B).sum((1, 2, 3, 4))[:, None] * record.delta[:, 0, :, 0] * record.scale
    attention = ops.hidden_attention(record, fold="each", backend=backend)[..., 0, 0]
    torch.testing.assert_close(attention, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["blocked", "native"])
def test_law_6_weights_are_gradient_x_attention(backend: str) -> None:
    record = make(Case(routes=2, channels=6, states=3, grid=(4, 5)))
    M = reference.channel_matrices(double(record)).requires_grad_()
    y = torch.einsum("brcij,brcj->brci", M, record.u.double())
    merged = reference.merge_tokens(record, y)
    head = torch.randn_like(merged)
    logit = (merged * head).sin().sum()
    to_y, to_M = torch.autograd.grad(logit, [merged, M])
    truth = reference.merge(record.replace(scale=1.0), (to_M * M).sum(2).detach())
    value = ops.hidden_attention(record, row_weight=to_y, col_weight=record.u, fold="sum", backend=backend)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


@cases
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_law_7_rows_and_columns(case: Case, fold: str, weighted: bool) -> None:
    record = make(case, torch.float64)
    w = weights(record) if weighted else {}
    matrix = ops.hidden_attention(record, fold=fold, **w)
    for token in {0, record.tokens // 2, record.tokens - 1}:
        row = ops.attention_row(record, row=token, fold=fold, **w)
        column = ops.attention_column(record, column=token, fold=fold, **w)
        torch.testing.assert_close(row, matrix[..., token, :], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(column, matrix[..., :, token], rtol=1e-12, atol=1e-12)


@cases
@pytest.mark.parametrize("fold", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_law_7_products(case: Case, fold: str, weighted: bool) -> None:
    record = make(case, torch.float64)
    w = weights(record) if weighted else {}
    matrix = ops.hidden_attention(record, fold=fold, **w)
    vector = torch.randn(record.batch, record.tokens, dtype=torch.float64)
    left = ops.left_product(record, vector=vector, fold=fold, **w)
    right = ops.right_product(record, vector=vector, fold=fold, **w)
    torch.testing.assert_close(left, torch.einsum("bi,bij->bj", vector, matrix), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(right, torch.einsum("bij,bj->bi", matrix, vector), rtol=1e-11, atol=1e-11)


@cases
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_law_7_rows_and_columns_of_the_kernel(case: Case, fold: str, weighted: bool) -> None:
    record = make(case)
    w = weights(record) if weighted else {}
    exact, absolute = ({key: f(weight.double()) for key, weight in w.items()} for f in (torch.clone, torch.abs))
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
    bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)
    tolerance = 1e-6 if case.groups == 1 else 1e-5  # the kernel takes one group; others run in plain PyTorch
    for token in {0, record.tokens // 3, record.tokens - 1}:
        row = ops.attention_row(record, row=token, fold=fold, **w)
        column = ops.attention_column(record, column=token, fold=fold, **w)
        assert row.dtype == torch.float32
        assert_within(row, truth[..., token, :], bound[..., token, :], tolerance)
        assert_within(column, truth[..., :, token], bound[..., :, token], tolerance)


@cases
@pytest.mark.parametrize("fold", ["mean", "sum"])
def test_law_7_products_of_the_kernel(case: Case, fold: str) -> None:
    record = make(case)
    w = weights(record)
    exact, absolute = ({key: f(weight.double()) for key, weight in w.items()} for f in (torch.clone, torch.abs))
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
    bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)
    vector = torch.randn(record.batch, record.tokens)
    v = vector.double()
    left = ops.left_product(record, vector=vector, fold=fold, **w)
    right = ops.right_product(record, vector=vector, fold=fold, **w)
    assert_within(left, torch.einsum("bi,bij->bj", v, truth), torch.einsum("bi,bij->bj", v.abs(), bound), 1e-5)
    assert_within(right, torch.einsum("bij,bj->bi", truth, v), torch.einsum("bij,bj->bi", bound, v.abs()), 1e-5)


@fast
def test_law_8_images_channels_and_routes_do_not_leak(backend: str, dtype: torch.dtype) -> None:
    record = make(Case(routes=4, channels=18, states=3, grid=(4, 5), frame="tokens"), dtype)
    whole = ops.hidden_attention(record, fold="each", backend=backend)
    y = ops.selective_scan(record, backend=backend)
    spoilt = record.replace(
        source_delta=record.source_delta.clone(), source_u=record.source_u.clone(), source_B=record.source_B.clone()
    )
    spoilt.source_delta[1] = 9.0
    spoilt.source_B[1] = -9.0
    spoilt.source_delta[:, :, 3] = 5.0
    spoilt.source_u[:, :, 3] = 7.0
    others = [c for c in range(18) if c != 3]
    again = ops.hidden_attention(spoilt, fold="each", backend=backend)
    assert torch.equal(again[0, others], whole[0, others])
    assert not torch.equal(again[0, 3], whole[0, 3])
    y_again = ops.selective_scan(spoilt, backend=backend)
    torch.testing.assert_close(y_again[0, others], y[0, others], rtol=0, atol=0)
    alone = sum(
        ops.hidden_attention(record.select_routes(slice(r, r + 1)), fold="each", backend=backend) for r in range(4)
    )
    torch.testing.assert_close(alone, whole, rtol=1e-6, atol=1e-6)


@fast
def test_law_8_strides_and_memory_layout_do_not_matter(backend: str, dtype: torch.dtype) -> None:
    record = make(Case(routes=2, channels=16, states=3, grid=(3, 7)), dtype)

    def restride(x: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2] if x.ndim < 4 else wide[..., ::2].movedim(1, -1).contiguous().movedim(-1, 1)

    again = record.map_tensors(restride)
    assert not again.source_delta.is_contiguous()
    assert torch.equal(ops.selective_scan(again, backend=backend), ops.selective_scan(record, backend=backend))
    for fold in ("mean", "positive"):
        torch.testing.assert_close(
            ops.hidden_attention(again, fold=fold, backend=backend),
            ops.hidden_attention(record, fold=fold, backend=backend), rtol=0, atol=0,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["blocked", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32_out(backend: str, dtype: torch.dtype) -> None:
    record = make(Case(routes=2, channels=19, states=4, grid=(5, 6)), dtype)
    single = record.map_tensors(torch.Tensor.float)
    for result, expected in [
        (ops.hidden_attention(record, backend=backend), ops.hidden_attention(single, backend=backend)),
        (ops.selective_scan(record, backend=backend), ops.selective_scan(single, backend=backend)),
    ]:
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@given(
    length=st.integers(1, 70), channels=st.integers(1, 20), states=st.integers(1, 6), batch=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 10.0]), fold=st.sampled_from(FOLDS),
    backend=st.sampled_from(["blocked", "native"]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60)
def test_law_5_any_size(
    length: int, channels: int, states: int, batch: int, scale: float, fold: str, backend: str, seed: int
) -> None:
    case = Case(batch=batch, routes=1, channels=channels, states=states, grid=(1, length), delta_scale=scale)
    record = make(case, seed=seed)
    value = ops.hidden_attention(record, fold=fold, backend=backend)
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference")
    bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference")
    assert_within(value, truth, bound, 1e-5)


@given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 2**31))
def test_attention_is_linear_in_b_and_c(a: float, b: float, seed: int) -> None:
    first, second = (make(Case(routes=1), torch.float64, seed=s) for s in (seed, seed + 1))
    for name in ("source_B", "source_C"):
        x, y = getattr(first, name), getattr(second, name)
        mixed = ops.hidden_attention(first.replace(**{name: a * x + b * y}))
        separate = a * ops.hidden_attention(first) + b * ops.hidden_attention(first.replace(**{name: y}))
        torch.testing.assert_close(mixed, separate, rtol=1e-9, atol=1e-9)
