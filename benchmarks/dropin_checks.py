"""What ``dropin`` checks of one model: its output traced and observed, law 1, the orders of its tokens, its maps."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import mamba_attn
from benchmarks.case import Case, build
from mamba_attn.attribution import AttentionRollout, RawAttention
from mamba_attn.errors import MambaAttnError
from mamba_attn.testing import _by_matrices, check_adapter
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.tracer import Trace

Row = dict[str, Any]
Call = Callable[[nn.Module, Tensor], Any]
METHODS: tuple[Any, ...] = (RawAttention, AttentionRollout)
ENTRIES = 2**22  # of the per-channel matrices that are built at once


def measure(case: Case) -> Row:
    """What ``trace`` makes of one case: errors and maps, or the sentence with which it was refused.

    Raises:
        SystemExit: a case that must be refused was not, or for another reason.
    """
    model, inputs = build(case)
    call = case.call or (lambda m, x: m(x))
    row: Row = {"class": case.class_name, "variant": case.variant, "input": "x".join(map(str, case.shape))}
    if case.refused is not None:
        return {**row, "refused": _refusal(row, case.refused, model, inputs, call)}
    with torch.no_grad():
        plain = _tensors(call(model, inputs))
    try:
        row |= _errors(case, plain, model, inputs, call)
    except MambaAttnError as error:  # the table says so; the other models are measured
        return {**row, "failed": f"{type(error).__name__}: {error}"}
    return {**row, "maps": _maps(case, model, inputs)} if case.maps else row


def _errors(case: Case, plain: list[Tensor], model: nn.Module, inputs: Tensor, call: Call) -> Row:
    with torch.no_grad():
        with mamba_attn.trace(model, mode="observe"):
            observed = _tensors(call(model, inputs))
        with mamba_attn.trace(model) as record:
            routed = _tensors(call(model, inputs))
    layers = record.layers
    seen = [layer for layer in layers if isinstance(layer, DoorLayer)]
    row: Row = {
        "layers": len(layers), "at doors": len(seen), "tokens": sorted({_tokens(layer) for layer in layers}),
        "output": max(_relative(a, b) for a, b in zip(routed, plain, strict=True)),
        "observed": all(torch.equal(a, b) for a, b in zip(observed, plain, strict=True)),
    }  # fmt: skip
    if seen:
        row["law 1"] = max(law_1(layer) for layer in layers if isinstance(layer, ScanLayer))
        row["share"] = min(layer.share for layer in seen)
    else:  # also what a hook sees behind the scans
        report = check_adapter(model, inputs, tolerance=float("inf"), call=case.call)
        row["law 1"] = report.matrix_error
        row["above diagonal"] = max(layer.above_diagonal for layer in report.layers)
    if case.orders and len(seen) < len(layers):
        row["orders"] = _same_orders(record, model, inputs, call)
    row["grids"] = sorted({_grid(layer) for layer in layers})
    return row


def law_1(layer: ScanLayer) -> float:
    """The matrices times what the scans mix, and D u, against what left them, on evenly spaced channels."""
    scan = layer.scan
    count = max(1, ENTRIES // (scan.batch * scan.length**2))
    channels = torch.linspace(0, scan.channels - 1, min(count, scan.channels)).round().long()
    return _relative(_by_matrices(scan, channels), layer.y[:, channels])


def _refusal(row: Row, expected: str, model: nn.Module, inputs: Tensor, call: Call) -> str:
    try:
        with torch.no_grad(), mamba_attn.trace(model):
            call(model, inputs)
    except MambaAttnError as error:
        if expected in str(error):
            return str(error)
        raise SystemExit(f"{row}: expected {expected!r} in {error}") from error
    raise SystemExit(f"{row}: was not refused.")


def _same_orders(record: Trace, model: nn.Module, inputs: Tensor, call: Call) -> str:
    """In how many layers the order that is measured at the doors is the one that an adapter declares."""
    with torch.no_grad(), patch("mamba_attn.tracing.traceable.find_mixers", lambda *_: {}):
        try:
            with mamba_attn.trace(model) as measured:
                call(model, inputs)
        except MambaAttnError:
            return "no door"
    declared = [layer for layer in record.layers if isinstance(layer, ScanLayer) and not isinstance(layer, DoorLayer)]
    equal, unknown = 0, 0
    for layer in declared:
        try:
            equal += _same_order(measured.scans[layer.name or "model"], layer)
        except MambaAttnError:  # it is not there, or could not be measured
            unknown += 1
    return f"{equal} of {len(declared) - unknown}" + (f", {unknown} not measured" if unknown else "")


def _same_order(measured: ScanLayer, declared: ScanLayer) -> bool:
    """Whether both walk the same tokens, whose frames may differ by the padding of windows, or be a window's own."""
    windows = declared.layout.windows() if declared.has_layout else None
    if windows is None or len(windows) == 1:
        return torch.equal(_routes(measured.scan.read_order), _routes(declared.scan.read_order))
    if measured.tokens == windows.shape[1]:  # a sequence by itself
        place = torch.zeros(declared.tokens, dtype=torch.long)
        place[windows] = torch.arange(windows.shape[1]).expand_as(windows)
        return torch.equal(_routes(measured.scan.read_order), _routes(place[declared.scan.read_order]))
    return torch.equal(*(_routes(_on_grid(layer)) for layer in (measured, declared)))


def _on_grid(layer: ScanLayer) -> Tensor:
    """The cell of the grid that every step reads, or -1 for what is no cell."""
    cells = torch.full((layer.tokens,), -1)
    cells[layer.layout.patches] = torch.arange(len(layer.layout.patches))
    return cells[layer.scan.read_order]


def _routes(order: Tensor) -> Tensor:
    """The tokens that every route reads, of the first image, whatever the routes' numbers are."""
    return torch.unique(order if order.ndim == 2 else order[0], dim=0)


def _maps(case: Case, model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """The shape of every method's map of the images, or the sentence with which there is none."""
    called = model if case.call is None else _Called(model, case.call)
    found = {}
    for method in METHODS:
        try:
            map_ = method(called).attribute(inputs)
        except (MambaAttnError, ValueError, RuntimeError, IndexError) as error:  # the last two are ours to repair
            found[method.__name__] = f"{type(error).__name__}: {error}"
        else:
            found[method.__name__] = "x".join(map(str, map_.shape))
    return found


class _Called(nn.Module):
    """A model that is not run on its input alone."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, inputs: Tensor) -> Any:
        return self.call(self.model, inputs)


def _tokens(layer: Layer) -> int:
    return layer.scan.tokens if isinstance(layer, ScanLayer) else int(layer.attention().shape[-1])


def _grid(layer: Layer) -> str:
    try:
        return "x".join(map(str, layer.layout.grid))
    except MambaAttnError:
        return "none"


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in _tensors(part)]


def _relative(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    difference = (value.double() - truth.double()).abs().max()
    return float(difference / truth.double().abs().max().clamp(min=1e-30))
