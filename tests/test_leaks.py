"""The tests' own machinery: every kind of leak is seen and a clean trace not blamed; NaN fill, seeds, type checks."""

import re
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol, Self

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from mamba_attn import orders
from mamba_attn.core.layout import TokenLayout
from tests.leaks import Watch
from tests.typechecker import check

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))


@contextmanager
def clean(model):
    """Hooks and an instance forward, as a real trace installs them, removed on every way out."""
    layer = model[0]
    handle = layer.register_forward_hook(lambda *_: None)
    layer.forward = lambda x: type(layer).forward(layer, x)
    try:
        yield "record"
    finally:
        del layer.forward
        handle.remove()


def _hook(model):
    model[1].register_forward_hook(lambda *_: None)


def _pre_hook_with_kwargs(model):
    model[0].register_forward_pre_hook(lambda *_: None, with_kwargs=True)


def _backward_hook(model):
    model[0].register_full_backward_hook(lambda *_: None)


def _state_dict_hook(model):
    model[0].register_state_dict_post_hook(lambda *_: None)


def _parameter_hook(model):
    model[0].weight.register_hook(lambda grad: grad)


def _attribute(model):
    model[1][0].record = 1


def _forward(model):
    model[0].forward = lambda x: x


def _class_forward(model):
    nn.ReLU.forward = lambda self, x: x


def _training(model):
    model.eval()


def _requires_grad(model):
    model[0].bias.requires_grad_(False)


def _grad(model):
    model[0].weight.grad = torch.zeros(3, 3)


def _new_module(model):
    model[1].append(nn.ReLU())


def _replaced_parameter(model):
    model[0].weight = nn.Parameter(torch.zeros(3, 3))


def _class(model):
    model[1][1].__class__ = nn.Tanh


def _global_hook(model):
    nn.modules.module.register_module_forward_hook(lambda *_: None)


LEAKS = {
    _hook: "Sequential.1: hooks _forward_hooks",
    _pre_hook_with_kwargs: "Sequential.0: hooks _forward_pre_hooks",
    _backward_hook: "Sequential.0: hooks _backward_hooks",
    _state_dict_hook: "Sequential.0: hooks _state_dict_hooks",
    _parameter_hook: "Sequential.0: hooks weight._backward_hooks",
    _attribute: "Sequential.1.0: attributes record is new",
    _forward: "Sequential.0: forward instance was None",
    _class_forward: "Sequential.1.1: forward class was",
    _training: "Sequential.1.0: training training was True, is False",
    _requires_grad: "Sequential.0: requires_grad bias was True, is False",
    _grad: "Sequential.0: grad weight was None",
    _new_module: "Sequential.1: attributes 2 is new",
    _replaced_parameter: "Sequential.0: attributes weight was",
    _class: "Sequential.1.1: class type was",
    _global_hook: "torch.nn: global hooks _global_forward_hooks",
}


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__.strip("_"))
def test_every_kind_of_leak_is_seen(leak, model, monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", nn.ReLU.forward)  # restored after the test
    monkeypatch.setattr(nn.modules.module, "_global_forward_hooks", OrderedDict())

    @contextmanager
    def leaking(model):
        leak(model)
        yield

    watch = Watch()
    with watch.wrap(leaking)(model):
        pass
    found = [text for _, text in watch.collect()]
    assert any(text.startswith(LEAKS[leak]) for text in found), found
    assert watch.collect() == []


def test_a_leak_is_seen_when_the_block_raises(model):
    @contextmanager
    def leaks_on_error(model):
        handle = model[0].register_forward_hook(lambda *_: None)
        yield
        handle.remove()

    watch = Watch()
    with pytest.raises(ZeroDivisionError), watch.wrap(leaks_on_error)(model):
        raise ZeroDivisionError
    assert [aspect for aspect, _ in watch.collect()] == ["hooks"]


def test_a_leak_is_seen_when_entering_fails_half_way(model):
    @contextmanager
    def fails_half_way(model):
        model[0].register_forward_hook(lambda *_: None)
        raise LookupError("no such layer")
        yield

    watch = Watch()
    with pytest.raises(LookupError), watch.wrap(fails_half_way)(model):
        pass
    assert [aspect for aspect, _ in watch.collect()] == ["hooks"]


def test_a_clean_trace_is_not_blamed(model):
    watch = Watch()
    trace = watch.wrap(clean)
    with trace(model) as record:  # a forward in train mode changes BatchNorm's buffers, which is the user's doing
        model(torch.randn(4, 3))
    assert record == "record"
    with pytest.raises(ZeroDivisionError), trace(model=model):
        raise ZeroDivisionError
    with trace(model), trace(model[1]), trace(nn.Sequential(nn.ReLU())):
        pass
    assert watch.collect() == []


def test_threads_that_overlap_are_not_blamed_and_leaks_among_them_are_seen(model):
    watch = Watch()
    barrier = threading.Barrier(2, timeout=30)

    @contextmanager
    def hooked(model, leak):
        handle = model.register_forward_hook(lambda *_: None)
        barrier.wait()
        yield
        barrier.wait()
        if not leak:
            handle.remove()

    def run(target, leak):
        with watch.wrap(hooked)(target, leak):
            pass

    for leak in (False, True):
        threads = [threading.Thread(target=run, args=args) for args in ((model, False), (model[1], leak))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [aspect for aspect, _ in watch.collect()] == (["hooks"] if leak else [])


def test_a_trace_that_is_never_left_is_reported(model):
    watch = Watch()
    entered = watch.wrap(clean)(model)
    entered.__enter__()
    assert watch.collect() == [("open", "1 trace(s) entered and never left")]
    entered.__exit__(None, None, None)


def test_install_reaches_every_name_of_the_package(monkeypatch):
    modules = {name: ModuleType(name) for name in ("fake", "fake.tracing", "other")}
    for name, module in modules.items():
        module.trace = clean
        monkeypatch.setitem(sys.modules, name, module)
    Watch().install(modules["fake.tracing"])
    assert modules["fake"].trace is modules["fake.tracing"].trace is not clean
    assert modules["fake"].trace.__wrapped__ is clean
    assert modules["other"].trace is clean


_LEAKING_TESTS = """
import pytest, torch
from contextlib import contextmanager
from tests.conftest import WATCH

@contextmanager
def leaking(model):
    yield
    model.weight.grad = torch.zeros(2, 2)

def trace():
    with WATCH.wrap(leaking)(torch.nn.Linear(2, 2)):
        pass

def test_leaks():
    trace()

@pytest.mark.changes_model("grad")
def test_says_so():
    trace()

@pytest.mark.changes_model("hooks")
def test_says_something_else():
    trace()
"""


def test_the_fixture_fails_a_leaking_test_and_obeys_the_marker(tmp_path):
    (tmp_path / "test_it.py").write_text(_LEAKING_TESTS)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--jaxtyping-packages="]  # shapes have tests of their own, and jaxtyping 0.3.3 comes after -p
    outcome = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.search(r"3 passed, (\d+ warnings?, )?2 errors", outcome), outcome
    assert "a trace left this behind:\nLinear: grad weight was None" in outcome


def test_uninitialised_memory_is_nan():
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.float64)).isnan().all()
    assert torch.zeros(3).new_empty(2, 2).isnan().all()
    assert torch.empty(3, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()


def test_one_thread_and_fixed_seeds():
    assert torch.get_num_threads() == 1
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(3))


def test_annotated_shapes_are_checked_and_an_int_is_a_float():
    with pytest.raises(TypeCheckError):
        orders.inverse(torch.zeros(2, 2, dtype=torch.int64))
    assert TokenLayout(grid=(2, 2)).token_at(1, 1.5) == 3


def test_hints_that_only_mypy_can_check_are_let_through():
    class Speaks(Protocol):
        def speak(self) -> str: ...

    class Dog:
        @check
        def speak(self, to: Speaks | None, times: int) -> Self:
            return self

    assert Dog().speak(to=Dog(), times=2)
    with pytest.raises(TypeError):
        Dog().speak(to=None, times="2")
