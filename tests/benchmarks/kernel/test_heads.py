"""The layer folded per head against its channels spelt out: measured in turn, and only where both agree."""

import pytest

from benchmarks.cases import TARGETS
from benchmarks.kernel import heads


@pytest.fixture
def small(monkeypatch):
    for name, value in {"HEADS": 2, "WIDTH": 3, "STATES": 4, "LENGTHS": (64,)}.items():
        monkeypatch.setattr(heads, name, value)


@pytest.mark.full
def test_every_call_is_measured_in_both_forms(small, capsys):
    figures, details = heads.run_heads(quick=True)
    assert [item.how for item in figures] == ["fold mean, native", "fold gradient, native"]
    assert {item.target for item in figures} <= set(TARGETS)
    assert details["left product, L 64"]["times faster"].count == 2
    assert "gradient row" in capsys.readouterr().out


def test_a_wrong_fold_gets_no_speed(small, monkeypatch):
    truth = heads.spelt_out
    monkeypatch.setattr(heads, "spelt_out", lambda record: truth(record.replace(A=1.1 * record.A)))
    with pytest.raises(SystemExit, match="mean: error"):
        heads.run_heads(quick=True)
