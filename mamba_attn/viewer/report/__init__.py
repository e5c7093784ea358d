"""A report: the explorer's two linked views of stores of attention in one file, without a server or a network.

``mamba-attn report`` writes it; nothing here is public.
"""
