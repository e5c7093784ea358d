"""The README says what is true: its numbers come from results, its code runs, its links lead somewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import thumbnails
from mamba_attn import attribution
from mamba_attn.models import create, registry

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


@pytest.mark.parametrize(("page", "least"), [("README.md", 4), ("docs/results.md", 10)])
def test_every_figure_is_a_measured_one(page: str, least: int) -> None:
    table = (ROOT / page).read_text().split("<!-- figures:")[1].split("<!-- end of figures -->")[0]
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
    assert len(rows) >= least
    for what, value in rows.items():
        assert measured.get(what) == value, f"{what}: {page} says {value}, the results {measured.get(what)}"


def test_accuracies_are_those_of_the_cards() -> None:
    for name in registry.demos():
        kind = name.rpartition("_")[2]
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `vim_{kind}`")]
        assert f"`{name}` {registry.demo_card(name)['top1']:.1f} %" in row


def test_the_example_has_six_lines_with_the_model_in_the_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    lines = code.splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("model = ")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["answer"].best(3)) == 3
    assert str(names["answer"].best(3)) in capsys.readouterr().out
    assert {"index.html", "clothing_t-shirt_1.png"} <= {path.name for path in (tmp_path / "maps").iterdir()}


def test_the_calls_that_it_recommends_are_calls() -> None:
    table = README.split("## Which method should I use")[1].split("## Models")[0]
    calls = re.findall(r"`(\w+)\(model\)\.attribute\(images(, target)?\)`", table)
    assert [name for name, _ in calls] == ["RawAttention", "MambaAttribution", "MambaLRP", "MaskRefinement"]
    model, images = create("vim_digits", weights="demo"), torch.rand(2, 3, 64, 64)
    for name, target in calls:
        method = getattr(attribution, name)(model)
        assert method.attribute(images, *([3] if target else [])).shape == (2, 1, 64, 64)


def test_its_pictures_are_small() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", README)
    assert "docs/explore.webp" in pictures
    for name in pictures:
        assert (ROOT / name).stat().st_size < 1_000_000, name
    assert {f"docs/thumbnails/{name}.png" for name in thumbnails.DRAWN} <= set(pictures)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
