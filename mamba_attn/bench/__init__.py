"""What hidden attention costs on this machine, and what it could cost.

``mamba-attn bench`` prints it; nothing here is public.
"""
