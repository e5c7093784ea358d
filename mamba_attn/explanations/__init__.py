"""From an image file to a page, a picture and arrays about it: what ``mamba-attn explain`` does.

It serves the command and promises nothing else. In code, use ``mamba_attn.attribution`` and ``mamba_attn.figures``.
"""
