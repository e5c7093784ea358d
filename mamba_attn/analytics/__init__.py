"""Visual analytics: the attention of a model over many images, collected once, then explored in many ways.

``mamba-attn collect`` makes a store, ``AttentionStore.open`` reads it; in code, ``collect`` does.
"""

from mamba_attn.analytics.collecting import Collected, collect, collect_part, missing_parts
from mamba_attn.analytics.index import StoredImage, StoredLayer
from mamba_attn.analytics.merging import merge_stores
from mamba_attn.analytics.request import Request
from mamba_attn.analytics.store import AttentionStore, NotStoredError

__all__ = [
    "AttentionStore",
    "Collected",
    "NotStoredError",
    "Request",
    "StoredImage",
    "StoredLayer",
    "collect",
    "collect_part",
    "merge_stores",
    "missing_parts",
]
