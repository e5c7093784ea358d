"""Explains images: maps, matrices and rows of a model's attention, as pages, pictures and arrays.

``explain`` does it all; ``mamba-attn explain`` is the same as a command.
"""

from mamba_attn.explanations.answer import Answer
from mamba_attn.explanations.explaining import explain

__all__ = ["Answer", "explain"]
