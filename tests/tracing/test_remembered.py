"""What is remembered of a model between traces, and that a model that was changed in between is looked at anew."""

import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing import adapters, reachable
from mamba_attn.tracing.undisturbed import versions
from tests.integrations.small_vim import Mamba
from tests.tracing import foreign
from tests.tracing.turned import run

# in a file of its own, from which nothing leads to a door
PLAIN = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.helper = work
    def forward(self, x):
        return self.helper(x)

def work(x):
    return x
"""
ATTENTION = """
import torch.nn.functional as F
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)

def forward(self, x):
    return F.scaled_dot_product_attention(x, x, x)
"""
SCAN = """
import torch
from torch import nn
from tests.tracing.foreign import selective_scan_fn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
    def forward(self, x):
        return work(x)

def forward(self, x):
    return work(x)

def work(x):
    u = x.mT.contiguous()
    A, B = -torch.ones(u.shape[1], 2), torch.ones(u.shape[0], 1, 2, u.shape[2])
    return selective_scan_fn(u, torch.ones_like(u), A, B, B, None, None, None).mT
"""


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    return code("plain_code", PLAIN, monkeypatch)


def code(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(text, vars(module))
    return module


def images() -> torch.Tensor:
    return torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))


def model(plain: Any) -> nn.Sequential:
    return nn.Sequential(Mamba(8), nn.LayerNorm(8), plain.Block()).eval()


def by_class(net: nn.Sequential, other: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net[2].__class__ = other.Block


def by_module(net: nn.Sequential, other: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net[2] = other.Block()


def by_part(net: nn.Sequential, other: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net.append(other.Block())


def by_method(net: nn.Sequential, other: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net[2].forward = types.MethodType(other.forward, net[2])


def by_classs_forward(net: nn.Sequential, other: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.Block, "forward", other.forward)


CHANGES: list[Callable[..., None]] = [by_class, by_module, by_part, by_method, by_classs_forward]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("text", [ATTENTION, SCAN])
def test_what_goes_through_a_door_since_the_first_trace_is_traced(
    text: str, change: Callable[..., None], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, other = model(plain), code("other_code", text, monkeypatch)
    assert list(run(net, images())) == list(run(net, images())) == ["0"]
    change(net, other, plain, monkeypatch)
    with torch.no_grad():
        expected = net(images())
    for _ in range(2):
        trace = run(net, images())
        assert list(trace) == ["0", str(len(net) - 1)]
        assert type(trace[1]).__name__ == ("DoorLayer" if text is SCAN else "DoorAttention")
        torch.testing.assert_close(trace.output, expected)


def test_a_function_that_a_module_calls_may_be_exchanged_for_one_with_a_scan(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, other = model(plain), code("other_code", SCAN, monkeypatch)
    assert list(run(net, images())) == ["0"]
    net[2].helper = other.work  # the same attribute, of the same module
    assert list(run(net, images())) == ["0", "2"]


def test_what_lost_its_mixers_is_refused(plain: Any) -> None:
    net = model(plain)
    run(net, images())
    net[0] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no layer that can be traced"):
        run(net, images())


def test_layers_have_the_names_that_the_modules_have_now(plain: Any) -> None:
    net = nn.Sequential(nn.Sequential(Mamba(8)), nn.LayerNorm(8))
    assert list(run(net, images())) == ["0.0"]
    net[0].insert(0, nn.LayerNorm(8))
    assert list(run(net, images())) == ["0.1"]
    net._modules["head"] = net._modules.pop("0")  # as no method of torch does it
    assert list(run(net, images())) == ["head.1"]


def test_an_adapter_that_was_registered_later_is_asked(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []

    class Later(type(adapters.find_mixers(Mamba(8))[""][1])):  # type: ignore[misc]
        family = "later"

        def recognises(self, module: nn.Module) -> bool:
            asked.append(module)
            return super().recognises(module)

    net = model(plain)
    run(net, images())
    monkeypatch.setattr(adapters, "_registered", [])
    mamba_attn.register_adapter(Later())
    trace = run(net, images())
    assert net[0] in asked
    assert trace[0].tokens == 7


def test_hooks_and_another_dtype_between_traces_are_the_models(plain: Any) -> None:
    net = model(plain)
    before = run(net, images())[0].attention("each")
    net.double()
    twice = net[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    after = run(net, images().double())[0]
    assert after.scan.source_u.dtype == torch.float64
    twice.remove()
    torch.testing.assert_close(run(net, images().double())[0].attention("each").float(), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after.attention("each").float(), before, rtol=1e-4, atol=1e-5)


class Mixing(nn.Module):
    """Mixes tokens, and no door sees it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.cumsum(1)


class Block(nn.Module):
    """A traced mixer, and a part beside it."""

    def __init__(self, mixer: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.mixer, self.other = mixer, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(x)
        out: torch.Tensor = self.other(x)
        return out


def test_a_part_without_weights_that_mixes_since_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(Block(Mamba(8), nn.Identity()), Block(Mamba(8), nn.Identity())).eval()
    assert run(net, images()).unseen == run(net, images()).unseen == {}
    net[1].other = Mixing()
    with pytest.warns(UserWarning, match=r"1\.other mix tokens"):
        assert run(net, images()).unseen_mixers == ["1.other"]
    net[1].other = nn.Identity()
    assert run(net, images()).unseen == {}
    net[0].other.__class__ = Mixing
    with pytest.warns(UserWarning, match=r"0\.other mix tokens"):
        assert run(net, images()).unseen_mixers == ["0.other"]


def test_a_forward_that_is_exchanged_is_another_version() -> None:
    net = nn.Sequential(nn.Linear(2, 2), Mixing())
    found = [versions(net)]
    assert versions(net) == found[0]
    for forward in (lambda x: x, lambda x: 2 * x):
        net[1].forward = forward
        found.append(versions(net))
    net[1] = nn.Identity()
    found.append(versions(net))
    with torch.no_grad():
        net[0].weight += 1
    found.append(versions(net))
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_nothing_remembered_keeps_a_model_or_its_code_alive(plain: Any) -> None:
    net = model(plain)
    net[2].forward = types.MethodType(lambda self, x: x * len(net), net[2])  # which holds the model
    run(net, images())
    gone = [weakref.ref(net), weakref.ref(net[0])]
    del net
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_modules_that_are_loaded_later_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    first = reachable.loaded_modules()
    assert reachable.loaded_modules() is first
    assert reachable.loaded_modules(first) is first
    module = code("later_code", SCAN, monkeypatch)
    for loaded in (reachable.loaded_modules(first), reachable.loaded_modules()):
        assert loaded.number != first.number
        assert module in loaded.modules
    now = reachable.loaded_modules()
    module.another = 1
    assert reachable.loaded_modules().number != now.number
    assert any(scan in reachable.compiled_scans() for scan in [foreign.selective_scan_cuda_oflex])


class Wrapper(nn.Module):
    """Passes on what it has not, as PEFT's do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Described(nn.Linear):
    """Has a property, and one that raises."""

    heads = property(lambda self: self.out_features)
    lost = property(lambda self: self.nowhere)


@pytest.mark.parametrize("name", ["weight", "bias", "heads", "lost", "training", "forward", "running_mean", "nothing"])
@pytest.mark.parametrize(
    "module", [Described(2, 3), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2)), Wrapper(Described(2, 3))]
)
def test_parts_are_found_as_hasattr_finds_them(module: nn.Module, name: str) -> None:
    assert adapters.has_parts(module, [name]) == hasattr(module, name)
    assert adapters.has_parts(module, ["train", name]) == hasattr(module, name)
