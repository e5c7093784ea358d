"""Heads whose channels share a matrix: folded per head, they give what the same channels give spelt out."""

from dataclasses import dataclass

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import blocked, heads, linear
from mamba_attn.ops.cpu import native
from tests.ops.bounds import assert_within, magnitude

FOLDS = ("mean", "each", "positive", "absolute")  # "sum" is the mean without its division
BACKENDS = [("blocked", torch.float64), ("blocked", torch.float32), ("native", torch.float32)]
TOLERANCE = {("blocked", torch.float64): 1e-12, ("blocked", torch.float32): 1e-5, ("native", torch.float32): 1e-6}
WEIGHTED = {"plain": (), "rows": ("row_weight",), "columns": ("col_weight",), "both": ("row_weight", "col_weight")}


@dataclass(frozen=True)
class Heads:
    """Sizes of a record; ``shared``: the states of a head decay alike, as in Mamba-2."""

    batch: int = 2
    routes: int = 1
    heads: int = 4
    width: int = 3
    groups: int = 1
    states: int = 5
    length: int = 13
    shared: bool = True
    gain: bool = False
    frame: str = "scan"
    images: bool = False  # orders of their own
    padded: bool = False  # two steps without a token
    scale: float = 1.0  # of delta

    @property
    def id(self) -> str:
        return "-".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Heads(), k)) or "default"


CASES = [
    Heads(),
    Heads(batch=3, routes=2, heads=6, groups=3, states=7, length=37, frame="tokens"),
    Heads(heads=2, width=6, groups=4, length=17),  # a head's channels have two groups
    Heads(heads=5, width=2, groups=5, states=1, length=1),
    Heads(batch=1, heads=1, width=7, states=19, length=33, scale=30.0),
    Heads(routes=2, shared=False, groups=2, length=21),
    Heads(routes=2, gain=True, length=18, frame="tokens"),
    Heads(gain=True, shared=False),
    Heads(batch=3, routes=2, groups=2, images=True, padded=True, frame="tokens"),
    Heads(padded=True, gain=True, length=15),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
backends = pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=lambda x: str(x).removeprefix("torch."))
folds = pytest.mark.parametrize("fold", FOLDS)
weighted = pytest.mark.parametrize("names", WEIGHTED.values(), ids=WEIGHTED)


def make(case: Heads, dtype: torch.dtype) -> ScanRecord:
    torch.manual_seed(0)
    batch, routes, tokens = case.batch, case.routes, case.length + 2
    in_tokens = case.frame == "tokens"
    positions = tokens if in_tokens else case.length
    order = torch.stack([torch.randperm(tokens)[: case.length] for _ in range((batch if case.images else 1) * routes)])
    if case.padded:
        order[:, [1, -1]] = -1
    order = order.unflatten(0, (-1, routes)) if case.images else order

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    return ScanRecord(
        source_u=normal(batch, 1 if in_tokens else routes, case.heads * case.width, positions),
        source_delta=(normal(batch, routes, case.heads, positions).abs() * case.scale),
        A=-normal(routes, case.heads, 1 if case.shared else case.states).abs(),
        source_B=normal(batch, routes, case.groups, case.states, positions),
        source_C=normal(batch, routes, case.groups, case.states, positions),
        D=normal(routes, case.heads * case.width),
        source_gain=normal(batch, routes, case.heads, positions) if case.gain else None,
        gate=normal(batch, case.heads * case.width, tokens),
        read_order=order,
        write_order=order,
        tokens=tokens,
        scale=0.5,
        source_frame=case.frame,
    )


def spelt_out(record: ScanRecord) -> ScanRecord:
    """The same scans as channels that share nothing, which no fold of heads sees."""
    width, of_group = record.channels // record.heads, record.channels // record.source_B.shape[2]
    return record.replace(
        source_delta=record.source_delta.repeat_interleave(width, 2),
        A=record.A.repeat_interleave(width, 1).expand(-1, -1, record.states),
        source_B=record.source_B.repeat_interleave(of_group, 2),
        source_C=record.source_C.repeat_interleave(of_group, 2),
        source_gain=None if record.source_gain is None else record.source_gain.repeat_interleave(width, 2),
    )


def weights(record: ScanRecord, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    shapes = {
        "row_weight": (record.batch, record.channels, record.tokens),
        "col_weight": (record.batch, record.routes, record.channels, record.length),
    }
    return {name: torch.randn(shapes[name], dtype=torch.float64).to(record.A.dtype) for name in names}


@cases
@folds
@weighted
def test_matrix_row_and_column_are_those_of_channels_spelt_out(case: Heads, fold: str, names: tuple[str, ...]) -> None:
    exact = make(case, torch.float32).map_tensors(torch.Tensor.double)
    w = {name: x.float().double() for name, x in weights(exact, names).items()}
    truth = ops.hidden_attention(spelt_out(exact), fold=fold, **w)
    absolute = {name: x.abs() for name, x in w.items()}
    bound = ops.hidden_attention(magnitude(spelt_out(exact)), fold=fold, **absolute)
    token = case.length // 2
    for backend, dtype in BACKENDS:
        record = exact.map_tensors(lambda x, dtype=dtype: x.to(dtype))
        own = {name: x.to(dtype) for name, x in w.items()}
        tolerance = TOLERANCE[backend, dtype]
        value = ops.hidden_attention(record, fold=fold, backend=backend, **own)
        assert value.dtype == dtype
        assert_within(value, truth, bound, tolerance)
        if fold in ("positive", "absolute"):
            assert (value >= 0).all()
        if (backend, dtype) != ("blocked", torch.float32):  # lines choose their backend
            row = ops.attention_row(record, row=token, fold=fold, **own)
            assert_within(row, truth[..., token, :], bound[..., token, :], tolerance)
            column = ops.attention_column(record, column=token, fold=fold, **own)
            assert_within(column, truth[..., :, token], bound[..., :, token], tolerance)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@weighted
def test_products_are_those_of_channels_spelt_out(case: Heads, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    record = make(case, dtype)
    w = weights(record, names)
    exact = {name: x.double() for name, x in w.items()}
    absolute = {name: x.abs() for name, x in exact.items()}
    vector = torch.randn(record.batch, record.tokens, dtype=dtype)
    truth_of = spelt_out(record.map_tensors(torch.Tensor.double))
    for call in (ops.left_product, ops.right_product):
        value = call(record, vector=vector, **w)
        truth = call(truth_of, vector=vector.double(), **exact)
        bound = call(magnitude(truth_of), vector=vector.double().abs(), **absolute)
        assert_within(value, truth, bound, 1e-12 if dtype == torch.float64 else 1e-5)


@backends
@folds
def test_exactly_zero_above_the_diagonal_whatever_the_later_steps_hold(
    backend: str, dtype: torch.dtype, fold: str
) -> None:
    record = make(Heads(groups=2, length=21), dtype)
    record.source_B[..., 11] = torch.nan
    order = record.read_order[0]
    matrix = ops.hidden_attention(record, fold=fold, backend=backend)[..., order, :][..., order]
    assert (matrix.triu(1) == 0).all()
    assert matrix[..., :, :11].isfinite().all()
    assert (ops.attention_row(record, row=int(order[4]), fold=fold)[..., order[5:]] == 0).all()
    assert (ops.attention_column(record, column=int(order[4]), fold=fold)[..., order[:4]] == 0).all()


@pytest.mark.parametrize(
    ("shared", "fold", "names"),
    [
        (True, "mean", WEIGHTED["both"]),
        (True, "absolute", WEIGHTED["columns"]),
        (True, "each", WEIGHTED["rows"]),
        (False, "absolute", WEIGHTED["both"]),
        (False, "positive", WEIGHTED["rows"]),
    ],
)
def test_gradcheck(shared: bool, fold: str, names: tuple[str, ...]) -> None:
    case = Heads(batch=1, heads=2, width=2, groups=2, states=2, length=3, shared=shared, gain=True)
    record = make(case, torch.float64)
    fields = ("source_delta", "source_gain", "A", "source_B", "source_C")
    given = [*(getattr(record, name) for name in fields), *weights(record, names).values()]

    def attention(*values: torch.Tensor) -> torch.Tensor:
        own = record.replace(**dict(zip(fields, values, strict=False)))
        w = dict(zip(names, values[len(fields) :], strict=True))
        return ops.hidden_attention(own, fold=fold, backend="blocked", **w)

    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in given])


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[6]], ids=lambda case: case.id)
@pytest.mark.parametrize("fold", ["mean", "each", "positive", "absolute"])
@weighted
def test_gradients_of_the_kernel_are_those_of_channels_spelt_out(
    case: Heads, fold: str, names: tuple[str, ...]
) -> None:
    record = make(case, torch.float32)
    w = weights(record, names)
    found = []
    for dtype, backend, spell in ((torch.float32, "native", False), (torch.float64, "blocked", True)):
        leaves = record.map_tensors(lambda x, dtype=dtype: x.detach().to(dtype).requires_grad_())
        own = {name: x.to(dtype).requires_grad_() for name, x in w.items()}
        attention = ops.hidden_attention(spelt_out(leaves) if spell else leaves, fold=fold, backend=backend, **own)
        torch.manual_seed(1)
        head = torch.randn(attention.shape, dtype=torch.float64).to(dtype)
        gain = () if leaves.source_gain is None else (leaves.source_gain,)
        wanted = [leaves.source_delta, leaves.A, leaves.source_B, leaves.source_C, *gain, *own.values()]
        found.append(torch.autograd.grad(attention, wanted, head))
    for value, truth in zip(*found, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-5 * truth.abs().max().item())


def test_gradients_of_rows_and_products() -> None:
    record = make(Heads(groups=2), torch.float64)
    vector = torch.randn(2, record.tokens, dtype=torch.float64)
    found = []
    for spell in (False, True):
        leaves = record.map_tensors(lambda x: x.detach().requires_grad_())
        own = spelt_out(leaves) if spell else leaves
        results = [ops.attention_row(own, row=4), ops.left_product(own, vector=vector)]
        wanted = [leaves.source_delta, leaves.A, leaves.source_B, leaves.source_C]
        found += [torch.autograd.grad((x**2).sum(), wanted) for x in results]
    for value, truth in zip(sum(found[:2], ()), sum(found[2:], ()), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shared", [True, False])
def test_channels_with_a_head_of_their_own_are_folded_as_ever(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("nothing is shared here")

    for module in (blocked, native, linear):
        monkeypatch.setattr(module, "fold_heads" if module is linear else "by_head", refuse)
    record = make(Heads(heads=6, width=1, groups=2, shared=shared), torch.float32)
    for fold in FOLDS:
        for backend in ("blocked", "native"):
            ops.hidden_attention(record, fold=fold, backend=backend)
        ops.attention_row(record, row=3, fold=fold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_matrix_is_computed_once_per_channel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(Heads(heads=4, width=9, groups=2), dtype)
    seen: list[ScanRecord] = []

    def watch(module: object, name: str) -> None:
        inner = getattr(module, name)

        def outer(record: ScanRecord, *rest: object) -> object:
            seen.append(record)
            return inner(record, *rest)

        monkeypatch.setattr(module, name, outer)

    watch(blocked, "per_channel")
    watch(native, "flatten_for_matrix")
    watch(linear, "per_channel")
    for names in WEIGHTED.values():
        w = weights(record, names)
        for fold in FOLDS:
            ops.hidden_attention(record, fold=fold, **w)
            ops.attention_row(record, row=3, fold=fold, **w)
            ops.attention_column(record, column=3, fold=fold, **w)
        if len(names) < 2:
            ops.left_product(record, vector=torch.ones(2, record.tokens, dtype=dtype), **w)
    assert seen
    assert max(part.channels for part in seen) <= 4
    assert {part.states for part in seen} == {1, 5}  # 5 in products alone


def test_blocks_of_heads_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(Heads(heads=6, groups=2), torch.float64)
    w = weights(record, WEIGHTED["both"])
    whole = [ops.hidden_attention(record, fold=fold, **w) for fold in FOLDS]
    monkeypatch.setattr(heads, "_WORKSPACE", 1)
    for fold, expected in zip(FOLDS, whole, strict=True):
        torch.testing.assert_close(ops.hidden_attention(record, fold=fold, **w), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["blocked", "native"])
def test_half_precision_and_autocast_compute_in_float32(backend: str) -> None:
    record = make(Heads(groups=2, states=64), torch.bfloat16)
    single = record.map_tensors(torch.Tensor.float)
    for names in WEIGHTED.values():
        w = weights(record, names)
        expected = ops.hidden_attention(single, backend=backend, **{name: x.float() for name, x in w.items()})
        with torch.autocast("cpu", torch.bfloat16):
            value = ops.hidden_attention(record, backend=backend, **w)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
