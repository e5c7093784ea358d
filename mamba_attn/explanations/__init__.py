"""Behind ``mamba-attn explain``: turns an image file into a page, a picture and arrays.

It serves the command and promises nothing else. In code, use ``mamba_attn.attribution`` and ``mamba_attn.figures``.
"""
