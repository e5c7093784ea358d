"""The CUDA kernels (cuda/hidden_attention.cu) as a backend.

The scan's output and its attention come from one launch. float32, bfloat16 and float16 tensors; float32 results.
"""

import warnings

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import Weights
from mamba_attn.ops.backend import Backend
from mamba_attn.ops.cuda import kernels, operators
from mamba_attn.ops.cuda.kernel_args import supported
from mamba_attn.ops.flat_records import flatten, flatten_for_matrix

_warned: set[str] = set()  # limits that were warned about


class Fused(Backend):
    """Backend "fused": the CUDA kernels as torch operators."""

    gathers_weights = True

    def unavailable(self, record: ScanRecord) -> str | None:
        """Return why the kernels cannot run this record, or None."""
        tensors = _tensors(record)
        others = {str(x.device) for x in tensors} - {str(record.source_delta.device)}
        if others:
            return f"its tensors are on several devices, {record.source_delta.device} and {', '.join(sorted(others))}."
        odd = [x.dtype for x in tensors if not supported(x)]
        if odd:
            return f"it takes float32, bfloat16 and float16, and an input is {odd[0]}; use backend='blocked'."
        if record.source_gain is not None:
            return "its input has a gain other than delta, which the kernels do not support; use backend='blocked'."
        problem = operators.launcher.problem(record.source_delta.device)
        if problem:
            return problem
        if torch.is_grad_enabled() and kernels.deterministic() and any(x.requires_grad for x in tensors):
            return "its backward adds in no fixed order and deterministic algorithms are on; use backend='blocked'."
        limit = kernels.limits(record, operators.launcher)
        if limit and limit not in _warned:
            _warned.add(limit)
            warnings.warn(
                f"mamba_attn skips its CUDA kernel here (the slower blocked path runs): {limit}", stacklevel=2
            )
        return limit

    def selective_scan(self, record: ScanRecord, merged: bool) -> Tensor:
        """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
        y: Tensor = operators.selective_scan(*flatten(record), merged)
        return y

    def hidden_attention(
        self, record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
    ) -> Tensor:
        """(batch, [channels,] tokens, tokens) merged, else (batch, routes, [channels,] length, length)."""
        attention: Tensor = operators.hidden_attention(
            *flatten_for_matrix(record), merged, row_weight, col_weight, fold
        )
        return attention

    def scan_and_attention(self, record: ScanRecord, fold: str, merged: bool) -> tuple[Tensor, Tensor]:
        """Return both results from one launch."""
        y, attention = operators.scan_and_attention(*flatten(record), merged, fold)
        return y, attention

    def attention_line(
        self, record: ScanRecord, axis: str, index: int, weights: Weights, fold: str, merged: bool
    ) -> Tensor:
        """One row or column of ``hidden_attention``; keeps no graph."""
        with operators.remedy(record):
            return kernels.attention_line(operators.launcher, record, axis, index, weights, fold, merged)


BACKEND = Fused()


def _tensors(record: ScanRecord) -> list[Tensor]:
    every = (record.source_u, record.source_delta, record.A, record.source_B, record.source_C, record.D)
    return [x for x in every if x is not None]
