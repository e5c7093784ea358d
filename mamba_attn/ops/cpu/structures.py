"""The structures of native.cpp, and how tensors become them: pointers and strides in elements."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_attn.core.order_check import require_distinct


class CTensor(ctypes.Structure):
    """Tensor: ``axis`` is that of channels or states."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "route", "axis", "position"))]


class CScan(ctypes.Structure):
    """Scan: what scans and attention share."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "routes", "channels", "states", "length", "tokens", "positions")
        ),
        *((name, CTensor) for name in ("u", "delta", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A2", "D", "read", "write")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("gain", CTensor),
    ]


class CGradients(ctypes.Structure):
    """Gradients: where the backward writes, and the routes of each source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "delta", "A", "B", "C", "D", "gain")),
        *((name, ctypes.c_int64) for name in ("u_routes", "delta_routes", "bc_routes", "gain_routes")),
    ]


class CAttention(ctypes.Structure):
    """Attention: a scan, its weights, and where the matrix goes."""

    _fields_ = [
        ("scan", CScan),
        ("row_weight", CTensor),
        ("col_weight", CTensor),
        ("A2_low", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("side", "out_batch", "out_route", "out_channel")),
        ("fold", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Frame:
    """The source positions that steps read, and the tokens that they write when routes merge."""

    read: Tensor | None
    write: Tensor | None
    routes: int
    length: int
    tokens: int
    positions: int
    scale: float


def checked_order(name: str, order: Tensor, size: int) -> Tensor:
    """Return an order for the kernel: int64, contiguous, checked for range, because the kernel does not check."""
    require_distinct(f"ScanRecord: {name}", order, size)
    return order.long().contiguous()


def c_tensor(x: Tensor | None, axis: int, routes: int) -> CTensor:
    """Return pointer and strides; all routes share a route axis of size 1."""
    if x is None:
        return CTensor(None, 0, 0, 0, 0)
    route = x.stride(1) if x.shape[1] == routes and routes > 1 else 0
    return CTensor(x.data_ptr(), x.stride(0), route, x.stride(axis), x.stride(-1))


def c_scan(
    u: Tensor,
    delta: Tensor,
    A2: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    frame: Frame,
    gain: Tensor | None = None,
) -> CScan:
    """Return the structure of a scan; it keeps no tensor alive."""
    pointers = [None if x is None else x.data_ptr() for x in (A2, D, frame.read, frame.write)]
    return CScan(
        delta.shape[0],
        frame.routes,
        delta.shape[2],
        B.shape[3],
        frame.length,
        frame.tokens,
        frame.positions,
        c_tensor(u, 2, frame.routes),
        c_tensor(delta, 2, frame.routes),
        c_tensor(B, 3, frame.routes),
        c_tensor(C, 3, frame.routes),
        *pointers,
        frame.scale,
        torch.get_num_threads(),
        *(() if gain is None else (c_tensor(gain, 2, frame.routes),)),
    )
