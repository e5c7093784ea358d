"""``cpu_stand_ins``: what code finds in the block, and that nothing of it is left after."""

import importlib
import importlib.util
import sys
import threading
import time
import types

import pytest
import torch
import torch.nn.functional as F

from mamba_attn import cpu_stand_ins
from mamba_attn.errors import BackendUnavailableError
from mamba_attn.stand_ins import finder
from mamba_attn.stand_ins.finder import StandIn
from tests.stand_ins import naive

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d")), reason="the real packages are here"
)
COMPILED = ("selective_scan_cuda", "selective_scan_cuda_oflex", "selective_scan_cuda_core", "causal_conv1d_cuda")


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes files to a folder on sys.path, and forgets what was imported from it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    roots = set()

    def write(files):
        for name, text in files.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            roots.add(name.split("/")[0])
        importlib.invalidate_caches()

    yield write
    for name in list(sys.modules):
        if name.split(".")[0] in roots:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _everything_as_before():
    modules, finders = dict(sys.modules), list(sys.meta_path)
    yield
    assert sys.meta_path == finders
    assert not [name for name, module in sys.modules.items() if isinstance(module, StandIn)]
    assert {name: sys.modules.get(name) for name in modules} == modules


def imports_nothing(*names):
    for name in names:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_the_block_serves_and_then_forgets():
    with cpu_stand_ins():
        for name in (*COMPILED, "triton", "triton.language", "mamba_ssm.ops.triton.layernorm", "causal_conv1d"):
            assert isinstance(importlib.import_module(name), StandIn)
    imports_nothing(*COMPILED, "mamba_ssm", "mamba_ssm.ops.triton.layernorm", "causal_conv1d")


def test_an_unused_block_changes_nothing():
    before = dict(sys.modules)
    with cpu_stand_ins():
        inside = dict(sys.modules)
    own = {name: module for name, module in sys.modules.items() if name.startswith("mamba_attn.")}
    assert dict(sys.modules) == {**before, **own}
    hidden = [name for name in before if name.partition(".")[0] == "triton"]  # which CUDA builds of torch load
    assert inside == {name: module for name, module in {**before, **own}.items() if name not in hidden}


def test_an_exception_ends_it_too():
    def fail():
        with cpu_stand_ins():
            import selective_scan_cuda

            raise KeyError(selective_scan_cuda.__name__)

    with pytest.raises(KeyError, match="selective_scan_cuda"):
        fail()
    imports_nothing("selective_scan_cuda")


def test_nested_blocks_end_with_the_outermost():
    with cpu_stand_ins():
        import selective_scan_cuda as outer

        with cpu_stand_ins():
            import selective_scan_cuda as inner
        import selective_scan_cuda as after
        from mamba_ssm import Mamba  # noqa: F401
    assert outer is inner is after
    imports_nothing("selective_scan_cuda", "mamba_ssm")


def test_two_blocks_in_a_row_serve_the_same_things():
    found = []
    for _ in range(2):
        with cpu_stand_ins():
            from mamba_ssm import Mamba
            from mamba_ssm.ops.triton.layer_norm import RMSNorm
        found.append((Mamba, RMSNorm))
    assert found[0] == found[1]


def test_real_modules_are_hidden_and_come_back(monkeypatch):
    real = {name: types.ModuleType(name) for name in (*COMPILED, "triton", "triton.language", "triton.own.part")}
    for name, module in real.items():
        monkeypatch.setitem(sys.modules, name, module)
    with cpu_stand_ins():
        assert "triton.own.part" not in sys.modules
        for name in (*COMPILED, "triton", "triton.language"):
            assert importlib.import_module(name) is not real[name]
    for name, module in real.items():
        assert sys.modules[name] is module


def test_threads_may_open_blocks_of_their_own():
    problems = []

    def use():
        try:
            with cpu_stand_ins():
                import selective_scan_cuda

                assert isinstance(selective_scan_cuda, StandIn)
        except (ImportError, AssertionError) as error:
            problems.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


SCAN = """
import torch
try:
    from fast_conv_that_nobody_has import conv
except ImportError:
    conv = None
import selective_scan_cuda
try:
    import selective_scan_cuda_oflex
except ImportError:
    selective_scan_cuda_oflex = None

class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias):
        out, states, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, out)
        return rest[0]

    @staticmethod
    def backward(ctx, dout):
        *given, states, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, dz = selective_scan_cuda.bwd(*given, dout, states, out, None, True, False)
        return du, ddelta, dA, dB, dC, dD, dz, dbias

class Oflex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias):
        out, states = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
        ctx.save_for_backward(u, delta, A, B, C, D, bias, states)
        return out

    @staticmethod
    def backward(ctx, dout):
        *given, states = ctx.saved_tensors
        return tuple(selective_scan_cuda_oflex.bwd(*given, dout, states, True, 1))
"""


def test_code_keeps_running_after_the_block(code):
    code({"own_scan": SCAN})
    with cpu_stand_ins():
        import own_scan
    shapes = [(2, 4, 6), (2, 4, 6), (4, 3), (2, 2, 3, 6), (2, 2, 3, 6), (4,), (2, 4, 6), (4,)]
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    given[2] = -given[2].abs() - 0.1
    given = [t.requires_grad_() for t in given]
    without_z = [*given[:6], given[7]]
    for found, truth, leaves in [
        (own_scan.Scan.apply(*given), naive.scan(*given, softplus=True)[0], given),
        (own_scan.Oflex.apply(*without_z), naive.scan(*given[:6], None, given[7], softplus=True)[0], without_z),
    ]:
        naive.close(found, truth, 1e-11)
        gradients = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, truth))
        for one, other in zip(*gradients, strict=True):
            naive.close(one, other, 1e-10)


KERNEL = """
import triton
import triton.language as tl
from triton.language.extra import libdevice
WIDE = tl.constexpr(64)
triton.set_allocator(lambda size, alignment, stream: None)

@triton.autotune(configs=[triton.Config({"BLOCK": n}, num_warps=4) for n in (32, 64)], key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % 2 == 0})
@triton.jit
def add_one(x, n: tl.int32, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    "Adds one."
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) + 1)

@triton.jit(do_not_specialize=["n"])
def other(x, n):
    pass

SIZES = [config.kwargs["BLOCK"] for config in add_one.configs]

def run(x):
    add_one[(triton.cdiv(len(x), 32),)](x, len(x))
"""


def test_kernels_are_defined_and_refuse_to_be_launched(code):
    code({"own_kernel": KERNEL})
    with cpu_stand_ins():
        import own_kernel
    assert own_kernel.SIZES == [32, 64]
    assert own_kernel.add_one.__doc__ == "Adds one."
    assert own_kernel.WIDE.value == 64
    with pytest.raises(BackendUnavailableError, match=r"Triton kernel 'add_one' was launched, but cannot run on a CPU"):
        own_kernel.run(torch.ones(3))
    with pytest.raises(BackendUnavailableError, match="'other' was launched"):
        own_kernel.other(1, 2)
    with pytest.raises(BackendUnavailableError, match=r"triton.language.zeros was called outside a kernel"):
        own_kernel.tl.zeros((3,))
    assert [own_kernel.triton.cdiv(7, 3), own_kernel.triton.next_power_of_2(65)] == [3, 128]


def test_a_function_without_stand_in_is_named():
    with cpu_stand_ins():
        import selective_scan_cuda

        with pytest.raises(AttributeError, match=r"selective_scan_cuda.fwd_2d has no stand-in .*'fwd'"):
            selective_scan_cuda.fwd_2d  # noqa: B018 - the access is the test
        with pytest.raises(ImportError, match="cannot import name 'fwd_2d' from 'selective_scan_cuda'"):
            from selective_scan_cuda import fwd_2d  # noqa: F401
        with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm.models has no stand-in .*sys.path"):
            importlib.import_module("mamba_ssm.models.mixer_seq_simple")


REAL_SSM = {
    "mamba_ssm/__init__": "import mamba_ssm.utils.generation, mamba_ssm.utils.hf\nHERE = True",
    "mamba_ssm/utils/__init__": "",
    "mamba_ssm/utils/generation": "from transformers_of_another_time import Output\nclass GenerationMixin: pass",
    "mamba_ssm/utils/hf": "def load_config_hf(name): return name",
    "mamba_ssm/ops/__init__": "",
    "mamba_ssm/ops/triton/__init__": "",
    "mamba_ssm/ops/triton/layer_norm": """
import torch, triton
@triton.jit
def kernel(): pass
def _layer_norm_fwd(x): kernel[1](x)
def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
    return _layer_norm_fwd(x)
def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):
    return _layer_norm_fwd(x)
class RMSNorm(torch.nn.Module):
    def forward(self, x):
        return rms_norm_fn(x, torch.ones(x.shape[-1]), None, None, False, True, 1e-3)
""",
    "mamba_ssm/ops/triton/selective_state_update": """
import triton
@triton.jit
def kernel(): pass
def selective_state_update(state, x, dt, A, B, C, dt_softplus=False): kernel[1](x)
""",
}


def test_a_real_mamba_ssm_is_used_with_its_kernels_replaced(code):
    code(REAL_SSM)
    with cpu_stand_ins():
        import mamba_ssm
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.utils.generation import GenerationMixin
        from mamba_ssm.utils.hf import load_config_hf
    x = torch.randn(3, 5)
    naive.close(RMSNorm()(x), naive.rms_norm(x, torch.ones(5), 1e-3), 1e-6)
    naive.close(layer_norm_fn(x, torch.ones(5), None, eps=1e-3), F.layer_norm(x, (5,), eps=1e-3), 1e-6)
    state = torch.zeros(3, 5, 2)
    y = selective_state_update(state, x, x.abs(), -torch.ones(5, 2), torch.ones(3, 2), torch.ones(3, 2))
    naive.close(y, 2 * x * x.abs(), 1e-6)
    assert mamba_ssm.HERE
    assert RMSNorm.__module__ == "mamba_ssm.ops.triton.layer_norm"
    assert load_config_hf("its own") == "its own"
    with pytest.raises(NotImplementedError, match=r"GenerationMixin.generate needs the package transformers"):
        GenerationMixin().generate()
    # the real ones stay, what could not be imported is forgotten and may be imported again
    assert "mamba_ssm.ops.triton.layer_norm" in sys.modules
    assert "mamba_ssm.utils.generation" not in sys.modules
    assert not hasattr(sys.modules["mamba_ssm.utils"], "generation")
    with pytest.raises(ModuleNotFoundError, match="transformers_of_another_time"):
        importlib.import_module("mamba_ssm.utils.generation")


CROSS = """
import torch, triton
@triton.jit
def kernel(): pass
class CrossScanF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0):
        ctx.scans = scans
        return x * 2 + scans
    @staticmethod
    def backward(ctx, dy):
        return dy * 2, None, None, None, None
CrossMergeF = CrossScanF
class Launch:
    apply = kernel
def cross_scan_fn(x, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0, force_torch=False):
    with torch.cuda.device(x.device):
        return (Launch if x.is_cuda else CrossScanF).apply(x, in_channel_first, out_channel_first, one_by_one, scans)
def cross_merge_fn(y, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0, force_torch=False):
    with torch.cuda.device(y.device):
        return (Launch if y.is_cuda else CrossMergeF).apply(y, in_channel_first, out_channel_first, one_by_one, scans)
"""


def test_vmamba_s_scans_take_cpu_tensors(code):
    net = "from own_models.csm_triton import cross_scan_fn, cross_merge_fn"
    code({"own_models/csm_triton": CROSS, "own_models/net": net})
    with cpu_stand_ins():
        from own_models.net import cross_merge_fn, cross_scan_fn
    x = torch.randn(2, 3).requires_grad_()
    assert torch.equal(cross_scan_fn(x, scans=2, force_torch=True), x * 2 + 2)
    assert torch.equal(cross_merge_fn(y=x), x * 2)
    cross_scan_fn(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    spec = sys.modules["own_models.csm_triton"].__spec__
    assert spec.loader is sys.modules["own_models.csm_triton"].__loader__
    assert type(spec.loader).__module__ != "mamba_attn.stand_ins.finder"


def test_a_copy_of_the_chunk_scans_runs_and_is_looked_up_at_every_call(code):
    """As in VMamba's mamba2 folder: an autograd function and the two functions with kernels that it calls."""
    code(
        {
            "own_ssd/__init__": "",
            "own_ssd/ssd_combined": """
import torch, triton
def _mamba_chunk_scan_combined_fwd(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                                   seq_idx=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
    raise RuntimeError("a kernel")
def _mamba_chunk_scan_combined_bwd(dout, x, dt, A, B, C, out, chunk_size, D=None, z=None, dt_bias=None,
                                   initial_states=None, dfinal_states=None, seq_idx=None, dt_softplus=False,
                                   dt_limit=(0.0, float("inf")), dx=None, ddt=None, dB=None, dC=None, dz=None):
    raise RuntimeError("a kernel")
class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C):
        out, *_ = _mamba_chunk_scan_combined_fwd(x, dt, A, B, C, 64)
        ctx.save_for_backward(x, dt, A, B, C, out)
        return out
    @staticmethod
    def backward(ctx, dout):
        *given, out = ctx.saved_tensors
        return _mamba_chunk_scan_combined_bwd(dout, *given, out, 64)[:5]
""",
        }
    )
    with cpu_stand_ins():
        from own_ssd.ssd_combined import Scan
    torch.manual_seed(0)
    x, dt, A = torch.randn(2, 5, 3, 4), torch.rand(2, 5, 3), -torch.rand(3)
    B, C = torch.randn(2, 5, 1, 2), torch.randn(2, 5, 1, 2)
    given = [t.double().requires_grad_() for t in (x, dt, A, B, C)]
    assert torch.autograd.gradcheck(Scan.apply, given)


def test_libraries_do_not_see_the_stand_ins(code, monkeypatch):
    monkeypatch.setattr(finder, "_LIBRARIES", ("own_library",))
    real = types.ModuleType("triton")
    monkeypatch.setitem(sys.modules, "triton", real)
    part = "try:\n    import selective_scan_cuda as found\nexcept ImportError:\n    found = None"
    top = "import sys\ntriton = sys.modules.get('triton')\nimport own_library.part"
    code({"own_library/__init__": top, "own_library/part": part})
    with cpu_stand_ins():
        before = {name: importlib.import_module(name) for name in ("selective_scan_cuda", "triton")}
        import own_library

        assert before["triton"] is not real
        assert {name: sys.modules[name] for name in before} == before
    assert own_library.triton is real
    assert own_library.part.found is None


def test_libraries_that_fail_leave_the_block_as_it_was(code, monkeypatch):
    monkeypatch.setattr(finder, "_LIBRARIES", ("own_library",))
    code({"own_library": "raise RuntimeError('no')"})
    with cpu_stand_ins():
        with pytest.raises(RuntimeError, match="no"):
            import own_library  # noqa: F401
        import selective_scan_cuda

        assert isinstance(selective_scan_cuda, StandIn)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to go to")
def test_code_that_moves_itself_to_the_gpu_stays(code):
    demo = """
import torch
model = torch.nn.Linear(2, 3).to("cuda").cuda()
found = model(torch.ones(1, 2, device=torch.device("cuda:0")).cuda(0))
"""
    code({"own_demo": demo})
    with cpu_stand_ins():
        import own_demo
    assert own_demo.found.device.type == own_demo.model.weight.device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):  # as the build of torch says it
        own_demo.model.to("cuda")


def test_the_other_names_of_the_extensions():
    with cpu_stand_ins():
        import selective_scan_cuda_core
        import selective_scan_cuda_nrow
        from selective_scan_vmamba import selective_scan_cuda_core as old
        from selective_scan_vmamba_pt202 import selective_scan_cuda_core as core

        assert core.fwd is old.fwd is selective_scan_cuda_nrow.fwd is selective_scan_cuda_core.fwd
        assert core.bwd is selective_scan_cuda_core.bwd
    imports_nothing("selective_scan_vmamba_pt202", "selective_scan_cuda_nrow")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the real ones stay")
def test_events_measure_time_where_there_is_no_gpu():
    before = torch.cuda.Event, torch.cuda.synchronize
    with cpu_stand_ins():
        with cpu_stand_ins():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        time.sleep(0.02)
        end.record()
        torch.cuda.synchronize()
        end.synchronize()
        assert end.query()
        assert 15 < start.elapsed_time(end) < 5000  # milliseconds
    assert (torch.cuda.Event, torch.cuda.synchronize) == before


def test_block_of_mamba_ssm_1():
    """Add, norm, mix: the sum comes back beside the mixer's output, in float32 where that is asked for."""
    with cpu_stand_ins():
        from mamba_ssm.modules.mamba_simple import Block, Mamba
    block = Block(8, lambda dim: Mamba(dim, d_state=2), residual_in_fp32=True)
    x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mixed, total = block(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(mixed, block.mixer(block.norm(x + residual)))
    assert torch.equal(block(x)[1], x)
    assert block.bfloat16()(x.bfloat16())[1].dtype == torch.float32
