"""Everything that touches a user's model: ``trace``, what it records of each layer, and the adapters that read mixers.

Hooks, replaced forwards and rules live for one ``with`` block; when it ends, the model is as it was.
"""

from mamba_attn.tracing.adapters import Adapter, AttentionAdapter, register_adapter
from mamba_attn.tracing.tracer import Trace, trace

__all__ = ["Adapter", "AttentionAdapter", "Trace", "register_adapter", "trace"]
