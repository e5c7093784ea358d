"""The CPU kernel under torch.compile: equal to plain, forward and backward, call after call."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from mamba_attn.ops.cpu import native
from mamba_attn.ops.cpu.build import library_problem
from mamba_attn.ops.flat_records import flatten
from tests.ops.cases import Case, make

pytestmark = pytest.mark.skipif(library_problem() is not None, reason="no C++ compiler")
SIZES = {"batch": 1, "routes": 2, "channels": 16, "states": 2, "grid": (2, 3)}

# a process of its own: dynamo cannot trace the checks of shapes that tests install
COMPILED = """
import sys, torch, warnings
from mamba_attn import models, ops
from tests.ops.cases import Case, make

warnings.filterwarnings("error", message=".*byref")
backend, subject = sys.argv[1:]

def agree(run, inputs, close):
    compiled = torch.compile(run, backend=backend)
    for call in range(5):
        results = []
        for function in (run, compiled):
            given = [x.detach().clone().requires_grad_() for x in inputs]
            values = function(*given)
            values = values if isinstance(values, tuple) else (values,)
            used = list(run.parameters()) if isinstance(run, torch.nn.Module) else given
            gradients = torch.autograd.grad(sum(x.square().sum() for x in values), used, allow_unused=True)
            assert all(x.isfinite().all() for x in values)
            results.append([*values, *gradients])
        for plain, found in zip(*results, strict=True):
            if plain is None or found is None:
                assert plain is found
            else:
                error = (found - plain).abs().max() / plain.abs().max().clamp(min=1e-3)
                assert error <= close, (subject, call, error)

torch.manual_seed(0)
close = 0 if backend == "eager" else 1e-5
if subject == "vim":
    agree(models.create("vim_micro", depth=2, image_size=32, embed_dim=32).eval(), [torch.randn(2, 3, 32, 32)], close)
elif subject == "vmamba":
    depths = (1,) if backend == "inductor" else (1, 1)
    model = models.vmamba.VSSM(num_classes=5, dims=8, depths=depths, d_state=1).eval()
    agree(model, [torch.randn(2, 3, 32, 48)], close)
else:
    u, delta = torch.randn(2, 5, 17), torch.rand(2, 5, 17)
    A, B, C, D = -torch.rand(5, 3) - 0.1, torch.randn(2, 3, 17), torch.randn(2, 3, 17), torch.randn(5)
    rest = [delta, A, B, C]
    order = torch.stack([torch.randperm(17)])
    agree(lambda u, *rest: ops.selective_scan(u, *rest) + 1, [u, *rest, D], close)
    agree(lambda u, *rest: ops.selective_scan(u, *rest, attention="mean"), [u, *rest], close)
    agree(lambda *x: ops.hidden_attention(*x, fold="absolute"), rest, close)
    record = make(Case(routes=2, channels=12, heads=3, groups=2, states=4, grid=(3, 5), frame="tokens"))
    def whole(u, delta):
        own = record.replace(source_u=u, source_delta=delta)
        return ops.selective_scan(own), ops.hidden_attention(own)
    agree(whole, [record.source_u, record.source_delta], close)
    record = make(Case(routes=2, grid=(3, 5)))
    plain = [ops.attention_row(record, row=7), ops.attention_column(record, column=3),
             ops.left_product(record, vector=torch.ones(2, 15)), ops.right_product(record, vector=torch.ones(2, 15))]
    calls = [lambda: ops.attention_row(record, row=7), lambda: ops.attention_column(record, column=3),
             lambda: ops.left_product(record, vector=torch.ones(2, 15)),
             lambda: ops.right_product(record, vector=torch.ones(2, 15))]
    for expected, call in zip(plain, calls, strict=True):
        compiled = torch.compile(call, backend=backend)
        for _ in range(5):
            torch.testing.assert_close(compiled(), expected, rtol=1e-5, atol=1e-6)
print("same")
"""


@pytest.mark.timeout(900)  # inductor compiles C++ for every graph
@pytest.mark.parametrize("subject", ["vim", "vmamba", "functions"])
@pytest.mark.parametrize(  # aot_eager does all that eager does, and more
    "backend", ["aot_eager", *(pytest.param(name, marks=pytest.mark.full) for name in ("eager", "inductor"))]
)
def test_compiled_is_plain(backend: str, subject: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor looks for g++")
    if backend == "aot_eager" and Version(torch.__version__) < Version("2.6"):
        pytest.skip("aot_eager of torch 2.5 fails with an AssertionError of its own")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILED, backend, subject]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, cwd=root
    )
    assert done.stdout == "same\n", done.stderr[-3000:]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("frame", ["scan", "tokens"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.15 warns of what its own check does
def test_opcheck(merged: bool, frame: str, skip: bool) -> None:
    record = make(Case(**SIZES, frame=frame, skip=skip)).map_tensors(lambda x: x.detach().clone().requires_grad_())
    sources = record.source_u, record.source_delta
    u, delta = (native._channels_last(x.detach(), 0).requires_grad_() for x in sources)
    B, C = record.source_B, record.source_C
    read, write = (record.read_order if frame == "tokens" else None), (record.write_order if merged else None)
    scan = (u, delta, record.A, B, C, record.D, None, read, write, record.tokens, 0.5)
    torch.library.opcheck(native._scan_operator, scan)
    rows = torch.randn(1, 2, 16, 6, requires_grad=True)
    fields = flatten(record)
    torch.library.opcheck(native._attention_operator, (*fields, merged, rows, None, "sum"))
    torch.library.opcheck(native._attention_operator, (*fields, merged, None, None, "each"))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in scan]
    gradient = torch.randn(native._scan(*detached).shape)
    torch.library.opcheck(native._scan_backward_operator, (gradient, *detached))
    own = flatten(record.select_routes(slice(0, 1)).map_tensors(torch.Tensor.detach))
    for fold in ("mean", "each"):
        torch.library.opcheck(native._line_operator, (*own, None, None, "row", 3, fold))


def test_an_order_that_repeats_is_refused_when_compiled_too() -> None:
    record = make(Case(**SIZES))
    wrong = record.write_order.clone()
    u, delta = (native._channels_last(x, 0) for x in (record.source_u, record.source_delta))
    wrong[0, 1] = wrong[0, 2]
    with pytest.raises(ValueError, match="write_order visits token 2 more than once"):
        native._scan_operator(u, delta, record.A, record.source_B, record.source_C, None, None, None, wrong, 6, 1.0)
