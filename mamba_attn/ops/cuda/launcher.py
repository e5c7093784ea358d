"""Launches the package's CUDA kernels; compiles and loads them once per device, and remembers why it could not."""

import ctypes
import threading
import warnings
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mamba_attn.errors import BackendUnavailableError
from mamba_attn.ops.cuda.cubins import image, targets, units
from mamba_attn.ops.cuda.driver import (
    BLOCK_LIMIT,
    GRID_LIMIT,
    MULTIPROCESSORS,
    SHARED_OPTIN,
    Driver,
    ImageRejectedError,
    Kernel,
    driver,
)
from mamba_attn.ops.cuda.nvrtc import Compiler, compiler


class Launcher(Protocol):
    """Runs kernels of the form ``extern "C" __global__ void name(const Struct arguments)``."""

    def problem(self, device: torch.device) -> str | None:
        """Return why kernels cannot run there, with the remedy, or None."""

    def multiprocessors(self, device: torch.device) -> int:
        """Return a lower bound of the blocks that can run at the same time."""

    def shared_limit(self, device: torch.device) -> int:
        """Most dynamic shared memory that a block may ask for, in bytes."""

    def launch(
        self,
        name: str,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        device: torch.device,
    ) -> None:
        """Start a kernel on the device's current stream."""


@dataclass
class _Loaded:
    """A device whose kernels are loaded."""

    driver: Driver
    context: int
    modules: tuple[int, ...]
    multiprocessors: int
    shared_limit: int
    kernels: dict[str, Kernel] = field(default_factory=dict)


class CudaLauncher:
    """The launcher of CUDA devices."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._devices: dict[int, _Loaded] = {}
        self._problems: dict[int, str] = {}
        self._warned: set[str] = set()

    def problem(self, device: torch.device) -> str | None:
        """Return why kernels cannot run on a device, or None; compiles and loads them at the first call.

        A failure is cached and warned about once; after a lack of memory the next call tries again.

        Raises:
            MambaAttnError: an earlier kernel has taken the CUDA context of this process down.
        """
        if device.type != "cuda":
            return f"it runs on CUDA devices and the tensors are on {device}; move them with .cuda()."
        problem, fresh = self._find_problem(index(device))
        if problem and fresh:
            warnings.warn(
                f"mamba_attn runs without its CUDA kernel (the slower blocked path runs): {problem}", stacklevel=2
            )
        return problem

    def multiprocessors(self, device: torch.device) -> int:
        """Number of multiprocessors of a device.

        Raises:
            BackendUnavailableError: the kernels cannot run there; see ``problem``.
        """
        return self._loaded(device).multiprocessors

    def shared_limit(self, device: torch.device) -> int:
        """Most dynamic shared memory that one block may ask for, in bytes.

        Raises:
            BackendUnavailableError: the kernels cannot run there; see ``problem``.
        """
        return self._loaded(device).shared_limit

    def launch(
        self,
        name: str,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        device: torch.device,
    ) -> None:
        """Start a kernel on the device's current stream.

        Args:
            name: of the kernel in the sources.
            grid: number of blocks, along x.
            block: threads per block, along x.
            shared_bytes: dynamic shared memory per block.
            arguments: the kernel's one argument; copied before this returns. What it points to must stay alive, and
                on this stream.
            device: of the tensors.

        Raises:
            BackendUnavailableError: the kernels cannot run there (see ``problem``), or the launch exceeds the limits
                of blocks or shared memory.
            MambaAttnError: no such kernel; or an earlier one has taken the CUDA context of this process down.
            torch.cuda.OutOfMemoryError: the driver found no memory to run it.
            ValueError: no blocks, an invalid block size, or a structure of another size than the kernel's.
        """
        loaded = self._loaded(device)
        _require_launchable(name, grid, block, shared_bytes, loaded.shared_limit)
        kernel = self._kernel(loaded, name, shared_bytes)
        size = ctypes.sizeof(arguments)
        if kernel.parameter_bytes not in (None, size):
            raise ValueError(f"launch: kernel {name!r} takes {kernel.parameter_bytes} bytes, the structure has {size}.")
        loaded.driver.launch(kernel, grid, block, shared_bytes, stream(device), arguments)

    def _find_problem(self, number: int) -> tuple[str | None, bool]:
        """Return the problem of a device, and whether a warning about it is still due."""
        with self._lock:
            if number in self._devices:
                return None, False
            if number in self._problems:
                return self._problems[number], False
            try:
                self._devices[number] = _load(number)
                return None, False
            except BackendUnavailableError as error:
                problem = self._problems[number] = str(error)
            except torch.cuda.OutOfMemoryError as error:
                problem = str(error)
            fresh = problem not in self._warned
            self._warned.add(problem)
            return problem, fresh

    def _loaded(self, device: torch.device) -> _Loaded:
        problem = self.problem(device)
        if problem:
            raise BackendUnavailableError(f"the CUDA kernels cannot run: {problem}")
        return self._devices[index(device)]

    def _kernel(self, loaded: _Loaded, name: str, shared_bytes: int) -> Kernel:
        kernel = loaded.kernels.get(name)
        if kernel is not None and shared_bytes <= kernel.shared_bytes:
            return kernel
        with self._lock:
            kernel = loaded.kernels.get(name) or loaded.driver.kernel(loaded.context, loaded.modules, name)
            loaded.kernels[name] = kernel
            if shared_bytes > kernel.shared_bytes:
                loaded.driver.allow_shared(kernel, shared_bytes)
            return kernel


LAUNCHER = CudaLauncher()


def index(device: torch.device) -> int:
    """Return the number of a CUDA device, as the driver and torch count; "cuda" is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def stream(device: torch.device) -> int:
    """Handle of the stream that torch is working on."""
    return torch.cuda.current_stream(device).cuda_stream


def capability(number: int) -> tuple[int, int]:
    """Compute capability of a device, (9, 0)."""
    return torch.cuda.get_device_capability(number)


def torch_problem() -> str | None:
    """Return why this torch cannot use CUDA, or None."""
    if torch.version.hip:
        return "this torch is built for ROCm and the kernels are CUDA's. Use backend='blocked'."
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch."
    return None


def _load(number: int) -> _Loaded:
    """Compile the sources for a device and load them: its machine code, or PTX where the driver refuses that."""
    problem = torch_problem()
    if problem:
        raise BackendUnavailableError(problem)
    cuda, nvrtc = driver(), compiler()
    context = cuda.primary_context(number)
    refusal: ImageRejectedError | None = None
    for target in targets(capability(number), nvrtc.architectures):
        try:
            modules = tuple(cuda.load(context, image(unit, target, nvrtc)) for unit in units())
        except ImageRejectedError as error:
            refusal = error
        else:
            blocks, shared = (cuda.attribute(number, attribute) for attribute in (MULTIPROCESSORS, SHARED_OPTIN))
            return _Loaded(cuda, context, modules, blocks, shared)
    raise BackendUnavailableError(_versions(cuda, nvrtc) + str(refusal))


def _versions(cuda: Driver, nvrtc: Compiler) -> str:
    supported, compiled = ("{}.{}".format(*version) for version in (cuda.version(), nvrtc.version))
    return f"the driver supports CUDA {supported} and the kernels were compiled by NVRTC {compiled} ({nvrtc.path}): "


def _require_launchable(name: str, grid: int, block: int, shared_bytes: int, shared_limit: int) -> None:
    if grid < 1 or not 1 <= block <= BLOCK_LIMIT or shared_bytes < 0:
        raise ValueError(
            f"launch: kernel {name!r} got grid={grid}, block={block}, shared_bytes={shared_bytes}; expected at "
            f"least one block, 1 to {BLOCK_LIMIT} threads and no negative size."
        )
    if grid > GRID_LIMIT:
        raise BackendUnavailableError(
            f"the CUDA kernel {name!r} needs {grid:,} blocks and a launch takes at most {GRID_LIMIT:,}. Split the "
            "batch, or use backend='blocked'."
        )
    if shared_bytes > shared_limit:
        raise BackendUnavailableError(
            f"the CUDA kernel {name!r} needs {shared_bytes:,} bytes of shared memory per block and this GPU has "
            f"{shared_limit:,}; use backend='blocked'."
        )
