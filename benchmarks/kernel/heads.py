"""What one Mamba-2 layer costs folded per head, and its channels spelt out: a head's matrix once for every channel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel.inputs import Shape, inputs
from benchmarks.kernel.timing import Spread, interleave, paired
from benchmarks.report import Figure, figure, show
from benchmarks.verify import require_exact
from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord

HEADS, WIDTH, STATES = 24, 64, 128  # of mamba2-130m
LENGTHS = (64, 256)


def layer(length: int) -> ScanRecord:
    """One layer at initialisation: step sizes of ``inputs``, A = -1..-16 over the heads, one group."""
    delta, _, B, C = inputs(Shape(HEADS, STATES, length))
    A = -torch.linspace(1, 16, HEADS).view(1, HEADS, 1)
    u = torch.randn(1, 1, HEADS * WIDTH, length, generator=torch.Generator().manual_seed(1))
    return ScanRecord.from_scan(u, delta[:, None], A, B[:, None, None], C[:, None, None])


def spelt_out(record: ScanRecord) -> ScanRecord:
    """The same scans, as channels with heads and states of their own."""
    delta, A = (x.repeat_interleave(WIDTH, axis) for x, axis in ((record.source_delta, 2), (record.A, 1)))
    return record.replace(source_delta=delta, A=A.expand(-1, -1, STATES).contiguous())


def calls(record: ScanRecord) -> dict[str, Callable[..., Tensor]]:
    """What is measured, by name; each takes the record."""
    length = record.length
    gradient = torch.randn(record.u.shape, generator=torch.Generator().manual_seed(2))
    weighted = {"row_weight": gradient, "col_weight": record.u, "fold": "sum"}
    vector = torch.ones(1, length)
    return {
        "mean": lambda x: ops.hidden_attention(x),
        "absolute": lambda x: ops.hidden_attention(x, fold="absolute"),
        "gradient": lambda x: ops.hidden_attention(x, **weighted),
        "row": lambda x: ops.attention_row(x, row=length - 1),
        "gradient row": lambda x: ops.attention_row(x, row=length - 1, **weighted),
        "left product": lambda x: ops.left_product(x, vector=vector),
    }


def run_heads(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Every call per head and spelt out, in turn, after both were found equal."""
    figures, details, rows = [], {"heads": HEADS, "width": WIDTH, "states": STATES}, []
    for length in LENGTHS:
        record = layer(length)
        plain = spelt_out(record)
        for name, call in calls(record).items():
            ours, theirs = call(record), call(plain)
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            require_exact(name, error)
            both = {"per head": lambda c=call, x=record: c(x), "spelt out": lambda c=call, x=plain: c(x)}
            times = interleave(both, 2 if quick else 15)
            spreads = {how: Spread.of([1e3 * t for t in sample]) for how, sample in times.items()}
            ratio = paired(times["spelt out"], times["per head"])
            details[f"{name}, L {length}"] = {"milliseconds": spreads, "times faster": ratio, "difference": error}
            rows.append((name, str(length), *(f"{x.median:.2f}" for x in (*spreads.values(), ratio)), f"{error:.1e}"))
            if name in ("mean", "gradient"):
                figures.append(figure(f"heads {length}", f"fold {name}, native", spreads["per head"]))
    show("milliseconds", ("what", "length", "per head", "spelt out", "times faster", "difference"), rows)
    return figures, details
