"""The CUDA driver through ctypes: load compiled kernels into a device's primary context, and launch them.

The primary context is the one that torch uses; each call makes it current and restores the previous one.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from mamba_attn.errors import BackendUnavailableError, MambaAttnError

GRID_LIMIT = 2**31 - 1
BLOCK_LIMIT = 1024
SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
MULTIPROCESSORS = 16

_LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ERROR_LOG, _ERROR_LOG_BYTES, _LOG_BYTES = 5, 6, 4096  # CU_JIT_ERROR_LOG_BUFFER, ..._SIZE_BYTES
_CAPTURE_RELAXED = 2

_INT, _POINTER, _UNSIGNED, _TEXT = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_char_p
_SIGNATURES = {
    "cuInit": (_UNSIGNED,),
    "cuDriverGetVersion": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuThreadExchangeStreamCaptureMode": (_POINTER,),
    "cuModuleLoadDataEx": (_POINTER, _TEXT, _UNSIGNED, _POINTER, _POINTER),
    "cuModuleGetFunction": (_POINTER, _POINTER, _TEXT),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuLaunchKernel": (_POINTER, *[_UNSIGNED] * 7, _POINTER, _POINTER, _POINTER),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
}

# the driver refuses the code itself; code in another form may still run
_REJECTED = {200, 209, 218, 222, 223}
# after these every CUDA call of the process fails
_STICKY = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721}
_NOT_FOUND = 500
_OUT_OF_MEMORY = 2

_UPDATE = "Update the NVIDIA driver, or install a torch built for an older CUDA."
_REMEDIES = {
    1: "Launch it with fewer blocks or less shared memory (a smaller batch), or use backend='blocked'.",
    3: "CUDA cannot be used after a fork: start worker processes with the 'spawn' method.",
    34: "This libcuda is the stub of the CUDA toolkit; put the driver's folder first in LD_LIBRARY_PATH.",
    36: _UPDATE,
    46: "Another process uses the GPU exclusively; use a free one.",
    100: "Check with nvidia-smi that there is a GPU, and that CUDA_VISIBLE_DEVICES names it.",
    101: "Check CUDA_VISIBLE_DEVICES.",
    201: "Run any torch operation on the device first.",
    221: "The driver's PTX compiler (libnvidia-ptxjitcompiler) is missing; install the whole driver.",
    701: "The block needs more registers or shared memory than there are; use backend='blocked'.",
    802: "The system is not ready for CUDA yet (the fabric manager is not running?).",
    803: "The loaded driver module and the driver's libraries differ; restart the machine.",
    804: "The compatibility libraries of CUDA do not support this GPU; remove them from LD_LIBRARY_PATH.",
    900: "Run the call once before capturing the graph.",
    901: "Run the call once before capturing the graph.",
}


class ImageRejectedError(BackendUnavailableError):
    """The driver cannot load this machine code or PTX; another form may load."""


@dataclass
class Kernel:
    """One function of a loaded module.

    Attributes:
        name: as in the source.
        handle: the driver's.
        context: of the device that it was loaded on.
        parameter_bytes: size of its one argument; None when the driver (before 12.4) does not say.
        shared_bytes: limit last set for a block's dynamic shared memory.
    """

    name: str
    handle: int
    context: int
    parameter_bytes: int | None
    shared_bytes: int = 0


class Driver:
    """The functions of libcuda that a launch needs; failures raise exceptions that name a remedy."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
        self.library = library
        self._call("start", "cuInit", 0)

    def version(self) -> tuple[int, int]:
        """CUDA version that the driver supports, (major, minor)."""
        number = ctypes.c_int()
        self._call("return its version", "cuDriverGetVersion", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def attribute(self, device: int, attribute: int) -> int:
        """One number that describes a device, ``SHARED_OPTIN`` (bytes) or ``MULTIPROCESSORS``."""
        value = ctypes.c_int()
        handle = self._device(device)
        self._call(f"describe cuda:{device}", "cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
        return value.value

    def primary_context(self, device: int) -> int:
        """Handle of the context that torch uses on a device; created if torch has not yet."""
        context = ctypes.c_void_p()
        handle = self._device(device)
        self._call(f"open cuda:{device}", "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        return context.value or 0

    def load(self, context: int, image: bytes) -> int:
        """Load a cubin, or PTX that ends in NUL, and return the module's handle.

        Raises:
            ImageRejectedError: the driver is too old for it, or it is for another architecture.
        """
        module, log = ctypes.c_void_p(), ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        with self._current(context), self._relaxed_capture():
            status = self.library.cuModuleLoadDataEx(ctypes.byref(module), image, 2, options, values)
        self._check(status, "load the compiled kernels", log.value.decode(errors="replace").strip())
        return module.value or 0

    def kernel(self, context: int, modules: Sequence[int], name: str) -> Kernel:
        """Return a function of one of these modules.

        Raises:
            MambaAttnError: no module has a function of that name.
        """
        handle, status = ctypes.c_void_p(), _NOT_FOUND
        with self._current(context), self._relaxed_capture():
            for module in modules:
                status = self.library.cuModuleGetFunction(ctypes.byref(handle), module, name.encode())
                if status != _NOT_FOUND:
                    break
            self._check(status, f"find kernel {name!r}")
            return Kernel(name, handle.value or 0, context, self._parameter_bytes(handle))

    def allow_shared(self, kernel: Kernel, size: int) -> None:
        """Allow blocks of a kernel this much dynamic shared memory, in bytes."""
        doing = f"give a block of {kernel.name!r} {size:,} bytes of shared memory"
        with self._current(kernel.context):
            self._call(doing, "cuFuncSetAttribute", kernel.handle, _MAX_DYNAMIC_SHARED, size)
        kernel.shared_bytes = size

    def launch(
        self, kernel: Kernel, grid: int, block: int, shared_bytes: int, stream: int, arguments: ctypes.Structure
    ) -> None:
        """Start a kernel on a stream; the arguments are copied before this returns."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        sizes = (grid, 1, 1, block, 1, 1, shared_bytes)
        with self._current(kernel.context):
            status = self.library.cuLaunchKernel(kernel.handle, *sizes, stream, parameters, None)
        self._check(status, f"launch {kernel.name!r} with {grid:,} blocks of {block} threads, {shared_bytes:,} bytes")

    @contextmanager
    def _current(self, context: int) -> Iterator[None]:
        self._call("switch to the device", "cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    @contextmanager
    def _relaxed_capture(self) -> Iterator[None]:
        """Relax graph capture in this thread: loading allocates, which strict capture forbids."""
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def _device(self, device: int) -> int:
        handle = ctypes.c_int()
        self._call(f"find cuda:{device}", "cuDeviceGet", ctypes.byref(handle), device)
        return handle.value

    def _parameter_bytes(self, handle: ctypes.c_void_p) -> int | None:
        if not hasattr(self.library, "cuFuncGetParamInfo"):
            return None
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        status = self.library.cuFuncGetParamInfo(handle, ctypes.c_size_t(0), ctypes.byref(offset), ctypes.byref(size))
        return size.value if status == 0 else None

    def _call(self, doing: str, function: str, *arguments: object) -> None:
        self._check(getattr(self.library, function)(*arguments), doing)

    def _check(self, status: int, doing: str, log: str = "") -> None:
        if status == 0:
            return
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        self.library.cuGetErrorName(status, ctypes.byref(name))
        self.library.cuGetErrorString(status, ctypes.byref(text))
        words = (text.value or b"unknown error").decode() + (f"; {log}" if log else "")
        raise _error_of(status, (name.value or b"unknown").decode(), words, doing)


@cache
def driver() -> Driver:
    """Return the driver, started.

    Raises:
        BackendUnavailableError: no driver was found, or it cannot start.
    """
    tried = []
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            tried.append(str(error))
            continue
        try:
            return Driver(library)
        except AttributeError as error:
            tried.append(f"it is too old: {error}")
    raise BackendUnavailableError(
        f"there is no NVIDIA driver ({'; '.join(tried)}). Install the driver of the GPU, and inside a container run it "
        "with the NVIDIA runtime (--gpus all)."
    )


def _error_of(code: int, name: str, text: str, doing: str) -> RuntimeError:
    """Return what to raise for an error code of the driver.

    Args:
        code: what the driver returned, not zero.
        name: its name there, "CUDA_ERROR_NO_DEVICE".
        text: the driver's description of it.
        doing: what was asked of the driver, "load the kernels on cuda:0".
    """
    failure = f"the CUDA driver could not {doing}: {text} ({name}, {code})."
    if code == _OUT_OF_MEMORY:
        return torch.cuda.OutOfMemoryError(
            f"CUDA out of memory: {failure} Use a smaller batch, or torch.cuda.empty_cache() if torch holds what is "
            "free."
        )
    if code in _STICKY:
        return MambaAttnError(
            f"{failure} The CUDA context of this process is lost; restart the process. The fault may be an earlier "
            "kernel's: CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer shows whose."
        )
    if code == _NOT_FOUND:
        return MambaAttnError(f"{failure} The compiled sources hold no kernel of that name; reinstall mamba_attn.")
    if code in _REJECTED:
        return ImageRejectedError(f"{failure} {_UPDATE}")
    return BackendUnavailableError(f"{failure} {_REMEDIES.get(code, 'Check the driver with nvidia-smi.')}")
