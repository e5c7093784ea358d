"""A report: the page frozen with its data into one file, without a server or a network.

``mamba-attn report`` writes it; nothing here is public.
"""
