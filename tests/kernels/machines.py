"""Where the kernels run in tests: on the host, as source and as NVRTC's PTX; and on a CUDA device where there is one.

These tests need torch, numpy, einops, jaxtyping and pytest alone, so that they run on a bare GPU machine:
``python -m pytest -c /dev/null --rootdir=. --noconftest tests/kernels -k device``.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from mamba_attn.ops.cuda import operators
from mamba_attn.ops.cuda.launcher import LAUNCHER, Launcher
from tests.emulation import Emulator, emulated
from tests.ptx import Ptx

HOSTS = ("host", "ptx")
ROUGH = pytest.param("ptx-rough", marks=pytest.mark.full)  # as inexact as the ISA lets a device be
MACHINES = (*HOSTS, ROUGH, *(("device",) if torch.cuda.is_available() else ()))
EX2 = 2.0**-22  # relative error of ex2.approx that the PTX ISA allows; the host's exp2f is rounded correctly


@dataclass
class Recorder:
    """A launcher that remembers what it launched.

    Args:
        launcher: that does the work.
        unit: relative error that one exponential of this machine may have beyond rounding.
        launched: names of kernels.
    """

    launcher: Launcher
    unit: float = 0.0
    launched: list[str] = field(default_factory=list)

    def problem(self, device: torch.device) -> str | None:
        return self.launcher.problem(device)

    def multiprocessors(self, device: torch.device) -> int:
        return self.launcher.multiprocessors(device)

    def shared_limit(self, device: torch.device) -> int:
        return self.launcher.shared_limit(device)

    def launch(
        self, name: str, grid: int, block: int, shared_bytes: int, arguments: ctypes.Structure, device: torch.device
    ) -> None:
        self.launched.append(name)
        self.launcher.launch(name, grid, block, shared_bytes, arguments, device)


@contextmanager
def machine(name: str, **options: int) -> Iterator[Recorder]:
    """Run backend="fused" there; tensors made inside lie there.

    Args:
        name: one of HOSTS, "ptx-rough" or "device".
        options: of the emulator; a device is what it is.
    """
    if name.startswith("ptx") and sys.platform != "linux":
        pytest.skip("the tests' own NVRTC is a Linux package")
    rough = {"rough": 1.0} if name == "ptx-rough" else {}
    with emulated((Ptx if name.startswith("ptx") else Emulator)(**options, **rough)) as emulator:
        device = name == "device"
        recorder = Recorder(LAUNCHER if device else emulator, EX2 if device or rough else 0.0)
        operators.launcher = recorder
        with torch.device("cuda" if device else "cpu"):
            yield recorder
