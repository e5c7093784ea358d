"""Exact hidden attention of vision Mamba models, from forward hooks, as explanations and pictures."""

from pathlib import Path

_HERE = Path(__file__).parent
if not (_HERE / "integrations").is_dir():
    # in a checkout, integrations/ and cuda/ stand beside this package; in a wheel they are inside it
    __path__.append(str(_HERE.parent))

from mamba_attn import models, orders, ops  # noqa: E402, I001
from mamba_attn.tracing.adapters import Adapter, AttentionAdapter, register_adapter  # noqa: E402
from mamba_attn.errors import MambaAttnError  # noqa: E402
from mamba_attn.core.layout import TokenLayout  # noqa: E402
from mamba_attn.ops import (  # noqa: E402
    attention_column,
    attention_row,
    hidden_attention,
    left_product,
    right_product,
    selective_scan,
)
from mamba_attn.core.scan_record import ScanRecord  # noqa: E402
from mamba_attn.core.attention_record import AttentionRecord  # noqa: E402
from mamba_attn.stand_ins import cpu_stand_ins  # noqa: E402
from mamba_attn.tracing.tracer import Trace, trace  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AttentionAdapter",
    "AttentionRecord",
    "MambaAttnError",
    "ScanRecord",
    "TokenLayout",
    "Trace",
    "attention_column",
    "attention_row",
    "cpu_stand_ins",
    "hidden_attention",
    "left_product",
    "models",
    "ops",
    "orders",
    "register_adapter",
    "right_product",
    "selective_scan",
    "trace",
]
