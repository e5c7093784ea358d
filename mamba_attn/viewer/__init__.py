"""The viewer: one page that shows where patches look, live or frozen into a file.

``mamba-attn explore`` serves it, ``mamba-attn report`` writes it; ``notebook`` shows it in a cell, and ``scatter`` the
points alone, however many.
"""

from mamba_attn.viewer.notebook import notebook
from mamba_attn.viewer.widget import scatter

__all__ = ["notebook", "scatter"]
