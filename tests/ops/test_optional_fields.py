"""The laws for what few records have: orders per image, steps without a token, a gain, a D of tokens."""

from dataclasses import dataclass

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import reference
from mamba_attn.ops.arguments import to_tokens
from tests.ops.bounds import assert_within, magnitude, weights

BATCH, ROUTES, CHANNELS, HEADS, STATES, TOKENS = 3, 2, 6, 3, 5, 11
BACKENDS = [
    ("reference", torch.float64),
    ("blocked", torch.float64),
    ("blocked", torch.float32),
    ("native", torch.float32),
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
LINEAR = ("mean", "sum")


@dataclass(frozen=True)
class Special:
    """What a record has that most have not."""

    images: bool = False  # orders of their own
    padded: bool = False
    apart: bool = False  # reads and writes differ
    gain: bool = False
    skip: str = "routes"  # or "tokens", "none"
    frame: str = "scan"
    groups: int = 1
    routes: int = ROUTES

    @property
    def id(self) -> str:
        return "-".join(f"{key}={value}" for key, value in vars(self).items() if value != getattr(Special(), key))


SPECIALS = [
    Special(images=True),
    Special(images=True, frame="tokens", groups=3),
    Special(padded=True, groups=2),
    Special(padded=True, frame="tokens", apart=True),
    Special(images=True, padded=True, apart=True, frame="tokens"),
    Special(gain=True),
    Special(gain=True, frame="tokens", groups=2),
    Special(skip="tokens", frame="tokens"),
    Special(skip="tokens", routes=1),
    Special(skip="tokens", routes=1, images=True, padded=True),
    Special(images=True, padded=True, apart=True, gain=True, skip="tokens", frame="tokens", groups=3),
    Special(images=True, padded=True, gain=True, skip="none"),
]
specials = pytest.mark.parametrize("special", SPECIALS, ids=lambda special: special.id)
backends = pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=lambda x: str(x).removeprefix("torch."))


def order_of(special: Special) -> torch.Tensor:
    """Random orders of 9 of 11 tokens; padded, another two steps of each route have none."""
    count = BATCH if special.images else 1
    order = torch.stack([torch.randperm(TOKENS)[:9] for _ in range(count * special.routes)])
    if special.padded:
        for route in order:
            route[torch.randperm(9)[:2]] = -1
    order = order.unflatten(0, (count, special.routes))
    return order if special.images else order[0]


def make(special: Special, dtype: torch.dtype = torch.float64, seed: int = 0) -> ScanRecord:
    torch.manual_seed(seed)
    routes, in_tokens = special.routes, special.frame == "tokens"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    shared, positions = (1, TOKENS) if in_tokens else (routes, 9)
    order = order_of(special)
    skips = {"none": None, "routes": normal(routes, CHANNELS), "tokens": normal(BATCH, CHANNELS, TOKENS)}
    return ScanRecord(
        source_u=normal(BATCH, shared, CHANNELS, positions),
        source_delta=normal(BATCH, routes, HEADS, positions).abs(),
        A=-normal(routes, HEADS, STATES).abs(),
        source_B=normal(BATCH, routes, special.groups, STATES, positions),
        source_C=normal(BATCH, routes, special.groups, STATES, positions),
        D=skips[special.skip],
        source_gain=normal(BATCH, shared, HEADS, positions) if special.gain else None,
        read_order=order,
        write_order=order_of(special) if special.apart else order,
        tokens=TOKENS,
        scale=0.5,
        source_frame=special.frame,
    )


def double(record: ScanRecord) -> ScanRecord:
    return record.map_tensors(torch.Tensor.double)


def tokens_of(record: ScanRecord, image: int, route: int) -> tuple[list[int], list[int]]:
    """Read and written at every step."""
    orders = (record.read_order, record.write_order)
    return tuple((order[image] if order.ndim == 3 else order)[route].tolist() for order in orders)  # type: ignore[return-value]


def by_hand(record: ScanRecord) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged output and the states, step by step from the sources: nothing of the library is called."""
    y = torch.zeros(record.batch, CHANNELS, TOKENS, dtype=torch.float64)
    states = torch.zeros(record.batch, record.routes, CHANNELS, STATES, record.length, dtype=torch.float64)
    in_tokens = record.source_frame == "tokens"
    for image in range(record.batch):
        for route in range(record.routes):
            reads, writes = tokens_of(record, image, route)

            def at(source: torch.Tensor, image: int = image, route: int = route) -> torch.Tensor:
                return source[image, min(route, source.shape[1] - 1)].double()

            u, delta, B, C = (at(x) for x in (record.source_u, record.source_delta, record.source_B, record.source_C))
            gain = delta if record.source_gain is None else at(record.source_gain)
            for c in range(CHANNELS):
                head, group = c * HEADS // CHANNELS, c * record.source_B.shape[2] // CHANNELS
                h = torch.zeros(STATES, dtype=torch.float64)
                for step, (read, write) in enumerate(zip(reads, writes, strict=True)):
                    p = read if in_tokens else step
                    out = torch.zeros((), dtype=torch.float64)
                    if not in_tokens or read >= 0:
                        h = torch.exp(delta[head, p] * record.A[route, head].double()) * h
                        if read >= 0:
                            h = h + gain[head, p] * B[group, :, p] * u[c, p]
                            if record.D is not None and record.D.ndim == 2:
                                out = record.D[route, c].double() * u[c, p]
                        out = out + (C[group, :, p] * h).sum()
                    states[image, route, c, :, step] = h
                    if write >= 0:
                        y[image, c, write] += out * record.scale
            if record.D is not None and record.D.ndim == 3 and route == 0:
                for t in range(TOKENS):
                    p = t if in_tokens else reads.index(t) if t in reads else None
                    if p is not None:
                        y[image, :, t] += record.D[image, :, t].double() * u[:, p] * record.scale
    return y, states


@specials
@backends
def test_the_scan_and_its_states_are_the_recurrence(special: Special, backend: str, dtype: torch.dtype) -> None:
    record = make(special, dtype)
    if backend == "native" and ops.BACKENDS[backend].unavailable(record):
        pytest.skip("refused with a reason; the test of refusals says which")
    truth, states = by_hand(record)
    bound = by_hand(magnitude(record))
    assert_within(ops.selective_scan(record, backend=backend), truth, bound[0], TOLERANCE[dtype])
    assert_within(ops.scan_states(record, backend=backend), states, bound[1], TOLERANCE[dtype])


@specials
@backends
def test_law_1_matrices_reproduce_the_scan(special: Special, backend: str, dtype: torch.dtype) -> None:
    record = make(special, dtype)
    if backend == "native" and ops.BACKENDS[backend].unavailable(record):
        pytest.skip("refused with a reason; the test of refusals says which")
    total = torch.zeros(BATCH, CHANNELS, TOKENS, dtype=torch.float64)
    for route in range(record.routes):
        part = record.select_routes(slice(route, route + 1))
        u = to_tokens(part.u[:, 0], part.read_order[..., 0, None, :], TOKENS)
        matrix = ops.hidden_attention(part, fold="each", backend=backend)
        total += torch.einsum("bcij,bcj->bci", matrix.double(), u.double())
        if record.D is not None and record.D.ndim == 2:
            skip = part.u[:, 0].double() * record.D[route, :, None].double() * record.scale
            total += to_tokens(skip, part.write_order[..., 0, None, :], TOKENS)
    if record.D is not None and record.D.ndim == 3:
        total += record.D.double() * record.token_u.double() * record.scale
    assert_within(total, by_hand(record)[0], by_hand(magnitude(record))[0], TOLERANCE[dtype])


@specials
@backends
@pytest.mark.parametrize("fold", ops.FOLDS)
def test_law_5_fast_equals_reference(special: Special, backend: str, dtype: torch.dtype, fold: str) -> None:
    record = make(special, dtype)
    if backend == "native" and ops.BACKENDS[backend].unavailable(record):
        pytest.skip("refused with a reason; the test of refusals says which")
    w = weights(record)
    exact, absolute = ({key: f(weight.double()) for key, weight in w.items()} for f in (torch.clone, torch.abs))
    value = ops.hidden_attention(record, fold=fold, backend=backend, **w)
    truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
    bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)
    assert_within(value, truth, bound, TOLERANCE[dtype])


@specials
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_law_7_rows_columns_and_products(special: Special, dtype: torch.dtype) -> None:
    record = make(special, dtype)
    w = weights(record)
    exact, absolute = ({key: f(weight.double()) for key, weight in w.items()} for f in (torch.clone, torch.abs))
    tolerance = TOLERANCE[dtype] * 10
    for fold in ops.FOLDS:
        truth = ops.hidden_attention(double(record), fold=fold, backend="reference", **exact)
        bound = ops.hidden_attention(magnitude(double(record)), fold=fold, backend="reference", **absolute)
        for token in (0, 4, TOKENS - 1):
            row = ops.attention_row(record, row=token, fold=fold, **w)
            column = ops.attention_column(record, column=token, fold=fold, **w)
            assert_within(row, truth[..., token, :], bound[..., token, :], tolerance)
            assert_within(column, truth[..., :, token], bound[..., :, token], tolerance)
        if fold in LINEAR:
            vector = torch.randn(BATCH, TOKENS, dtype=dtype)
            v = vector.double()
            left = ops.left_product(record, vector=vector, fold=fold, **w)
            right = ops.right_product(record, vector=vector, fold=fold, **w)
            assert_within(
                left, torch.einsum("bi,bij->bj", v, truth), torch.einsum("bi,bij->bj", v.abs(), bound), tolerance
            )
            assert_within(
                right, torch.einsum("bij,bj->bi", truth, v), torch.einsum("bij,bj->bi", bound, v.abs()), tolerance
            )


@specials
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[1:], ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("what", ["scan", "attention"])
def test_gradients_are_those_of_the_reference(special: Special, backend: str, dtype: torch.dtype, what: str) -> None:
    record = make(special, dtype)
    if backend == "native" and ops.BACKENDS[backend].unavailable(record):
        pytest.skip("refused with a reason; the test of refusals says which")

    def gradients(record: ScanRecord, backend: str) -> dict[str, torch.Tensor]:
        names = ["source_delta", "A", "source_B", "source_C", "source_gain"]
        names += ["source_u", "D"] if what == "scan" else []
        leaves = {name: x.detach().requires_grad_() for name in names if (x := getattr(record, name)) is not None}
        own = record.replace(**leaves)
        if what == "scan":
            result = ops.selective_scan(own, backend=backend)
        else:
            result = ops.hidden_attention(own, fold="each", backend=backend)
        weight = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result).to(result)
        return dict(zip(leaves, torch.autograd.grad((result * weight).sum(), list(leaves.values())), strict=True))

    found, truth = gradients(record, backend), gradients(double(record), "reference")
    for name, value in truth.items():
        scale = value.abs().max().item()
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("frame", ["scan", "tokens"])
def test_gain_equal_to_delta_is_no_gain(backend: str, frame: str) -> None:
    record = make(Special(frame=frame), torch.float32)
    same = record.replace(source_gain=record.source_delta)
    if ops.BACKENDS[backend].unavailable(same):
        pytest.skip("refused with a reason; the test of refusals says which")
    for operator in (ops.selective_scan, ops.hidden_attention):
        assert torch.equal(operator(same, backend=backend), operator(record, backend=backend))
    assert torch.equal(reference.states(same), reference.states(record))


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("frame", ["scan", "tokens"])
def test_one_order_per_image_that_all_share_is_the_shared_order(backend: str, frame: str) -> None:
    record = make(Special(frame=frame), torch.float32)
    order = record.read_order.expand(BATCH, -1, -1)
    each = record.replace(read_order=order, write_order=order)
    for operator in (ops.selective_scan, ops.hidden_attention):
        torch.testing.assert_close(
            operator(each, backend=backend), operator(record, backend=backend), rtol=1e-6, atol=1e-6
        )
        if backend == "reference":
            assert torch.equal(operator(each, backend=backend), operator(record, backend=backend))
    assert torch.equal(ops.attention_row(each, row=3), ops.attention_row(record, row=3))


@pytest.mark.parametrize("frame", ["scan", "tokens"])
def test_law_13_padded_text_cut_to_its_tokens_is_the_unpadded_text(frame: str) -> None:
    """Two lines of text, the first with 4 tokens less, padded on the left."""
    whole = make(Special(frame=frame, routes=1))
    order = torch.arange(9).expand(1, 9)
    whole = whole.replace(read_order=order, write_order=order)
    lacking = torch.cat([torch.full((4,), -1), torch.arange(4, 9)])
    padded_order = torch.stack([lacking, torch.arange(9), torch.arange(9)])[:, None]
    padded = whole.replace(read_order=padded_order, write_order=padded_order)
    positions = slice(4, 9) if frame == "scan" else slice(4, TOKENS)
    names = ("source_u", "source_delta", "source_B", "source_C")
    short = whole.select_images(slice(0, 1))
    short = short.replace(
        **{name: getattr(short, name)[..., positions] for name in names},
        read_order=order[:, :5], write_order=order[:, :5], tokens=TOKENS - 4,
    )  # fmt: skip
    matrix = ops.hidden_attention(padded)
    torch.testing.assert_close(matrix[:1, 4:, 4:], ops.hidden_attention(short), rtol=1e-12, atol=1e-12)
    assert (matrix[0, :4] == 0).all()
    assert (matrix[0, :, :4] == 0).all()
    torch.testing.assert_close(matrix[1:], ops.hidden_attention(whole)[1:], rtol=1e-12, atol=1e-12)
    y = ops.selective_scan(padded)
    torch.testing.assert_close(y[:1, :, 4:], ops.selective_scan(short), rtol=1e-12, atol=1e-12)
    assert (y[0, :, :4] == 0).all()
    assert (ops.attention_row(padded, row=2)[0] == 0).all()


def test_routes_share_a_skip_of_tokens() -> None:
    record = make(Special(skip="tokens", frame="tokens"))
    parts = sum(ops.selective_scan(record.select_routes(slice(r, r + 1))) for r in range(ROUTES))
    torch.testing.assert_close(parts, ops.selective_scan(record), rtol=1e-12, atol=1e-12)


def test_images_are_told_apart() -> None:
    record = make(Special(images=True, padded=True, apart=True, gain=True, skip="tokens", frame="tokens"))
    for image in range(BATCH):
        alone = record.select_images(slice(image, image + 1))
        torch.testing.assert_close(
            ops.selective_scan(alone)[0], ops.selective_scan(record)[image], rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            ops.hidden_attention(alone)[0], ops.hidden_attention(record)[image], rtol=1e-12, atol=1e-12
        )


def test_raw_tensors_take_one_order_per_image() -> None:
    record = make(Special(images=True, padded=True))
    value = ops.hidden_attention(record.delta, record.A, record.B, record.C, orders=record.read_order, tokens=TOKENS)
    torch.testing.assert_close(
        value * record.scale, ops.hidden_attention(record.replace(D=None)).mul(1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("order", ["read_order", "write_order"])
def test_an_order_of_one_image_that_repeats_a_token_is_refused(order: str) -> None:
    record = make(Special(images=True, padded=True))
    repeated = record.read_order.clone()
    repeated[1, 1] = torch.arange(9)
    repeated[1, 1, 5] = 3
    with pytest.raises(ValueError, match=f"ScanRecord: {order} visits token 3 more than once on one route"):
        record.replace(**{order: repeated})
    with pytest.raises(ValueError, match=r"visits -2.*and -1 is a step without one"):
        record.replace(**{order: record.read_order - 1})


def test_shapes_that_do_not_agree_are_refused() -> None:
    record = make(Special(images=True, frame="tokens"))
    with pytest.raises(ValueError, match=r"read_order must be .* or, one per image, .* got \(2, 2, 9\)"):
        record.replace(read_order=record.read_order[:2])
    with pytest.raises(ValueError, match="source_gain must be shaped like source_delta"):
        record.replace(source_gain=record.source_delta[..., :-1])
    with pytest.raises(ValueError, match=r"D must be \(routes, channels\) = \(2, 6\) or \(batch, channels, tokens\)"):
        record.replace(D=torch.ones(BATCH, CHANNELS, TOKENS - 1))
    with pytest.raises(ValueError, match="these routes have inputs of their own; give u once"):
        make(Special(skip="tokens"))
