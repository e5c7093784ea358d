"""The native CPU backend: one C++ file, compiled at first use and called on plain tensors.

Nothing here is public: ``mamba_attn.ops`` chooses it, or ``backend="native"`` asks for it.
"""
