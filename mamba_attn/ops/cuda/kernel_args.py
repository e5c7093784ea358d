"""Kernel argument structs; they must match cuda/call.cuh: tensors by pointer and strides, sizes, where results go."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord

STEP, READ, WRITE = range(3)  # what a tensor's position is: a step, the token read or written there
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STRIDES = ("batch", "route", "group", "axis", "position")


class CTensor(ctypes.Structure):
    """A tensor that a kernel reads."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _STRIDES),
        ("type", ctypes.c_int32),
        ("frame", ctypes.c_int32),
    ]


class COutput(ctypes.Structure):
    """A float32 tensor that is written, or added to."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _STRIDES),
        ("add", ctypes.c_int32),
        ("frame", ctypes.c_int32),
    ]


class CCall(ctypes.Structure):
    """Inputs of a scan, or of its attention."""

    _fields_ = [
        *((name, CTensor) for name in ("u", "delta", "A", "B", "C", "D", "row_weight", "col_weight")),
        *((name, COutput) for name in ("y", "attention")),
        *((name, ctypes.c_void_p) for name in ("read", "write")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "batch",
                "routes",
                "channels",
                "heads",
                "groups",
                "states",
                "length",
                "tokens",
                "per_head",
                "per_group",
                "width",
                "fold",
                "splits",
                "products",
            )
        ),
        *((name, ctypes.c_float) for name in ("y_scale", "attention_scale")),
    ]


class CBackward(ctypes.Structure):
    """Inputs and outputs of a scan's backward pass."""

    _fields_ = [
        ("call", CCall),
        ("gradient", CTensor),
        *((name, COutput) for name in ("u", "delta", "A", "B", "C", "D")),
        ("entering", ctypes.c_void_p),
    ]


class CLine(ctypes.Structure):
    """A row or column of the attention matrix."""

    _fields_ = [("call", CCall), *((name, ctypes.c_int32) for name in ("first", "index", "column", "token"))]


def tensor(x: Tensor | None, axes: Sequence[str | None], frame: int = STEP) -> CTensor:
    """Return a tensor's pointer and strides.

    Args:
        x: float32, bfloat16 or float16; None is a null pointer.
        axes: what each axis of ``x`` is: "batch", "route", "group", "axis" or "position". An axis of size 1 gets
            stride 0: all share its entry.
        frame: STEP, READ or WRITE.
    """
    if x is None:
        return CTensor()
    return CTensor(data=x.data_ptr(), type=_TYPES[x.dtype], frame=frame, **_strides(x, axes))


def output(x: Tensor | None, axes: Sequence[str | None], frame: int = STEP, add: bool = False) -> COutput:
    """Like ``tensor``, for a result; ``add``: several writers add to zeros."""
    if x is None:
        return COutput()
    return COutput(data=x.data_ptr(), add=add, frame=frame, **_strides(x, axes))


def call(record: ScanRecord, read: Tensor | None, write: Tensor | None) -> CCall:
    """Return a record as kernel inputs; the two orders are int64, contiguous and must outlive the call."""
    frame = READ if record.source_frame == "tokens" else STEP
    channels = ("batch", "route", "axis", "position")
    states = ("batch", "route", "group", "axis", "position")
    return CCall(
        u=tensor(record.source_u, channels, frame),
        delta=tensor(record.source_delta, channels, frame),
        A=tensor(record.A, ("route", "group", "position")),
        B=tensor(record.source_B, states, frame),
        C=tensor(record.source_C, states, frame),
        D=tensor(record.D, ("route", "axis")),
        read=None if read is None else read.data_ptr(),
        write=None if write is None else write.data_ptr(),
        batch=record.batch,
        routes=record.routes,
        channels=record.channels,
        heads=record.heads,
        groups=record.source_B.shape[2],
        states=record.states,
        length=record.length,
        tokens=record.tokens,
        per_head=record.channels // record.heads,
        per_group=record.channels // record.source_B.shape[2],
        width=1,
        splits=1,
        y_scale=1.0,
        attention_scale=1.0,
    )


def call_of_heads(record: ScanRecord, read: Tensor | None, write: Tensor | None) -> CCall:
    """Like ``call``, for kernels whose channels are heads; "group" leads to a head's next channel."""
    args, width = call(record, read, write), record.channels // record.heads
    args.u = tensor(by_head(record.source_u, 2, width), ("batch", "route", "axis", "group", "position"), args.u.frame)
    if record.D is not None:
        args.D = tensor(by_head(record.D, 1, width), ("route", "axis", "group"))
    args.channels, args.per_head, args.per_group, args.width = record.heads, 1, record.heads // args.groups, width
    return args


def by_head(x: Tensor, axis: int, width: int) -> Tensor:
    """Return a view whose axis of channels is two: heads, and ``width`` channels of each."""
    split: Tensor = x.unflatten(axis, (-1, width))
    return split


def supported(x: Tensor | None) -> bool:
    """Whether kernels can read a tensor's type."""
    return x is None or x.dtype in _TYPES


def _strides(x: Tensor, axes: Sequence[str | None]) -> dict[str, int]:
    return {
        axis: 0 if size == 1 else stride
        for axis, size, stride in zip(axes, x.shape, x.stride(), strict=True)
        if axis is not None
    }
