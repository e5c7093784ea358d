"""The kernels where a model's own code calls a compiled scan, under autocast, on streams and devices, and in graphs."""

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mamba_attn
from mamba_attn import ops
from mamba_attn.core import order_check
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import arguments
from mamba_attn.ops.cuda import fused, kernels, launcher
from tests.emulation import Emulator, emulated
from tests.kernels.machines import MACHINES, Recorder, machine
from tests.ops.cases import Case, make

LENGTH, CHANNELS, HEADS, STATES = 21, 24, 4, 16
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _fwd(*args: Any) -> list[Tensor]:
    """As ``selective_scan_cuda.fwd``, with z, and ``selective_scan_cuda_oflex.fwd``, without: by the specification."""
    u, delta, A, B, C, D, *rest = args
    z, bias, softplus = rest if len(args) == 9 else (None, *rest[:2])
    delta = delta.float() + bias[:, None]
    delta = nn.functional.softplus(delta) if softplus else delta
    parts = (x.float() for x in (u, delta, A, B, C, D))
    y = ops.selective_scan(*parts, backend="reference")
    y = y.to(u.dtype) if len(args) == 9 else y  # the last argument asks for float32
    states = y.new_zeros(*y.shape[:2], 1, 2 * A.shape[1])
    return [y, states] if z is None else [y, states, y * nn.functional.silu(z)]


def _chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any) -> tuple[Any, ...]:
    """As mamba_ssm's ``_mamba_chunk_scan_combined_fwd``."""
    u, delta = x.flatten(2).mT[:, None], nn.functional.softplus(dt + options["dt_bias"]).mT[:, None]
    B, C = (t.permute(0, 2, 3, 1)[:, None] for t in (B, C))
    record = ScanRecord.from_scan(u, delta, A.view(1, -1, 1), B, C)
    y = ops.selective_scan(record, backend="reference").mT.unflatten(2, x.shape[2:])
    return y, None, None, None, None, None


def _no_gradients(*args: Any, **options: Any) -> None:
    raise NotImplementedError


selective_scan_cuda = types.ModuleType("selective_scan_cuda")
selective_scan_cuda_oflex = types.ModuleType("selective_scan_cuda_oflex")
for _module in (selective_scan_cuda, selective_scan_cuda_oflex):
    vars(_module).update(fwd=_fwd, bwd=_no_gradients)
ssd_combined: Any = types.ModuleType("ssd_combined")
vars(ssd_combined).update(_mamba_chunk_scan_combined_fwd=_chunks, _mamba_chunk_scan_combined_bwd=_no_gradients)


class Scan(nn.Module):
    """A mixer that calls an extension as Mamba's code does, or VMamba's, or Mamba-2's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, rows = kind, HEADS if kind == "chunks" else CHANNELS
        self.of = nn.Linear(CHANNELS, 2 * CHANNELS + 2 * STATES + rows)
        self.A_log, self.bias = nn.Parameter(torch.rand(rows, STATES)), nn.Parameter(torch.rand(rows))
        self.D = nn.Parameter(torch.rand(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        u, z, B, C, delta = self.of(x).split([CHANNELS, CHANNELS, STATES, STATES, len(self.bias)], -1)
        A = -torch.exp(self.A_log)
        if self.kind == "chunks":
            u, B, C = u.unflatten(2, (HEADS, -1)), B.unsqueeze(2), C.unsqueeze(2)
            options = {"dt_bias": self.bias, "dt_softplus": True}
            y, *_ = ssd_combined._mamba_chunk_scan_combined_fwd(u, delta, A[:, 0], B, C, 8, **options)
            return y.flatten(2)
        scan = (u.mT, delta.mT, A, B.mT[:, None], C.mT[:, None], self.D)
        if self.kind == "mamba":
            return selective_scan_cuda.fwd(*scan, z.mT, self.bias, True)[2].mT
        return selective_scan_cuda_oflex.fwd(*scan, self.bias, True, 1, True)[0].mT


@pytest.fixture(params=MACHINES)
def there(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with machine(request.param) as recorder:
        yield recorder


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", ["mamba", "vmamba", "chunks"])
def test_the_matrix_beside_what_a_compiled_scan_returns(there: Recorder, kind: str, half: bool) -> None:
    torch.manual_seed(0)
    model, x = Scan(kind).eval(), torch.randn(2, LENGTH, CHANNELS)
    order = torch.arange(LENGTH)[None]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        plain = model(x)
        there.launched.clear()
        with mamba_attn.trace(model, attention="mean", orders=order) as trace:
            found = model(x)
            assert there.launched == ["attention_heads" if kind == "chunks" else "attention_factored_64"]
            layer = trace.layers[0]
            matrix = layer.attention()
        assert len(there.launched) == 1  # it was there already
    assert found.dtype == plain.dtype
    torch.testing.assert_close(found, plain, rtol=2e-2 if half else 1e-5, atol=2e-2 if half else 1e-5)
    truth = ops.hidden_attention(layer.scan.map_tensors(Tensor.double), backend="reference")
    torch.testing.assert_close(matrix.double(), truth, rtol=1e-4, atol=1e-6)


def test_autocast_changes_nothing(there: Recorder) -> None:
    records = make(Case(channels=20, states=5)), make(Case(channels=32, heads=2, states=16, shared_states=True))
    for record in records:
        plain = ops.selective_scan(record, attention="absolute", backend="fused")
        with torch.autocast(record.A.device.type, torch.bfloat16):
            again = ops.selective_scan(record, attention="absolute", backend="fused")
        for a, b in zip(again, plain, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # routes meet in any order


class NothingRead(TorchDispatchMode):
    """Fails where the host would wait for a value, or for a tensor whose size depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_value_is_read_on_the_host_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (order_check, arguments):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    u, delta, B, C = (torch.rand(2, size, 30) for size in (6, 6, 3, 3))
    A, D, order = -torch.rand(6, 3) - 0.1, torch.rand(6), torch.stack([torch.randperm(30)])
    with emulated(), NothingRead():
        ops.selective_scan(u, delta, A, B, C, D, attention="mean", backend="fused")
        ops.hidden_attention(delta, A, B, C, fold="each", orders=order, tokens=30, backend="fused")
        for record in (make(Case(frame="tokens")), make(Case(channels=32, heads=2, states=16, shared_states=True))):
            y, _ = ops.selective_scan(record, attention="mean", backend="fused")
            ops.attention_row(record, row=3)
            assert y.shape == (2, record.channels, 15)
        with pytest.raises(ValueError, match=r"capture cannot read the orders; pass tokens="):
            ops.hidden_attention(delta, A, B, C, orders=order, backend="fused")


def test_the_stream_is_the_one_that_torch_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {0: 1000, 1: 1001}
    asked = types.SimpleNamespace
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked(cuda_stream=streams[device.index]))
    assert launcher.stream(torch.device("cuda", 1)) == 1001
    streams[1] = 7  # inside torch.cuda.stream(...)
    assert [launcher.stream(torch.device("cuda", number)) for number in (0, 1)] == [1000, 7]


class Elsewhere(Emulator):
    """Takes tensors of another device, runs nothing, and remembers where it was told to launch."""

    def problem(self, device: torch.device) -> str | None:
        return None

    def launch(self, name: str, *rest: Any) -> None:
        self.launched.append((name, str(rest[-1])))  # type: ignore[arg-type]


def test_results_and_launches_are_on_the_tensors_own_device() -> None:
    for case in (Case(), Case(channels=32, heads=2, states=16, shared_states=True)):
        far = make(case).map_tensors(lambda x: x.to("meta"))
        far = far.replace(read_order=far.read_order.to("meta"), write_order=far.write_order.to("meta"))
        with emulated(Elsewhere()) as there:
            y = kernels.scan(there, far, True)
            both = kernels.attention(there, far, (None, None), "mean", True, with_y=True)
            line = fused.BACKEND.attention_line(far, "row", 3, (None, None), "mean", True)
            five = kernels.backward(there, far, y, True)
        assert {str(x.device) for x in (y, *both, line, *five) if x is not None} == {"meta"}
        assert len(there.launched) == 4
        assert {device for _, device in there.launched} == {"meta"}  # type: ignore[misc]


@needs_a_gpu
@torch.no_grad()
def test_raw_tensors_in_a_graph_on_a_device() -> None:
    with machine("device"):
        for heads in (6, 2):
            u, delta, B, C = (torch.rand(2, 1, size, 150) for size in (6, heads, 16, 16))
            A = -torch.rand(1, heads, 16 if heads == 6 else 1) - 0.1
            inputs = (u, delta, A, B, C)
            expected = ops.selective_scan(*inputs, attention="mean", backend="fused")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = ops.selective_scan(*inputs, attention="mean", backend="fused")
            for x in found:
                x.fill_(torch.nan)
            graph.replay()
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_of_a_second_device() -> None:
    with machine("device"):
        expected = ops.selective_scan(make(Case()), attention="mean", backend="fused")
        far = make(Case()).map_tensors(lambda x: x.to("cuda:1"))
        found = ops.selective_scan(far, attention="mean", backend="fused")  # cuda:0 stays the current device
        for a, b in zip(found, expected, strict=True):
            assert a.device.index == 1
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)
