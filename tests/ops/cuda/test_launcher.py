"""From a call to a stand-in driver through a real NVRTC; and each way in which that can be impossible."""

import ctypes
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from mamba_attn.errors import BackendUnavailableError, MambaAttnError
from mamba_attn.ops.cuda import cubins, driver, launcher, nvrtc
from mamba_attn.ops.cuda.driver import Driver
from mamba_attn.ops.cuda.launcher import CudaLauncher
from tests.ops.cuda.fake_cuda import CONTEXT, Arguments, FakeCuda

GPU, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SOURCES = {
    "scan.cu": """
#include "arguments.cuh"
extern "C" __global__ void scan(const Arguments arguments) {
    if (threadIdx.x < arguments.length) arguments.data[threadIdx.x] *= arguments.s;
}
""",
    "arguments.cuh": "struct Arguments { float* data; short half; long long length; float s; };\n",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tests' own NVRTC is a Linux package")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, fake_cuda: FakeCuda, tmp_path: Path) -> FakeCuda:
    """Two H200 as torch would tell of them, and an empty cache."""
    fake_cuda.kernel("scan", ctypes.sizeof(Arguments))
    fake_cuda.kernel("scan", ctypes.sizeof(Arguments), module=1)
    monkeypatch.setattr(launcher, "driver", lambda: Driver(fake_cuda.library))
    monkeypatch.setattr(launcher, "torch_problem", lambda: None)
    monkeypatch.setattr(launcher, "capability", lambda number: (9, 0))
    monkeypatch.setattr(launcher, "stream", lambda device: 77 + device.index)
    monkeypatch.setattr(cubins, "sources", lambda: SOURCES)
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path / "cache"))
    return fake_cuda


def said_once(launcher: CudaLauncher, device: torch.device = GPU) -> str:
    """The problem of a device, after a look that it is warned of once and stays the same."""
    with pytest.warns(UserWarning, match="runs without its CUDA kernel") as caught:
        problem = launcher.problem(device)
    assert problem is not None
    assert len(caught) == 1
    assert str(caught[0].message).endswith(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launcher.problem(device) == problem
    with pytest.raises(BackendUnavailableError) as refused:
        launcher.launch("scan", 1, 32, 0, Arguments(), device)
    assert str(refused.value).endswith(problem)
    return problem


def test_a_launch(machine: FakeCuda) -> None:
    launcher = CudaLauncher()
    assert launcher.problem(GPU) is None
    assert launcher.multiprocessors(GPU) == 132
    assert launcher.shared_limit(GPU) == 232_448
    arguments = Arguments(2**47, 3, 5, 0.25)
    launcher.launch("scan", 7, 256, 100_000, arguments, GPU)
    sizes = "7 1 1 256 1 1 100000 77"
    assert machine.calls("cuLaunch") == [f"cuLaunchKernel scan {sizes} in {CONTEXT} {bytes(arguments).hex()}"]
    assert machine.calls("cuFuncSet") == [f"cuFuncSetAttribute scan 8 100000 in {CONTEXT}"]


def test_everything_is_done_once_per_device(machine: FakeCuda, tmp_path: Path) -> None:
    launcher = CudaLauncher()
    for device in (GPU, SECOND, GPU, SECOND):
        launcher.launch("scan", 1, 32, 0, Arguments(), device)
    assert machine.calls("load") == [f"load cubin in {CONTEXT} mode 2", f"load cubin in {CONTEXT + 1} mode 2"]
    assert machine.calls("cuModuleGet") == ["cuModuleGetFunction 2000 scan", "cuModuleGetFunction 2001 scan"]
    assert [line.split(" in ")[1].split()[0] for line in machine.calls("cuLaunch")] == ["1050", "1051", "1050", "1051"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_shared_memory_is_asked_for_when_more_is_needed(machine: FakeCuda) -> None:
    launcher = CudaLauncher()
    for size in (0, 1_000, 60_000, 500, 232_448):
        launcher.launch("scan", 1, 32, size, Arguments(), GPU)
    assert [line.split()[3] for line in machine.calls("cuFuncSet")] == ["1000", "60000", "232448"]


def test_the_image_is_what_nvrtc_made(monkeypatch: pytest.MonkeyPatch, machine: FakeCuda) -> None:
    images: list[bytes] = []
    load = Driver.load
    monkeypatch.setattr(Driver, "load", lambda self, context, image: images.append(image) or load(self, context, image))
    assert CudaLauncher().problem(GPU) is None
    assert images == [nvrtc.compiler().compile(SOURCES["scan.cu"], "scan.cu", SOURCES, "sm_90")]


def test_threads_load_it_once(machine: FakeCuda) -> None:
    launcher, gate = CudaLauncher(), threading.Barrier(6)
    failures: list[BaseException] = []

    def work() -> None:
        gate.wait()
        try:
            launcher.launch("scan", 1, 32, 64, Arguments(), GPU)
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(machine.calls("load")) == len(machine.calls("cuModuleGet")) == 1
    assert len(machine.calls("cuLaunch")) == 6


def test_a_cpu_device_is_no_fault() -> None:
    launcher = CudaLauncher()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = launcher.problem(torch.device("cpu"))
    assert problem is not None
    assert problem.startswith("it runs on CUDA devices and the tensors are on cpu;")
    with pytest.raises(BackendUnavailableError, match="the tensors are on cpu"):
        launcher.launch("scan", 1, 32, 0, Arguments(), torch.device("cpu"))


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LIBRARIES", ("libnowhere_cuda.so.1",))
    monkeypatch.setattr(launcher, "driver", driver.driver.__wrapped__)
    assert "no NVIDIA driver" in said_once(CudaLauncher())


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA; install a CUDA build" in said_once(CudaLauncher())
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "built for ROCm" in said_once(CudaLauncher())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert launcher.torch_problem() is None


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "candidates", lambda: iter(()))
    monkeypatch.setattr(launcher, "compiler", nvrtc.compiler.__wrapped__)
    assert "pip install nvidia-cuda-nvrtc" in said_once(CudaLauncher())


def test_sources_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "sources", lambda: {"scan.cu": "nonsense"})
    assert "scan.cu(1): error" in said_once(CudaLauncher())


def test_a_driver_that_is_too_old(machine: FakeCuda) -> None:
    machine.fail("load cubin", 209)
    machine.fail("load ptx", 222)
    problem = said_once(CudaLauncher())
    assert "the driver supports CUDA 12.2 and the kernels were compiled by NVRTC 1" in problem
    assert "log of load ptx" in problem
    assert "Update the NVIDIA driver, or install a torch built for an older CUDA." in problem
    assert [line.split(" in ")[0] for line in machine.calls("load")] == ["load cubin", "load ptx"]


@pytest.mark.parametrize("code", [200, 209, 218, 222])
def test_ptx_where_machine_code_is_refused(machine: FakeCuda, code: int) -> None:
    machine.fail("load cubin", code)
    launcher = CudaLauncher()
    assert launcher.problem(GPU) is None
    launcher.launch("scan", 1, 32, 0, Arguments(), GPU)
    assert [line.split(" in ")[0] for line in machine.calls("load")] == ["load cubin", "load ptx"]


def test_an_architecture_that_nvrtc_does_not_know_yet(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "capability", lambda number: (99, 0))
    assert CudaLauncher().problem(GPU) is None
    assert machine.calls("load") == [f"load ptx in {CONTEXT} mode 2"]


def test_an_architecture_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "capability", lambda number: (7, 0))
    assert "compute capability 7.0 and the kernels need 7.5 or newer" in said_once(CudaLauncher())


def test_no_folder_that_can_be_written(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path / "file"))
    CudaLauncher().launch("scan", 1, 32, 0, Arguments(), GPU)
    assert len(machine.calls("cuLaunch")) == 1


def test_too_little_memory_to_load_is_tried_again(machine: FakeCuda) -> None:
    machine.fail("load cubin", 2)
    launcher = CudaLauncher()
    assert "CUDA out of memory" in said_once(launcher)
    machine.fail("load cubin", 0)
    launcher.launch("scan", 1, 32, 0, Arguments(), GPU)


def test_too_little_memory_to_launch(machine: FakeCuda) -> None:
    machine.fail("cuLaunchKernel", 2)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"CUDA out of memory.*Use a smaller batch"):
        CudaLauncher().launch("scan", 1, 32, 0, Arguments(), GPU)


def test_a_lost_context_is_neither_remembered_nor_passed_over(machine: FakeCuda) -> None:
    machine.fail("load cubin", 700)
    launcher = CudaLauncher()
    for _ in range(2):
        with pytest.raises(MambaAttnError, match="context of this process is lost; restart the process") as caught:
            launcher.problem(GPU)
        assert not isinstance(caught.value, BackendUnavailableError)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "kind", "sentence"),
    [
        (2**31, 32, 0, BackendUnavailableError, "needs 2,147,483,648 blocks.*at most 2,147,483,647.*Split the batch"),
        (1, 32, 232_449, BackendUnavailableError, "needs 232,449 bytes of shared memory.*has 232,448; use.*blocked"),
        (0, 32, 0, ValueError, "grid=0, block=32, shared_bytes=0; expected at least one block"),
        (1, 1025, 0, ValueError, "block=1025.*1 to 1024 threads"),
        (1, 0, 0, ValueError, "block=0.*1 to 1024 threads"),
        (1, 32, -1, ValueError, "shared_bytes=-1.*no negative size"),
    ],
)
def test_what_cannot_be_launched(
    machine: FakeCuda, grid: int, block: int, shared: int, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        CudaLauncher().launch("scan", grid, block, shared, Arguments(), GPU)
    assert machine.calls("cuLaunch") == []


def test_the_largest_launch(machine: FakeCuda) -> None:
    CudaLauncher().launch("scan", 2**31 - 1, 1024, 232_448, Arguments(), GPU)
    assert machine.calls("cuLaunch")[0].split()[2:9] == ["2147483647", "1", "1", "1024", "1", "1", "232448"]


def test_a_structure_of_another_size(machine: FakeCuda) -> None:
    class Short(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p)]

    with pytest.raises(ValueError, match="kernel 'scan' takes 32 bytes, the structure has 8"):
        CudaLauncher().launch("scan", 1, 32, 0, Short(), GPU)
    assert machine.calls("cuLaunch") == []


def test_an_unknown_kernel() -> None:
    with pytest.raises(MambaAttnError, match=r"find kernel 'skan'.*no kernel of that name"):
        CudaLauncher().launch("skan", 1, 32, 0, Arguments(), GPU)


def test_the_device_that_cuda_alone_means(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert CudaLauncher().problem(torch.device("cuda")) is None
    assert machine.calls("load") == [f"load cubin in {CONTEXT + 1} mode 2"]
