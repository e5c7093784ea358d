import json
import sys
import time

import pytest
import torch

from benchmarks import cases, measure, report, run, verify
from benchmarks.cases import Shape
from benchmarks.kernel.timing import cpu_seconds
from benchmarks.measure import Spread, interleave, paired, peak_memory, slope


def allocation(megabytes):
    """A call that holds so much memory at its highest, and half of it at its end; for the child process."""
    count = megabytes * 2**20 // 4

    def call():
        first, second = torch.ones(count // 2), torch.ones(count // 2)
        return first + 0 * second[0]

    return call


def _busy(seconds):
    def call():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return call


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5, 1)


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave(calls, rounds=2, least_seconds=0)
    assert "".join(order) == "aabb" + "abab"  # once untimed and once to count repeats, then in turn
    assert {name: len(sample) for name, sample in times.items()} == {"a": 2, "b": 2}


def test_a_slow_call_runs_once_and_only_once():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("fast", "slow")}
    times = interleave(calls, rounds=3, least_seconds=0, once=("slow",))
    assert order.count("slow") == len(times["slow"]) == 1


def test_times_are_cpu_times_per_call():
    times = interleave({"busy": _busy(0.004), "asleep": lambda: time.sleep(0.004)}, rounds=3, least_seconds=0)
    assert Spread.of(times["busy"]).median == pytest.approx(0.004, rel=0.5)
    assert Spread.of(times["asleep"]).median < 0.002


def test_ratios_are_paired_by_round():
    assert paired([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == Spread(2.0, 2.0, 2.0, 3)
    assert paired([8.0], [1.0, 2.0, 4.0]).median == 4.0
    assert paired([1.0, 2.0, 4.0], [2.0]).median == 1.0


def test_slope_of_a_power_law():
    x = [1024, 4096, 65536]
    assert slope(x, [3 * n**1.5 for n in x]) == pytest.approx(1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call_at_its_highest():
    measured = peak_memory("tests.benchmarks.test_measure:allocation", megabytes=200)
    assert measured == pytest.approx(300 * 2**20, rel=0.05)  # two halves and their sum


def test_a_failing_child_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)peak_memory\('benchmarks.cases:nothing', \{\}\) failed.*no attr"):
        peak_memory("benchmarks.cases:nothing")


def test_the_machine_is_named():
    header = measure.machine()
    assert header["torch"] == torch.__version__
    assert header["cores"] >= 1
    assert header["cpu"]


@pytest.mark.parametrize("backend", ["blocked", None])
def test_an_exact_result_passes_the_gate(backend):
    values = cases.inputs(Shape(3, 4, 21), 10.0)
    error = verify.term_error(cases.attention(Shape(3, 4, 21), backend, 10.0)(), *values)
    assert 0 < error < 1e-6
    verify.require_exact("ours", error)


def test_one_wrong_entry_is_seen():
    values = cases.inputs(Shape(3, 4, 21))
    right = cases.attention(Shape(3, 4, 21))()
    wrong = right.clone()
    wrong[0, 20, 3] *= 1.001
    assert verify.term_error(wrong, *values) > 5e-5
    with pytest.raises(SystemExit, match="no speed reported"):
        verify.require_exact("ours", verify.term_error(wrong, *values))
    acausal = right.clone()
    acausal[0, 3, 4] = 1e-30
    assert verify.term_error(acausal, *values) == float("inf")
    with pytest.raises(SystemExit, match="no speed reported"):
        verify.require_exact("ours", float("nan"))


def test_inputs_are_those_of_a_mamba_layer():
    delta, A, B, C = cases.inputs(Shape(64, 4, 50), 10.0)
    assert delta.shape == (1, 64, 50)
    assert 7e-3 < (delta / 10).log().mean().exp() < 1.4e-2  # log-uniform in 1e-3..1e-1
    assert torch.equal(A, torch.tensor([-1.0, -2, -3, -4]).expand(64, 4))
    assert B.shape == C.shape == (1, 4, 50)
    assert torch.equal(cases.inputs(Shape(64, 4, 50), 10.0)[0], delta)


def test_the_tables_say_whether_a_figure_is_met(tmp_path, capsys):
    figures = [
        report.figure("loop", "native", Spread.of([90.0, 100.0, 110.0])),
        report.figure("error", "blocked", 2e-5),
    ]
    report.finish("ops", figures, {"raw": Spread.of([1.0])}, tmp_path / "new" / "ops.json", quick=False)
    written = json.loads((tmp_path / "new" / "ops.json").read_text())
    assert [row["met"] for row in written["figures"]] == [True, False]
    assert written["figures"][0]["value"] == 100
    assert written["figures"][0]["quartiles"] == [95, 105]
    assert written["details"]["raw"]["median"] == 1
    printed = capsys.readouterr().out
    assert "100 x" in printed
    assert "2e-05" in printed


@pytest.mark.full
def test_the_operators_are_measured_from_end_to_end(monkeypatch, tmp_path):
    shape = Shape(3, 2, 9)
    monkeypatch.setattr(run, "peak_memory", lambda function, length, **_: 1000 * length)
    figures, details = run.measure_speed(shape, 2)
    assert {item.how for item in figures} == set(cases.usable_backends())
    assert details["error"]["loop"] < 1e-6
    found, lines = run.measure_lines(shape, (8, 16, 32), 1)
    assert len(lines["row"]["seconds"]) == 3
    assert [item.spread.median for item in found if item.target.endswith("memory")] == pytest.approx([1, 1])
    errors, rows = run.measure_errors((shape,))
    assert all(item.spread.median < 1e-6 for item in errors)
    assert len(rows["rows"]) == len(cases.SCALES)
    assert {item.target for item in figures + found + errors} <= set(cases.TARGETS)


@pytest.mark.full
def test_the_models_are_measured_from_end_to_end(monkeypatch):
    peaks = {False: 1000, True: 1500}
    monkeypatch.setattr(run, "peak_memory", lambda function, attention, **_: peaks[attention])
    figures, details = run.measure_model("vmamba_tiny_s1l8", 64, 1)
    assert [item.target.removeprefix("vmamba_tiny_s1l8") for item in figures] == ["", " attention", " memory"]
    assert figures[2].spread.median == 500
    assert details["matrices"] == [(1, n, n) for n in (256,) * 2 + (64,) * 2 + (16,) * 8 + (4,) * 2]
    assert set(details["milliseconds"]) == {"transformer", "plain", "attention"}


@pytest.mark.full
def test_attribution_is_measured_beside_a_pass(monkeypatch):
    monkeypatch.setattr(run, "peak_memory", lambda function, what, **_: len(what))
    figures, details = run.measure_attribution("vmamba_micro", 32, (2,), 1)
    (row,) = (item.row() for item in figures)
    assert row["what"] == "vmamba_micro: MambaAttribution's row form / one forward + backward"
    found = details["batch 2"]
    assert list(found) == ["forward", "forward + backward", "rows", "dense", "signed"]
    ratio = found["rows"]["milliseconds"].median / found["forward + backward"]["milliseconds"].median
    assert row["value"] == pytest.approx(ratio)
    assert all(each["peak_bytes"] == len(what) for what, each in found.items())


def test_maps_of_one_pass_are_measured_against_the_dearest_of_them(monkeypatch):
    monkeypatch.setattr(run.cases, "EXPLAINED", ("vmamba_micro",))
    monkeypatch.setattr(run, "interleave", lambda calls, _: {name: [cpu_seconds(call)] for name, call in calls.items()})
    figures, details = run.run_passes(quick=True)
    assert [item.target for item in figures] == ["vmamba_micro one pass"] * 2
    for item, found in zip(figures, details.values(), strict=True):
        times = {name: spread.median for name, spread in found["milliseconds"].items()}
        alone = [value for name, value in times.items() if name != "one pass"]
        assert times[found["dearest"]] == max(alone)
        assert item.row()["value"] > 0
        assert len(alone) == 3


def test_results_are_written_with_lists_of_numbers_on_one_line():
    contents = {"a": [1.5, None, 2], "b [x,  y]": ["[1, 2]", [3, 4]], "c": {"d": []}, "e": [{"f": [[1, 2], [3, 4]]}]}
    text = report.written(contents)
    assert json.loads(text) == contents
    assert '"a": [1.5, null, 2]' in text
    assert len(text.splitlines()) < len(json.dumps(contents, indent=2).splitlines())
