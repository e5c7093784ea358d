import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernel import calls, estimates, measuring
from benchmarks.kernel.calls import loop_rows, subjects
from benchmarks.kernel.ceilings import Ceilings
from benchmarks.kernel.measuring import Bench, Guarded, measure, skip
from benchmarks.kernel.subjects import Configuration, Model, Subject, Unavailable, grid
from mamba_attn import ops
from mamba_attn.errors import MambaAttnError
from mamba_attn.ops.blocked import Blocked

CPU = torch.device("cpu")
FAST = Ceilings(copy=1e12, exponentials=1e12, float32=1e14)
SMALL = Configuration("vim_micro", 32, 2)  # 17 tokens


@pytest.fixture
def bench():
    return Bench(CPU, FAST, budget=30.0, rounds=2)


@pytest.fixture(scope="module")
def model():
    return Model(SMALL, CPU)


def of(rows, what, how):
    (found,) = [row for row in rows if (row.what, row.how) == (what, how)]
    return found


def test_a_configuration_from_end_to_end(bench, model):
    rows = measure(model, 2, bench)
    assert [row.what for row in rows[:3]] == ["forward", "forward + attention", "attention added"]
    expected = {"VMamba's formula", "published loops", *(name for name in ops.BACKENDS if name != "reference")}
    assert {row.how for row in rows if row.what == "attention"} == expected
    blocked, loops = of(rows, "attention", "blocked"), of(rows, "attention", "published loops")
    assert blocked.seconds.count == 2
    assert blocked.seconds.median == pytest.approx(blocked.shapes[0].seconds, rel=0.5)
    assert blocked.shapes[0].scans.layers == 12
    assert 0 < blocked.fraction < 1
    assert [row.extrapolated[:12] for row in rows if row.extrapolated] == ["extrapolated"]
    assert loops.extrapolated
    assert of(rows, "scan", "mamba-ssm").reason == "mamba-ssm's scan has no CPU path"
    for row in rows:
        assert (row.floor is not None) == (row.seconds is not None and row.what.startswith("attention"))


def test_half_precision_and_several_shapes(bench):
    its = Configuration("vmamba_micro", 32, 1, "bfloat16")
    rows = measure(Model(its, CPU), 1, bench)
    assert of(rows, "attention", "blocked").its.dtype == "bfloat16"
    assert len(of(rows, "attention", "blocked").shapes) == 4
    assert of(rows, "forward + attention", Model(its, CPU).backend).seconds


def test_a_transformer_stands_beside_them(bench):
    rows = measure(Model(Configuration("deit_tiny_patch16_224", 32, 1), CPU), 1, bench)
    assert [(row.what, row.how) for row in rows] == [
        ("forward", "timm"), ("forward + attention", "timm"), ("attention added", "timm"),
    ]  # fmt: skip
    assert all(row.seconds and row.floor is None for row in rows)


def test_every_call_computes_what_it_says(model):
    found = {(each.what, each.how): each for each in subjects(model, 2)}
    record = model.records(2)[0]
    assert record.batch == 2
    expected = ops.hidden_attention(record, backend="reference")
    for name in ("blocked", model.backend):
        torch.testing.assert_close(found["attention", name].parts[0].make()(), expected, rtol=1e-4, atol=1e-6)
    formula = found["attention", "VMamba's formula"].parts[0].make()()
    each = ops.hidden_attention(record.delta, record.A, record.B[:, :, 0], record.C[:, :, 0], backend="reference")
    for route in range(2):
        torch.testing.assert_close(formula[route], each[:, route], rtol=1e-3, atol=1e-5)
    loops = found["attention", "published loops"].parts[0].make()()
    rows = loop_rows(17)
    torch.testing.assert_close(loops.mean(1), each[:, 0, rows, : rows[-1] + 1], rtol=1e-4, atol=1e-6)
    y = found["scan", model.backend].parts[0].make()()
    truth = ops.selective_scan(record.u, record.delta, record.A, record.B[:, :, 0], record.C[:, :, 0], record.D)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
    logits, matrices = found["forward + attention", model.backend].parts[0].make()()
    torch.testing.assert_close(logits, found["forward", model.backend].parts[0].make()(), rtol=1e-3, atol=1e-4)
    assert [tuple(matrix.shape) for matrix in matrices] == [(2, 17, 17)] * 12


def test_the_loops_of_all_layers_are_those_of_few_rows_times_their_products(model):
    (part,) = next(each for each in subjects(model, 2) if each.how == "published loops").parts
    products = sum(row - column for row in range(17) for column in range(row + 1))
    few = sum(row - column for row in loop_rows(17) for column in range(row + 1))
    assert part.times == pytest.approx(12 * 2 * products / few)


@pytest.mark.parametrize("length", [2, 3, 17, 160, 197, 5000])
def test_the_rows_of_the_loops(length):
    rows = loop_rows(length)
    assert rows == sorted(set(rows))
    assert 0 <= rows[0] <= rows[-1] < min(length, calls.LOOP_LENGTH)
    assert len(rows) == min(4, length)


def test_what_cannot_fit_the_memory_is_not_tried(bench, monkeypatch):
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 22_000_000_000)
    its = Model(Configuration("vmamba_tiny_s1l8", 1024, 64), CPU)
    monkeypatch.setattr(its, "records", lambda batch: pytest.fail("it was tried"))
    monkeypatch.setattr(its, "images", lambda batch: pytest.fail("it was tried"))
    assert estimates.kept_bytes(its, 64) > 2 * 64 * 65536**2 * 4
    found = {each.what: skip(each, bench) for each in subjects(its, 64)}
    assert found["forward + attention"].startswith("would need 4.")
    assert found["forward + attention"].endswith(" TB, 22 GB are free")


def test_what_cannot_fit_the_budget_is_not_tried(bench, monkeypatch):
    subject = Subject("attention", "x", least=estimates.counting.Work(0, 4 * 10**15, 0, 0))
    assert skip(subject, bench) == "over the time budget of 30 s; a call would take 40 s or more"
    quick = Subject("attention", "x", least=estimates.counting.Work(0, 10**14, 0, 0))
    assert skip(quick, bench) == ""
    bench.learn(quick, 20.0)  # twenty times its floor
    assert skip(quick, bench) == "over the time budget of 30 s; a call would take 20 s or more"
    assert skip(Subject("scan", "x", least=quick.least), bench) == ""  # another kind of row


def test_a_row_that_fails_leaves_the_others(bench, model, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 95 GiB.\nmore")

    monkeypatch.setattr(calls, "vmamba_formula", fail)
    rows = measure(model, 1, bench)
    failed = of(rows, "attention", "VMamba's formula")
    assert failed.reason == "out of memory (CUDA out of memory. Tried to allocate 95 GiB)"
    assert failed.seconds is None
    assert of(rows, "attention", "blocked").seconds


def test_a_wrong_backend_gets_no_time(model):
    bench = Bench(CPU, FAST, 30.0, 1, {("blocked", "float32"): "error 0.1 is too much"})
    rows = measure(model, 1, bench)
    assert of(rows, "attention", "blocked").reason == "error 0.1 is too much"
    assert of(rows, "attention", "VMamba's formula").seconds


def test_a_failed_call_is_not_called_again():
    count = []

    def call():
        count.append(1)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    guarded = Guarded(call)
    guarded()
    guarded()
    assert len(count) == 1
    assert guarded.problem.startswith("out of memory (DefaultCPUAllocator")
    other = Guarded(lambda: (_ for _ in ()).throw(MambaAttnError("no kernel here; do this.")))
    other()
    assert other.problem == "no kernel here; do this"
    with pytest.raises(TypeError, match="a mistake"):
        Guarded(lambda: (_ for _ in ()).throw(TypeError("a mistake")))()


def test_a_missing_package_is_the_rows_reason(bench, monkeypatch):
    def absent(its):
        raise ImportError("timm is not installed: pip install 'mamba_attn[timm]'")

    monkeypatch.setattr("benchmarks.kernel.subjects._transformer", absent)
    rows = measure(Model(Configuration("deit_tiny_patch16_224", 32, 1), CPU), 1, bench)
    assert {row.reason for row in rows} == {"timm is not installed: pip install 'mamba_attn[timm]'"}


def test_mamba_ssm_gets_the_tensors_that_it_knows(model, monkeypatch):
    seen = []

    def selective_scan_fn(u, delta, A, B, C, D):  # as documented there: routes are its groups
        seen.append([tuple(x.shape) for x in (u, delta, A, B, C, D)])

    interface = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    subject = next(each for each in subjects(model, 2) if each.how == "mamba-ssm")
    with pytest.raises(Unavailable, match="no CPU path"):
        subject.parts[0].make()
    records = model.records(2)
    elsewhere = Model(SMALL, torch.device("cuda"))  # nothing of it is built
    calls._mamba_ssm(elsewhere, 2, lambda: records).parts[0].make()()
    assert seen == [[(2, 512, 17), (2, 512, 17), (512, 8), (2, 2, 8, 17), (2, 2, 8, 17), (512,)]]


def test_the_grid_keeps_the_batches_of_a_model_together():
    found = grid(["b", "a"], [512, 224], [8, 1], ["float32", "bfloat16"])
    assert len(found) == 16
    assert found[:3] == [
        Configuration("b", 224, 1), Configuration("b", 224, 8), Configuration("b", 224, 1, "bfloat16"),
    ]  # fmt: skip
    model = Model(SMALL, CPU)
    assert model.fits(Configuration("vim_micro", 32, 64))
    assert not model.fits(Configuration("vim_micro", 64, 2))


def test_a_backend_that_is_added_gets_its_rows(bench, model, monkeypatch):
    class New(Blocked):
        def __init__(self, reason):
            self.reason = reason

        def unavailable(self, record):
            return self.reason

    monkeypatch.setitem(ops.BACKENDS, "new", New(None))
    monkeypatch.setitem(ops.BACKENDS, "absent", New("no driver was found; install one."))
    rows = measure(model, 1, bench)
    assert of(rows, "attention", "new").seconds
    assert of(rows, "attention", "absent").reason == "no driver was found; install one"
