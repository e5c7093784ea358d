"""The CUDA driver as the library talks to it, against a stand-in: what arrives there, and what its errors become."""

import ctypes
from pathlib import Path

import pytest
import torch

from mamba_attn.errors import BackendUnavailableError, MambaAttnError
from mamba_attn.ops.cuda import driver
from mamba_attn.ops.cuda.driver import Driver, ImageRejectedError, Kernel
from tests.ops.cuda.fake_cuda import CONTEXT, Arguments, FakeCuda, build

PTX = b"// ptx\0"
ELF = b"\177ELF\0\0\0"


@pytest.fixture
def cuda(fake_cuda: FakeCuda) -> Driver:
    fake_cuda.kernel("scan", ctypes.sizeof(Arguments))
    return Driver(fake_cuda.library)


def scan_kernel(cuda: Driver) -> Kernel:
    context = cuda.primary_context(0)
    return cuda.kernel(context, (cuda.load(context, ELF),), "scan")


def test_a_launch_arrives_unchanged(cuda: Driver, fake_cuda: FakeCuda) -> None:
    kernel = scan_kernel(cuda)
    arguments = Arguments(0x7F00_1234_5678_9ABC, -2, -(2**40), 0.5)
    cuda.launch(kernel, 2**31 - 1, 1024, 232_448, 0x7FFF_8888_0000, arguments)
    sizes = f"{2**31 - 1} 1 1 1024 1 1 232448 {0x7FFF_8888_0000}"
    assert fake_cuda.calls("cuLaunch") == [f"cuLaunchKernel scan {sizes} in {CONTEXT} {bytes(arguments).hex()}"]


def test_each_device_has_its_own_context(cuda: Driver, fake_cuda: FakeCuda) -> None:
    first, second = cuda.primary_context(0), cuda.primary_context(1)
    assert (first, second) == (CONTEXT, CONTEXT + 1)
    cuda.load(second, ELF)
    assert fake_cuda.calls("load") == [f"load cubin in {second} mode 2"]


def test_what_was_current_comes_back(cuda: Driver, fake_cuda: FakeCuda) -> None:
    kernel = scan_kernel(cuda)
    cuda.allow_shared(kernel, 100_000)
    fake_cuda.fail("cuLaunchKernel", 700)
    with pytest.raises(MambaAttnError):
        cuda.launch(kernel, 1, 32, 0, 0, Arguments())
    with pytest.raises(MambaAttnError):
        cuda.kernel(kernel.context, (2000,), "nothing")
    fake_cuda.fail("load cubin", 209)
    with pytest.raises(ImageRejectedError):
        cuda.load(kernel.context, ELF)
    assert fake_cuda.library.fake_depth() == 0
    assert len(fake_cuda.calls("cuCtxPush")) == len(fake_cuda.calls("cuCtxPop"))


def test_loading_is_allowed_while_a_graph_is_captured(cuda: Driver, fake_cuda: FakeCuda) -> None:
    cuda.load(cuda.primary_context(0), PTX)
    assert fake_cuda.calls("load") == [f"load ptx in {CONTEXT} mode 2"]
    assert fake_cuda.library.fake_capture_mode() == 0


def test_what_a_device_says(cuda: Driver) -> None:
    assert cuda.version() == (12, 2)
    assert cuda.attribute(0, driver.MULTIPROCESSORS) == 132
    assert cuda.attribute(0, driver.SHARED_OPTIN) == 232_448


def test_a_kernel_is_found_in_any_module(cuda: Driver, fake_cuda: FakeCuda) -> None:
    fake_cuda.kernel("second", 8, module=1)
    context = cuda.primary_context(0)
    modules = cuda.load(context, ELF), cuda.load(context, ELF)
    assert cuda.kernel(context, modules, "scan").parameter_bytes == ctypes.sizeof(Arguments)
    assert cuda.kernel(context, modules, "second").parameter_bytes == 8
    with pytest.raises(MambaAttnError, match=r"find kernel 'third'.*\n?.*no kernel of that name; reinstall mamba_attn"):
        cuda.kernel(context, modules, "third")


def test_drivers_before_12_4_do_not_say_the_size(tmp_path: Path) -> None:
    fake = FakeCuda(build(tmp_path, "OLD"))
    fake.kernel("scan", 8)
    cuda = Driver(fake.library)
    assert scan_kernel(cuda).parameter_bytes is None


def whole_way(fake_cuda: FakeCuda) -> None:
    cuda = Driver(fake_cuda.library)
    kernel = scan_kernel(cuda)
    cuda.allow_shared(kernel, 99_999)
    cuda.launch(kernel, 3, 64, 10, 0, Arguments())


@pytest.mark.parametrize(
    ("call", "code", "kind", "sentence"),
    [
        ("cuInit", 100, BackendUnavailableError, r"could not start: .*CUDA_ERROR_100, 100\).*nvidia-smi"),
        ("cuInit", 3, BackendUnavailableError, "after a fork: start worker processes with the 'spawn' method"),
        ("cuInit", 34, BackendUnavailableError, "stub of the CUDA toolkit.*LD_LIBRARY_PATH"),
        ("cuInit", 803, BackendUnavailableError, "restart the machine"),
        ("cuInit", 999, BackendUnavailableError, "Check the driver with nvidia-smi"),
        ("cuInit", 12345, BackendUnavailableError, r"unknown error \(unknown, 12345\)"),
        ("cuDevicePrimaryCtxRetain", 46, BackendUnavailableError, "open cuda:0.*Another process uses the GPU"),
        ("cuDevicePrimaryCtxRetain", 2, torch.cuda.OutOfMemoryError, "CUDA out of memory: .*open cuda:0.*empty_cache"),
        ("load cubin", 200, ImageRejectedError, "log of load cubin.*Update the NVIDIA driver"),
        ("load cubin", 209, ImageRejectedError, "Update the NVIDIA driver, or install a torch built for an older CUDA"),
        ("load cubin", 218, ImageRejectedError, "Update the NVIDIA driver"),
        ("load cubin", 222, ImageRejectedError, "Update the NVIDIA driver"),
        ("load cubin", 2, torch.cuda.OutOfMemoryError, "Use a smaller batch"),
        ("load cubin", 700, MambaAttnError, "context of this process is lost; restart the process"),
        ("load cubin", 900, BackendUnavailableError, "Run the call once before capturing the graph"),
        ("cuFuncSetAttribute", 1, BackendUnavailableError, "a block of 'scan' 99,999 bytes of shared memory"),
        ("cuLaunchKernel", 1, BackendUnavailableError, "launch 'scan' with 3 blocks of 64 threads, 10 bytes.*blocked"),
        ("cuLaunchKernel", 2, torch.cuda.OutOfMemoryError, "CUDA out of memory"),
        ("cuLaunchKernel", 701, BackendUnavailableError, "more registers or shared memory"),
        *(
            ("cuLaunchKernel", code, MambaAttnError, "context of this process is lost; restart the process.*sanitizer")
            for code in (214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 226, 721)
        ),
    ],
)
def test_every_error_is_a_sentence(
    fake_cuda: FakeCuda, call: str, code: int, kind: type[Exception], sentence: str
) -> None:
    fake_cuda.kernel("scan", ctypes.sizeof(Arguments))
    fake_cuda.fail(call, code)
    with pytest.raises(RuntimeError, match=sentence) as caught:
        whole_way(fake_cuda)
    assert caught.type is kind


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LIBRARIES", ("libnowhere_cuda.so.1",))
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA driver \(libnowhere.*Install the driver.*--gpus all"):
        driver.driver.__wrapped__()


def test_a_driver_that_lacks_a_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "_LIBRARIES", (str(build(tmp_path, "BROKEN")),))
    with pytest.raises(BackendUnavailableError, match=r"too old: .*cuLaunchKernel"):
        driver.driver.__wrapped__()


def test_the_first_library_that_loads_is_taken(monkeypatch: pytest.MonkeyPatch, fake_cuda: FakeCuda) -> None:
    monkeypatch.setattr(driver, "_LIBRARIES", ("libnowhere_cuda.so.1", str(fake_cuda.path)))
    assert driver.driver.__wrapped__().version() == (12, 2)
