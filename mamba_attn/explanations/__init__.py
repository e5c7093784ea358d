"""Explains images and texts: maps, matrices and rows of a model's attention, as pages, pictures and arrays.

``explain`` and ``explain_text`` do it all; ``mamba-attn explain`` is the same as a command.
"""

from mamba_attn.explanations.answer import Answer
from mamba_attn.explanations.explaining import explain
from mamba_attn.explanations.texts import TextAnswer, explain_text

__all__ = ["Answer", "TextAnswer", "explain", "explain_text"]
