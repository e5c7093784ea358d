"""Effective receptive fields: how far away the pixels and tokens are that a place of the output depends on.

``receptive_field`` measures it by gradients, ``Reach`` by the attention matrices; ``page`` shows both. Imported on
demand only, because it needs captum.
"""

from mamba_attn.erf.fields import ReceptiveField, receptive_field
from mamba_attn.erf.reach import Reach

__all__ = ["Reach", "ReceptiveField", "receptive_field"]
