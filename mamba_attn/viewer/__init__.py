"""The viewer: one page that shows where patches look, live or frozen into a file.

``mamba-attn explore`` serves it, ``mamba-attn report`` writes it; ``notebook`` shows it in a cell.
"""

from mamba_attn.viewer.notebook import notebook

__all__ = ["notebook"]
