"""The calls behind the rows of one configuration: the model, every backend, and what others published."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel import counting, estimates
from benchmarks.kernel.counting import Scans
from benchmarks.kernel.published import LoopRows, loop_products, vmamba_formula
from benchmarks.kernel.subjects import Model, Part, Subject, Unavailable
from benchmarks.kernel.timing import Call
from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.tracing.tracer import trace

LOOP_LENGTH = 160  # the published loops are run on rows below this
LOOP_ROWS = 4
_Records = Callable[[], list[ScanRecord]]


def subjects(model: Model, batch: int) -> list[Subject]:
    """Return all rows of one configuration; nothing is built before a part's ``make`` is called.

    Args:
        model: the model at its size and type.
        batch: number of images.
    """
    images = _Once(lambda: model.images(batch))
    plain = Part(None, lambda: _plain(model.module, images()))
    traced = Part(None, lambda: _traced(model.module, images()))
    memory, work = estimates.forward_bytes(model, batch), estimates.forward_work(model, batch)
    more = estimates.kept_bytes(model, batch) + estimates.matrix_bytes(model, batch)
    found = [
        Subject("forward", model.backend, [plain], memory, work),
        Subject(
            "forward + attention",
            model.backend,
            [traced],
            memory + more,
            work + estimates.attention_work(model, batch),
        ),
    ]
    if model.scans:
        records = _Once(lambda: model.records(batch))
        found += [_operator(name, model, batch, records) for name in ops.BACKENDS if name != "reference"]
        found += [_formula(model, batch, records), _loops(model, batch, records)]
        found += [_our_scan(model, batch, records), _mamba_ssm(model, batch, records)]
    return found


def loop_rows(length: int) -> list[int]:
    """Return the rows of the published loops that are run: the middles of equal parts of the first ones.

    Args:
        length: steps of the route.
    """
    end = min(length, LOOP_LENGTH)
    return sorted({min(end - 1, round((2 * part + 1) * end / (2 * LOOP_ROWS))) for part in range(LOOP_ROWS)})


class _Once:
    """A value made when first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.value = make, None

    def __call__(self) -> Any:
        if self.value is None:
            self.value = self.make()
        return self.value


def _plain(model: nn.Module, images: Tensor) -> Call:
    @torch.no_grad()
    def run() -> object:
        return model(images)

    return run


def _traced(model: nn.Module, images: Tensor) -> Call:
    @torch.no_grad()
    def run() -> object:
        with trace(model, attention="mean") as found:
            logits = model(images)
        return logits, [layer.attention() for layer in found.layers]

    return run


def _operator(name: str, model: Model, batch: int, records: _Records) -> Subject:
    """One backend's hidden attention of all layers."""

    def make(index: int) -> Call:
        record = records()[index]
        reason = ops.BACKENDS[name].unavailable(record)
        if reason:
            raise Unavailable(reason)
        return torch.no_grad()(lambda: ops.hidden_attention(record, backend=name))

    parts = [_part(each, make, index, each.layers) for index, each in enumerate(model.scans)]
    memory, work = estimates.matrix_bytes(model, batch), estimates.attention_work(model, batch, once=True)
    return Subject("attention", name, parts, memory, work)


def _formula(model: Model, batch: int, records: _Records) -> Subject:
    """VMamba's published formula, route by route; its routes are not even merged."""

    def make(index: int) -> Call:
        record = records()[index].map_tensors(Tensor.float)
        delta, B, C = record.delta, record.B[:, :, 0], record.C[:, :, 0]
        A = record.A.expand(-1, -1, record.states)

        @torch.no_grad()
        def run() -> object:
            return [vmamba_formula(delta[:, r], A[r], B[:, r], C[:, r]) for r in range(record.routes)]

        return run

    parts = [_part(each, make, index, each.layers) for index, each in enumerate(model.scans)]
    note = "inexact where sum(delta |A|) exceeds 46; routes not merged"
    memory, work = estimates.formula_bytes(model, batch), estimates.formula_work(model, batch)
    return Subject("attention", "VMamba's formula", parts, memory, work, note=note)


def _loops(model: Model, batch: int, records: _Records) -> Subject:
    """A few rows of the published loops for one route, times what all rows of all routes and layers take."""

    def make(index: int) -> Call:
        record, rows = records()[index].map_tensors(Tensor.float), loop_rows(model.scans[index].length)
        first = slice(0, rows[-1] + 1)
        delta, B, C = record.delta[:, 0, :, first], record.B[:, 0, 0, :, first], record.C[:, 0, 0, :, first]
        return torch.no_grad()(LoopRows(delta, record.A[0].expand(-1, record.states), B, C, rows))

    parts, passes = [], 0
    for index, each in enumerate(model.scans):
        rows = loop_rows(each.length)
        factor = loop_products(range(each.length)) / max(loop_products(rows), 1)
        parts.append(_part(each, make, index, each.layers * each.routes * factor))
        passes += loop_products(rows) * 12 * batch * each.channels * each.states
    shown = f"rows {', '.join(map(str, loop_rows(model.scans[0].length)))}" + " ..." * (len(model.scans) > 1)
    text = f"extrapolated by the number of products from {shown} of one route per shape of layer"
    memory = max(2 * 4 * batch * LOOP_LENGTH * each.channels * (each.states + 1) for each in model.scans)
    return Subject(
        "attention",
        "published loops",
        parts,
        memory,
        counting.Work(0, 0, passes, 0),
        extrapolated=text,
        note=f"all its rows at once would need {estimates.shown(estimates.loop_bytes(model, batch))} per route",
    )


def _our_scan(model: Model, batch: int, records: _Records) -> Subject:
    """Our scan of tensors in scan order, as others' get them: routes neither gathered nor merged."""
    backend = model.backend

    def make(index: int) -> Call:
        u, delta, A, B, C, D = _in_scan_order(records()[index])
        record = ScanRecord.from_scan(u, delta, A, B.unsqueeze(2), C.unsqueeze(2), D)
        return torch.no_grad()(lambda: ops.BACKENDS[backend].selective_scan(record, merged=False))

    parts = [_part(each, make, index, each.layers) for index, each in enumerate(model.scans)]
    return Subject("scan", backend, parts, estimates.scan_bytes(model, batch), estimates.scan_work(model, batch))


def _mamba_ssm(model: Model, batch: int, records: _Records) -> Subject:
    """mamba-ssm's compiled scan on the same tensors, routes side by side as groups, as VMamba calls it."""

    def make(index: int) -> Call:
        if model.device.type != "cuda":
            raise Unavailable("mamba-ssm's scan has no CPU path.")
        try:
            scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        except (ImportError, AttributeError, RuntimeError) as error:
            raise Unavailable(f"mamba-ssm's scan does not import here ({error}).") from error
        u, delta, A, B, C, D = _in_scan_order(records()[index])
        arguments = (
            u.flatten(1, 2), delta.to(u.dtype).flatten(1, 2), A.flatten(0, 1).contiguous(), B.contiguous(),
            C.contiguous(), None if D is None else D.flatten(),
        )  # fmt: skip
        return torch.no_grad()(lambda: scan(*arguments))

    parts = [_part(each, make, index, each.layers) for index, each in enumerate(model.scans)]
    return Subject("scan", "mamba-ssm", parts, estimates.scan_bytes(model, batch), estimates.scan_work(model, batch))


def _part(scans: Scans, make: Callable[[int], Call], index: int, times: float) -> Part:
    return Part(scans, lambda: make(index), times)


def _in_scan_order(record: ScanRecord) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """u, delta, A, B, C, D with routes and one group, contiguous."""
    A = record.A.expand(-1, -1, record.states)
    return (
        record.u.contiguous(), record.delta.contiguous(), A, record.B[:, :, 0].contiguous(),
        record.C[:, :, 0].contiguous(), record.D,
    )  # fmt: skip
