import json

import pytest

from benchmarks.kernel import table
from benchmarks.kernel.ceilings import Ceilings
from benchmarks.kernel.counting import Scans, Work, attention_work
from benchmarks.kernel.rows import cheapest
from tests.benchmarks.kernel.cases import CEILINGS, attention, row


def test_a_row_has_a_time_or_a_reason_never_both_and_never_neither():
    with pytest.raises(ValueError, match=r"vim_small, 224 pixels, batch 8, float32, scan, ours\): expected either"):
        row("scan", "ours", None)
    with pytest.raises(ValueError, match="expected either a time or a reason"):
        row("scan", "ours", 1.0, reason="no")


def test_what_was_not_measured_has_a_reason_and_no_number():
    written = row("attention", "fused", None, reason="would need 95 GB, 12 GB are free").as_dict()
    assert written["reason"] == "not measured: would need 95 GB, 12 GB are free"
    assert {key for key, value in written.items() if isinstance(value, int | float)} == {"pixels", "batch"}
    assert written["seconds"] is written["floor"] is written["fraction of floor"] is None
    assert written["shapes"] == []


def test_a_floor_is_the_slowest_of_memory_exponentials_and_products():
    ceilings = Ceilings(copy=10.0, exponentials=100.0, float32=1000.0, matrix={"TF32": 6000.0})
    assert ceilings.floor(Work(1, 1, 30, 20), "direct") == 5
    assert ceilings.floor(Work(700, 1, 30, 20), "direct") == 7
    assert ceilings.floor(Work(1, 9000, 30, 20), "direct") == 9
    assert ceilings.floor(Work(1, 18000, 30, 20), "factored") == 9  # TF32, three times
    assert Ceilings(10.0, 100.0, 1000.0).exact == 1000


def test_the_cheapest_formulation_is_chosen_for_every_shape():
    long, short = Scans("a", 2, 2, 197, 384, 16), Scans("b", 3, 4, 8, 96, 16)
    found = cheapest([long, short], 2, 4, CEILINGS)
    parts = [cheapest([each], 2, 4, CEILINGS) for each in (long, short)]
    assert [part.formulation for part in parts] == ["factored", "direct"]  # a leaf alone is direct
    assert found.formulation == "factored and direct"
    assert found.seconds == sum(part.seconds for part in parts)
    assert parts[0].seconds == CEILINGS.floor(attention_work(long, 2, "factored"), "factored")
    assert parts[0].seconds < CEILINGS.floor(attention_work(long, 2, "direct"), "direct") / 5
    assert found.work.flops == sum(part.work.flops for part in parts)


def test_the_fraction_is_the_floor_over_the_time():
    found = attention("fused", 0.004)
    assert found.fraction == found.floor.seconds / 0.004
    assert found.as_dict()["fraction of floor"] == found.fraction
    assert row("forward", "fused", 0.1).fraction is None


def test_the_table_marks_what_was_extrapolated(capsys):
    rows = [attention("blocked", 0.5), attention("published loops", 3000.0, extrapolated="from rows 20, 60 ..."),
            row("scan", "mamba-ssm", None, reason="it is not installed"),
            row("scan", "mamba-ssm", None, batch=1, reason="it is not installed")]  # fmt: skip
    table.show_rows(rows, [], CEILINGS)
    lines = capsys.readouterr().out.splitlines()
    (loops,) = [line for line in lines if "published loops" in line]
    assert "~ 3e+03" in loops
    assert loops.endswith("extrapolated from a few rows")
    (blocked,) = [line for line in lines if " blocked " in line]
    assert "0.45 .. 0.55" in blocked
    assert "extrapolated" not in blocked
    (missing,) = [line for line in lines if "mamba-ssm" in line]
    assert "vim_small, 224 pixels, batch 8, float32 and 1 more  it is not installed" in missing
    assert rows[1].as_dict()["extrapolated"] == "from rows 20, 60 ..."
    assert rows[0].as_dict()["extrapolated"] is None


def test_the_file_is_json_that_any_reader_takes(tmp_path):
    rows = [attention("blocked", 0.5), row("scan", "mamba-ssm", None, reason="it is not installed")]
    found = table.contents(rows, [], CEILINGS, {"cpu": "x"}, False, {"budget": 60.0})
    table.write(tmp_path / "bench.json", found)
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(found))
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert found["details"]["ceilings"]["copy"] == 4e12
    with pytest.raises(ValueError, match="Out of range float"):
        table.write(tmp_path / "bench.json", {"value": float("inf")})


def test_the_roofline_has_a_point_per_backend_and_shape():
    rows = [attention("native", 0.1, "vmamba_tiny_s1l8"), row("forward", "native", 1.0),
            attention("published loops", 3000.0, extrapolated="some")]  # fmt: skip
    figure, rgb = table.roofline(rows, CEILINGS, "A title")
    points = {trace.name: trace for trace in figure.data}
    assert len(points["native"].x) == 4
    assert len(points["published loops (extrapolated)"].x) == 1
    shape = rows[0].shapes[0]
    assert points["native"].x[0] == shape.floor.work.flops / shape.floor.work.bytes
    assert points["native"].y[0] == shape.floor.work.flops / shape.seconds
    assert points["cheapest known way"].y[0] == shape.floor.work.flops / shape.floor.seconds
    assert "L 3136, 96 channels" in points["native"].text[0]
    assert rgb.shape == (620, 961, 3)
    assert table.roofline([row("forward", "native", 1.0)], CEILINGS, "none") is None
