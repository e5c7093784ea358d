"""torchvision is imported next to a CPU torch, whoever imports it, as soon as mamba_attn is there."""

import subprocess
import sys

import pytest

pytest.importorskip("torchvision")
PROGRAM = """
import sys, mamba_attn
assert "torch" not in sys.modules and "torchvision" not in sys.modules
import torchvision
from torchvision.transforms import v2
import torchvision.ops, torch
print(torchvision.__spec__.name, len(mamba_attn.core.torchvision_repair._declared), torch.version.cuda is None)
"""


def test_a_fresh_process_imports_it():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    name, declared, cpu = found.stdout.split()
    assert name == "torchvision"
    assert int(declared) <= (cpu == "True")


def test_other_failures_are_raised(monkeypatch):
    from mamba_attn.core import torchvision_repair

    def fails(module):
        raise RuntimeError("another reason")

    with pytest.raises(RuntimeError, match="another reason"):
        torchvision_repair._run(fails, sys)
