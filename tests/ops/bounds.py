"""How far a result may be from the truth: a part of the same sum with every term's absolute value."""

import torch

from mamba_attn.core.scan_record import ScanRecord

TINY = 1e-34  # below the smallest normal float32 entries count as zero


def excess(value: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> float:
    """Largest |value - truth| / bound; bound is the sum of the terms' absolute values."""
    return float((((value.double() - truth).abs() - TINY).clamp(min=0) / bound.clamp(min=TINY)).max())


def assert_within(value: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor, tolerance: float) -> None:
    """|value - truth| <= tolerance x bound, element by element; bound is the sum of the terms' absolute values."""
    excess = (value.double() - truth).abs() - tolerance * bound - TINY
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"entry {worst}: {value.flatten()[worst].item():.9g} against {truth.flatten()[worst].item():.9g}, "
        f"bound {bound.flatten()[worst].item():.3g}"
    )


def magnitude(record: ScanRecord) -> ScanRecord:
    """The record whose sums have every term's absolute value."""
    return record.replace(
        source_u=record.source_u.abs(), source_B=record.source_B.abs(), source_C=record.source_C.abs(),
        D=None if record.D is None else record.D.abs(),
        source_gain=None if record.source_gain is None else record.source_gain.abs(),
    )  # fmt: skip


def weights(record: ScanRecord) -> dict[str, torch.Tensor]:
    rows = torch.randn(record.batch, record.channels, record.tokens, dtype=record.A.dtype)
    columns = torch.randn(record.batch, record.routes, record.channels, record.length, dtype=record.A.dtype)
    return {"row_weight": rows, "col_weight": columns}
