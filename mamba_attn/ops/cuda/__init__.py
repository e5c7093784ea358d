"""The fused CUDA backend: finds the driver and NVRTC, compiles ``cuda/``, and launches it as PyTorch operators.

Nothing here is public: ``mamba_attn.ops`` chooses it, or ``backend="fused"`` asks for it.
"""
