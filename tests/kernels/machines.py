"""Where the kernels run in tests: always on the host, emulated; and on a CUDA device where there is one.

These tests need torch, numpy, einops and pytest alone, so that they run on a bare GPU machine:
``python -m pytest -c /dev/null --rootdir=. --noconftest tests/kernels -k device``.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mamba_attn.ops.cuda import operators
from mamba_attn.ops.cuda.launcher import LAUNCHER, Launcher
from tests.emulation import Emulator, emulated

MACHINES = ("host", *(("device",) if torch.cuda.is_available() else ()))


@dataclass
class Recorder:
    """A launcher that remembers what it launched."""

    launcher: Launcher
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
        name: one of MACHINES.
        options: of the emulator; a device is what it is.
    """
    with emulated(Emulator(**options)) as emulator:
        recorder = Recorder(emulator if name == "host" else LAUNCHER)
        operators.launcher = recorder
        with torch.device("cpu" if name == "host" else "cuda"):
            yield recorder
