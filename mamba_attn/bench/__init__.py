"""``mamba-attn bench``: what hidden attention costs on this machine, beside what it could cost."""
