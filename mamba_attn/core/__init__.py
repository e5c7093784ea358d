"""The records that everything else is computed from: what a scan or a softmax layer did, and where its tokens lie.

Plain data and the rules that are defined on it; nothing here knows a model or runs a kernel.
"""

from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord

__all__ = ["AttentionRecord", "ScanRecord", "TokenLayout"]
