"""Stand-ins for the compiled parts of CUDA-only model code, so that it builds and runs on a CPU.

``cpu_stand_ins`` is the entry point. The rest is loaded when the first stand-in is imported. Foreign code calls its
functions and passes None and integers as flags, so flags are typed ``object``.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mamba_attn.stand_ins.finder import StandInFinder

__all__ = ["cpu_stand_ins"]

# `sys.meta_path` and `sys.modules` belong to the process, so the finder that changes them does too: one for all blocks
_lock = threading.Lock()
_active: "StandInFinder | None" = None  # made by the first block, then kept; inactive between blocks
_open = 0  # number of open blocks, in all threads


@contextmanager
def cpu_stand_ins() -> Iterator[None]:
    """Let CUDA-only vision-Mamba code be imported, built and run on a CPU, unchanged.

    Use it around the first import of the code. Models built from it run, forward and backward, inside the block and
    after it. In the block ``import`` finds

    - always a stand-in: ``selective_scan_cuda`` and its relatives (``selective_scan_cuda_core``, ``_oflex``, ``_nrow``,
      ``_ndstate``, ``_oflex_rh``, ``selective_scan_vmamba``, ``v2dmamba_scan``), ``causal_conv1d_cuda`` (the scan runs
      through ``mamba_attn.ops``, gradients included), and ``triton``, whose kernels are never compiled: launching one
      raises;
    - a stand-in where the package cannot be found: ``causal_conv1d``; ``mamba_ssm`` with its scan functions,
      chunk scans, fused norms, ``Mamba`` and mamba_ssm 1's ``Block``;
    - a stand-in where importing the real one fails: ``mamba_ssm.utils.generation`` and ``mamba_ssm.utils.hf``, which
      need a matching transformers and serve language models only;
    - the real module with the functions that launch kernels replaced by plain PyTorch: ``layer_norm``, ``layernorm``,
      ``layernorm_gated``, ``ssd_combined`` and ``selective_state_update`` of mamba_ssm, or of code that holds a
      copy of them, ``csm_triton`` and ``csms6s`` of VMamba.

    Where there is no CUDA device, ``.cuda()``, ``.to("cuda")`` and ``device="cuda"`` mean the CPU in the block: some
    files build a model on the GPU when they are imported. ``torch.cuda.Event`` keeps the CPU's time there.

    torch, torchvision, timm and transformers, if first imported in the block, do not see the stand-ins. On leaving,
    also by an exception, the stand-ins are gone from ``sys.modules`` and ``sys.meta_path`` and the real modules that
    they hid are back. Nested and repeated use is fine; the outermost block decides.

    Half precision is computed in float32 and returned as the CUDA code returns it; float64 stays float64.

    Raises:
        BackendUnavailableError: later, when the code launches a Triton kernel.

    Example:
        >>> with cpu_stand_ins():
        ...     from causal_conv1d import causal_conv1d_fn
        ...     from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        >>> u, delta, A = torch.randn(2, 4, 9), torch.rand(2, 4, 9), -torch.ones(4, 3)
        >>> selective_scan_fn(u, delta, A, torch.randn(2, 3, 9), torch.randn(2, 3, 9)).shape
        torch.Size([2, 4, 9])
    """
    from mamba_attn.stand_ins.finder import CpuForCuda

    _enter()
    try:
        with nullcontext() if torch.cuda.is_available() else CpuForCuda():
            yield
    finally:
        _leave()


def _enter() -> None:
    global _active, _open
    with _lock:
        if _active is None:
            from mamba_attn.stand_ins.finder import StandInFinder

            _active = StandInFinder()
        if _open == 0:
            _active.install()
        _open += 1


def _leave() -> None:
    global _open
    with _lock:
        _open -= 1
        if _open == 0 and _active is not None:
            _active.remove()
