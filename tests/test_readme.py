"""The README says what is true: its numbers come from results, its code runs, its links lead somewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_attn.models import registry

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def formatted(row: dict[str, Any]) -> str:
    value, unit = row["value"], row["unit"]
    if unit == "AUC points":
        sign = -1 if value < 0 else 1
        low, high = sorted(sign * end for end in row["interval"])
        return f"{'behind' if value < 0 else 'ahead'} by {abs(value):.1f} AUC points [{low:.1f}, {high:.1f}]"
    if unit == "B":
        return f"{value / 1e9:.2g} GB"
    suffix = f" {unit}" if unit in ("x", "ms") else ""
    return f"{value:.2g}{suffix}" if value < 100 else f"{value:.0f}{suffix}"


def test_every_figure_is_a_measured_one() -> None:
    table = README.split("<!-- figures:")[1].split("<!-- end of figures -->")[0]
    rows = dict(re.findall(r"^\| (?!what|-)(.+?) \| (.+?) \|$", table, flags=re.MULTILINE))
    measured = {}
    for path in sorted(RESULTS.glob("*.json")):
        contents = json.loads(path.read_text())
        assert not contents["quick"]
        for row in contents["figures"]:
            if row["value"] is None:
                continue  # not measured on this machine
            what = row["what"] + (f" ({row['how']})" if row["how"] else "")
            measured[what] = formatted(row)
    assert len(rows) >= 8
    for what, value in rows.items():
        assert measured.get(what) == value, f"{what}: the README says {value}, the results {measured.get(what)}"


def test_accuracies_are_those_of_the_cards() -> None:
    for name in registry.demos():
        kind = name.rpartition("_")[2]
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `vim_{kind}`")]
        assert f"`{name}` {registry.demo_card(name)['top1']:.1f} %" in row


def test_the_examples_run_and_have_the_shapes_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maps, matrices = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert max(len(code.splitlines()) for code in (maps, matrices)) <= 15
    names: dict[str, Any] = {}
    exec(compile(maps, "README.md", "exec"), names)
    assert names["heat"].shape == (1, 1, 128, 128)
    assert {path.name for path in tmp_path.iterdir()} == {"vmamba_micro.html", "vit_micro.html"}
    with torch.no_grad():
        exec(compile(matrices, "README.md", "exec"), names)
    assert names["layer"].attention().shape == (2, 197, 197)
    torch.testing.assert_close(names["layer"].row(98), names["layer"].attention()[:, 98], rtol=1e-4, atol=1e-7)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
