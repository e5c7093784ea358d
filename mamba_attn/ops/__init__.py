"""The operators: the hidden attention of a selective scan, its rows, columns and products, the scan and its states.

Each validates once, chooses a backend and calls it. ``delta`` is after bias and softplus; ``A`` is negative.
Half-precision inputs are computed and returned in float32.
"""

from mamba_attn.ops.arguments import FOLDS
from mamba_attn.ops.attention import hidden_attention, hidden_attentions, selective_scan
from mamba_attn.ops.dispatch import BACKENDS, free_bytes, require_bytes
from mamba_attn.ops.linear import attention_column, attention_row, left_product, right_product
from mamba_attn.ops.states import scan_states

__all__ = [
    "BACKENDS",
    "FOLDS",
    "attention_column",
    "attention_row",
    "free_bytes",
    "hidden_attention",
    "hidden_attentions",
    "left_product",
    "require_bytes",
    "right_product",
    "scan_states",
    "selective_scan",
]
