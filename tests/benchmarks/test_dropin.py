"""The drop-in benchmark on a model of our own in the place of a repository's."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mamba_attn
from benchmarks import dropin, dropin_page
from benchmarks.case import Case, build
from benchmarks.marked_pages import filled

VIM = {"image_size": (24, 40), "depth": 2, "embed_dim": 16, "num_classes": 5}


def vim() -> nn.Module:
    return mamba_attn.models.create("vim_micro", **VIM)


def test_a_case_is_measured_and_its_parameters_are_moved() -> None:
    case = Case("VisionMamba", "small", vim, (2, 3, 24, 40))
    model, inputs = build(case)
    assert inputs.shape == (2, 3, 24, 40)
    assert not torch.equal(model.layers[0].mixer.A_log, model.layers[1].mixer.A_log)  # they start alike
    row = dropin.measure(case)
    assert row["layers"] == 2
    assert 0 < row["law 1"] <= 1e-5
    assert row["output"] <= 1e-5
    assert row["observed"] is True
    assert row["above diagonal"] == 0


class Compiled(nn.Module):
    """Refused for another reason than the one expected."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_what_must_be_refused_must_be_refused_for_that_reason() -> None:
    found = dropin.measure(Case("Other", "", Compiled, (2, 2), refused="no layer that can be traced"))
    assert "Families known" in found["refused"]
    with pytest.raises(SystemExit, match="expected 'rope'"):
        dropin.measure(Case("Other", "", Compiled, (2, 2), refused="rope"))
    with pytest.raises(SystemExit, match="was not refused"):
        dropin.measure(Case("VisionMamba", "", vim, (2, 3, 24, 40), refused="rope"))


def test_the_same_weights_give_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    create, official = mamba_attn.models.create, vim()
    monkeypatch.setattr(mamba_attn.models, "create", lambda name, **options: create(name, **{**VIM, **options}))
    found = dropin.same_weights(official, "vim_micro", (24, 40))
    assert found == {"logits": 0.0, "matrices": 0.0, "layers": 2}


def test_folders_without_clones_are_said() -> None:
    with pytest.raises(SystemExit, match=r"no clone of any of JCruan519/VM-UNet"):
        dropin.run_dropin(
            argparse.Namespace(checkouts=Path("nowhere"), only=["JCruan519/VM-UNet"], quick=False, rows=None, cases="")
        )
    with pytest.raises(SystemExit, match=r"unknown.*MzeroMiko/VMamba"):
        dropin.run_dropin(
            argparse.Namespace(checkouts=Path("nowhere"), only=["unknown"], quick=False, rows=None, cases="")
        )


@pytest.mark.full
def test_the_command_runs_what_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/run.py", "dropin", "--checkouts", str(tmp_path), "--only", "timm", "--quick"]
    root = Path(dropin.__file__).parents[1]
    child = subprocess.run([*command, "--out", str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    contents = json.loads((tmp_path / "dropin.json").read_text())
    assert contents["quick"] is True
    (row,) = contents["details"]["rows"]
    assert row["repository"] == "timm"
    assert row["law 1"] <= 1e-5


def test_the_page_has_the_table_of_the_results() -> None:
    page = dropin_page.PAGE.read_text()
    assert filled(page, dropin_page.PARTS, json.loads(dropin_page.RESULTS.read_text())) == page


def test_a_repository_s_line_and_sentences() -> None:
    maps = {"RawAttention": "2x1x8x8", "AttentionRollout": "2x1x8x8"}
    none = {**maps, "RawAttention": "TraceError: no place"}
    row = {"repository": "a/b", "commit": "c", "variant": "", "input": ""}
    rows = [
        {**row, "class": "A", "layers": 2, "tokens": [4, 16], "law 1": 1e-7, "maps": maps},
        {**row, "class": "B", "layers": 1, "tokens": [64], "law 1": 3e-7, "maps": none},
        {**row, "class": "C", "refused": "another\nrecurrence"},
    ]
    results = {"details": {"rows": rows}}
    line = "| [a/b](https://github.com/a/b) | A, B, C (2 traced, 1 refused) | 3 | 4 to 64 | 3e-07 | 1 of 2 | 2 of 2 |"
    assert dropin_page.ran(results).splitlines()[2] == line
    assert dropin_page.without_maps(results) == "- a/b, raw attention, B: no place"
    assert dropin_page.sentences(results) == "- a/b, C: another recurrence"


def test_what_fails_is_a_row_of_the_table() -> None:
    class Broken(nn.Module):
        """Its scan cannot be traced."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    row = dropin.measure(Case("Broken", "", Broken, (2, 3, 4)))
    assert "has no layer that can be traced" in row["failed"]
    assert "law 1" not in row


def test_results_of_other_repositories_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"commit": "1", "class": "A", "variant": "", "layers": 1, "law 1": 1e-8, "output": 0.0, "observed": True}
    rows = [{**old, "repository": name} for name in ("timm", "hustvl/Vim", "gone/away")]
    path = tmp_path / "dropin.json"
    path.write_text(json.dumps({"details": {"rows": rows, "same weights": {}}}))
    monkeypatch.setattr(dropin, "RESULTS", path)
    again = {"commit": "2", "rows": [{**old, "law 1": 2e-8}], "pairs": {}}
    monkeypatch.setattr(dropin, "_in_a_process", lambda *_: again)
    arguments = argparse.Namespace(checkouts=tmp_path, only=["timm"], quick=False, rows=None, cases="")
    _, details = dropin.run_dropin(arguments)
    found = {(row["repository"], row["law 1"]) for row in details["rows"]}
    assert found == {("hustvl/Vim", 1e-8), ("timm", 2e-8)}
    arguments.cases = "other"  # a case that the old row is not
    _, details = dropin.run_dropin(arguments)
    assert [row["law 1"] for row in details["rows"] if row["repository"] == "timm"] == [1e-8, 2e-8]


def test_what_the_page_says_of_costs_was_measured() -> None:
    page = " ".join(dropin_page.PAGE.read_text().partition("What it costs (")[2].split())
    figures = json.loads((dropin.RESULTS.parent / "doors.json").read_text())["figures"]

    def measured(what: str, *models: str) -> list[float]:
        found = {row["how"]: row["value"] for row in figures if row["what"].startswith(what)}
        return [found[name] for name in models]

    vmamba, vim = "vmamba_tiny_s1l8", "vim_tiny"
    passes = measured("other people's models traced", vmamba, vim, "vit_small_patch16_224")
    assert (
        "{:.2f} times the model's own for VMamba-Tiny, {:.2f} for Vim-Tiny and {:.2f} for ViT".format(*passes) in page
    )
    assert "VMamba-Tiny's orders takes {:.1f} s".format(*measured("the orders", vmamba)) in page
    looks = measured("the look", vmamba, vim)
    assert "the look ahead {:.1f} forwards of VMamba-Tiny and {:.1f} of Vim-Tiny".format(*looks) in page
