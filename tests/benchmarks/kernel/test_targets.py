import pytest
import torch

from benchmarks.kernel.targets import Run, figures
from tests.benchmarks.kernel.cases import CEILINGS, attention, row

GPU = torch.device("cuda", 0)  # named only; nothing runs on it
VMAMBA = "vmamba_tiny_s1l8"
ERRORS = {("fused", "float32"): 3e-7, ("blocked", "float32"): 2e-7, ("fused", "bfloat16"): 2e-7,
          ("blocked", "bfloat16"): 4e-7}  # fmt: skip


def rows(backend="fused"):
    return [
        row("attention added", "timm", 9.0, "deit_tiny_patch16_224"),
        row("attention added", backend, 0.005),
        row("attention added", backend, 0.006, VMAMBA),
        attention(backend, 0.004),
        attention(backend, 0.003, VMAMBA),
        attention("blocked", 0.1) if backend != "blocked" else row("forward", backend, 1.0),
        attention("blocked", 0.06, VMAMBA) if backend != "blocked" else row("forward", backend, 1.0, VMAMBA),
        row("scan", backend, 0.001),
        row("scan", "mamba-ssm", 0.002),
    ]


def test_without_a_gpu_no_figure_has_a_number():
    found = figures(Run(torch.device("cpu"), rows(), ERRORS))
    assert len(found) == 6
    for each in found:
        assert each["value"] is each["quartiles"] is each["met"] is None
        assert each["reason"].startswith("not measured: this run was on the CPU")


def test_on_a_gpu_they_come_from_the_rows():
    found = figures(Run(GPU, rows(), ERRORS))
    assert [each["value"] for each in found] == pytest.approx([5, 6, found[2]["value"], 20, 0.5, 1.5])
    assert [each["met"] for each in found][:2] == [True, False]
    assert [each["met"] for each in found][3:] == [True, True, True]
    assert all(each["reason"] is None and each["how"].startswith("fused") for each in found)
    assert found[0]["quartiles"] == pytest.approx([4.5, 5.5])
    assert VMAMBA in found[3]["how"]  # 20 x there, 25 x for Vim
    assert found[5]["how"] == "fused, float32"


def test_the_fraction_is_the_worst_of_what_fills_the_gpu():
    found = figures(Run(GPU, rows(), ERRORS))[2]
    small = attention("fused", 0.004)  # 8 x 197 fills nothing
    long = attention("fused", 0.003, VMAMBA)
    filled = [shape for shape in long.shapes if 8 * shape.scans.length >= 8 * 784]
    assert len(filled) == 2
    assert found["value"] == pytest.approx(long.fraction)
    assert "worst of 2" in found["how"]
    only = figures(Run(GPU, [row("attention added", "fused", 1.0), small], ERRORS))[2]
    assert (only["value"], only["reason"]) == (None, "not measured: no such size was measured in this run")


def test_a_row_that_failed_gives_its_reason_to_the_figure():
    failed = [row("attention added", "fused", None, reason="out of memory (x)"), *rows()[2:]]
    assert figures(Run(GPU, failed, ERRORS))[0]["reason"] == "not measured: out of memory (x)"
    found = figures(Run(GPU, rows()[:-1], ERRORS))[4]
    assert found["reason"] == "not measured: this size was not part of the run"
    absent = [*rows()[:-1], row("scan", "mamba-ssm", None, reason="mamba-ssm's scan does not import here")]
    assert figures(Run(GPU, absent, ERRORS))[4]["reason"] == "not measured: mamba-ssm's scan does not import here"


def test_the_pytorch_path_is_not_compared_with_itself():
    found = figures(Run(GPU, rows("blocked"), ERRORS))
    assert found[0]["value"] == 5
    assert found[0]["how"] == "blocked"
    assert [each["value"] for each in found[3:6:2]] == [None, None]
    assert "the vectorised PyTorch path itself" in found[3]["reason"]


def test_tf32_is_said():
    assert figures(Run(GPU, rows(), ERRORS, tf32=True))[0]["how"] == "fused, TF32 on"
    assert CEILINGS.exact > CEILINGS.float32
