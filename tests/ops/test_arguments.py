"""Raw tensors in, sentences out: shapes, orders, backends and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import BackendUnavailableError, MatrixTooLargeError
from mamba_attn.ops import dispatch, reference


def tensors(batch: int = 2, channels: int = 4, states: int = 3, length: int = 6) -> tuple[torch.Tensor, ...]:
    delta, A = torch.rand(batch, channels, length), -torch.rand(channels, states) - 0.1
    B, C = torch.randn(batch, states, length), torch.randn(batch, states, length)
    return delta, A, B, C


def test_one_route_of_raw_tensors() -> None:
    delta, A, B, C = tensors()
    record = ScanRecord.from_scan(delta[:, None], delta[:, None], A[None], B[:, None, None], C[:, None, None])
    truth = reference.hidden_attention(record, None, None, "mean")[:, 0]
    value = ops.hidden_attention(delta, A, B, C)
    assert value.shape == (2, 6, 6)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    assert ops.hidden_attention(delta, A, B, C, fold="each").shape == (2, 4, 6, 6)
    y, attention = ops.selective_scan(torch.randn(2, 4, 6), delta, A, B, C, torch.ones(4), attention="mean")
    assert y.shape == (2, 4, 6)
    torch.testing.assert_close(attention, value)


def test_route_axis_is_kept_and_orders_merge() -> None:
    delta, A, B, C = tensors()
    delta, B, C = (torch.stack([x, x.flip(-1)], 1) for x in (delta, B, C))
    A = torch.stack([A, A])
    each = ops.hidden_attention(delta, A, B, C)
    assert each.shape == (2, 2, 6, 6)
    orders = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    merged = ops.hidden_attention(delta, A, B, C, orders=orders)
    torch.testing.assert_close(merged, each[:, 0] + each[:, 1].flip(1, 2))
    row = ops.attention_row(delta, A, B, C, row=4)
    torch.testing.assert_close(row, each[:, :, 4])
    assert ops.attention_column(delta, A, B, C, column=2, orders=orders, tokens=9).shape == (2, 9)
    assert ops.left_product(delta, A, B, C, vector=torch.randn(2, 6)).shape == (2, 2, 6)


def test_errors_say_the_call_back() -> None:
    delta, A, B, C = tensors()
    with pytest.raises(ValueError, match=r"hidden_attention\(delta\(2, 4, 6\).*B does not agree with delta"):
        ops.hidden_attention(delta, A, B[..., :5], C)
    with pytest.raises(ValueError, match=r"A must be negative .* its largest value is 0\.5"):
        ops.hidden_attention(delta, A.abs() * 0 + 0.5, B, C)
    with pytest.raises(ValueError, match="fold='max' is not one of"):
        ops.hidden_attention(delta, A, B, C, fold="max")
    with pytest.raises(ValueError, match="backend='cuda' is not one of"):
        ops.hidden_attention(delta, A, B, C, backend="cuda")
    with pytest.raises(TypeError, match="B must be a floating-point tensor, got NoneType"):
        ops.hidden_attention(delta, A)
    with pytest.raises(ValueError, match=r"row=6 must be an integer in 0\.\.5"):
        ops.attention_row(delta, A, B, C, row=6)
    with pytest.raises(ValueError, match=r"vector must be \(2, 6\), got \(2, 5\)"):
        ops.left_product(delta, A, B, C, vector=torch.randn(2, 5))
    with pytest.raises(ValueError, match="fold='positive' is not one of"):
        ops.right_product(delta, A, B, C, vector=torch.randn(2, 6), fold="positive")
    with pytest.raises(ValueError, match="row_weight must be"):
        ops.hidden_attention(delta, A, B, C, row_weight=torch.randn(2, 3, 6))
    with pytest.raises(ValueError, match="orders visits token 2 more than once on one route"):
        ops.hidden_attention(delta, A, B, C, orders=torch.tensor([[0, 1, 2, 2, 4, 5]]))
    with pytest.raises(ValueError, match="orders must be int64"):
        ops.hidden_attention(delta, A, B, C, orders=torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="different devices"):
        ops.hidden_attention(delta, A, B.to("meta"), C)
    record = ScanRecord.from_scan(delta[:, None], delta[:, None], A[None], B[:, None, None], C[:, None, None])
    with pytest.raises(TypeError, match="the record already holds A"):
        ops.hidden_attention(record, A)


def test_insisting_on_a_backend_never_falls_back() -> None:
    delta, A, B, C = (x.double() for x in tensors())
    with pytest.raises(BackendUnavailableError, match="'native' was requested, but it computes in float32"):
        ops.hidden_attention(delta, A, B, C, backend="native")
    assert ops.hidden_attention(delta, A, B, C).dtype == torch.float64  # left to itself it finds another


def test_a_matrix_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 2_000_000
    delta, B = torch.ones(()).expand(1, 1, length), torch.ones(()).expand(1, 1, length)
    A = -torch.ones(1, 1)
    needed = length * length * 4
    with pytest.raises(MatrixTooLargeError, match=rf"needs {needed:,} bytes.*attention_row"):
        ops.hidden_attention(delta, A, B, B)
    monkeypatch.setattr(dispatch, "_UNASKED", 0)
    monkeypatch.setattr(dispatch, "free_bytes", lambda device: 143)
    with pytest.raises(MatrixTooLargeError, match="needs 144 bytes, 143 are free on cpu"):
        ops.hidden_attention(*tensors(batch=1))


def test_without_a_compiler_everything_still_works(tmp_path: object) -> None:
    program = """
import warnings, torch
from mamba_attn import ops
delta, A, B = torch.rand(1, 4, 9), -torch.rand(4, 2) - .1, torch.randn(1, 2, 9)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        attention = ops.hidden_attention(delta, A, B, B)
    y = ops.selective_scan(delta, delta, A, B, B)
assert attention.shape == (1, 9, 9) and y.shape == (1, 4, 9)
messages = [str(w.message) for w in caught if "CPU kernel" in str(w.message)]
assert len(messages) == 1 and "Install g++ or set CXX" in messages[0], messages
try:
    ops.hidden_attention(delta, A, B, B, backend="native")
except ops.dispatch.BackendUnavailableError as error:
    print("refused:", error)
"""
    environment = {"PATH": "", "MAMBA_ATTN_CACHE": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found" in done.stdout


def test_a_truth_value_is_no_index() -> None:
    with pytest.raises(ValueError, match=r"row=True must be an integer in 0\.\.5"):
        ops.attention_row(*tensors(), row=True)


def test_the_page_cache_of_a_container_counts_as_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 200\ninactive_file 650\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(dispatch, "Path", lambda folder: tmp_path)
    assert dispatch._cgroup_available() == 750
    (tmp_path / "memory.max").write_text("max\n")
    assert dispatch._cgroup_available() is None
