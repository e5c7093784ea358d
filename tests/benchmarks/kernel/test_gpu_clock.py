"""What a GPU is asked to do, without one."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernel import ceilings, timing

GPU = torch.device("cuda", 0)


@pytest.fixture
def events(monkeypatch):
    """Everything that is asked of a GPU, in order."""
    found = []

    class Event:
        def __init__(self, enable_timing):
            self.name = "start" if sum(each.startswith("new") for each in found) % 2 == 0 else "stop"
            found.append(f"new {self.name}")

        def record(self, stream):
            found.append(f"{self.name} on {stream}")

        def synchronize(self):
            found.append(f"wait for {self.name}")

        def elapsed_time(self, other):
            assert (self.name, other.name) == ("start", "stop")
            return 7.0

    buffer = SimpleNamespace(zero_=lambda: found.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=100))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: found.append("synchronize"))
    monkeypatch.setattr(torch, "empty", lambda count, dtype, device: found.append(f"{count} bytes") or buffer)
    return found


def test_a_forward_pass_finds_an_idle_gpu_with_a_cold_cache(events):
    clock = timing.clock_for(GPU, kernels=False)
    assert clock(lambda: events.append("call"), 2) == pytest.approx(7e-3)
    before = ["new start", "new stop", "flush", "synchronize", "start on stream"]
    one = [*before, "call", "stop on stream", "wait for stop"]
    assert events == ["200 bytes", *one, *one]


def test_an_operator_is_launched_while_the_gpu_flushes(events):
    assert timing.clock_for(GPU)(lambda: events.append("call"), 1) == pytest.approx(7e-3)
    assert events.count("flush") == timing._AHEAD
    assert "synchronize" not in events
    assert events[-4:] == ["start on stream", "call", "stop on stream", "wait for stop"]


def test_exponentials_are_chained_where_torch_compiles(monkeypatch):
    asked = []

    def make(code):
        asked.append(code)
        return lambda x: asked.append(x.numel())

    def best(call, work):
        call()
        return work

    monkeypatch.setattr(torch.cuda, "jiterator", SimpleNamespace(_create_jit_fn=make), raising=False)
    rate, note = ceilings._gpu(torch.device("cpu"), best)
    assert asked == [ceilings._EXPONENTIALS, 2**24]
    assert rate == 2**24 * 256
    assert "256 in a row" in note


def test_where_torch_cannot_compile_the_ceiling_is_called_a_lower_bound(monkeypatch):
    def make(code):
        raise RuntimeError("nvrtc: error\nmore")

    monkeypatch.setattr(torch.cuda, "jiterator", SimpleNamespace(_create_jit_fn=make), raising=False)
    rate, note = ceilings._gpu(torch.device("cpu"), lambda call, work: work)
    assert rate == 2**24
    assert "a lower bound of the ceiling (nvrtc: error)" in note
