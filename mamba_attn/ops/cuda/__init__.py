"""The fused CUDA backend: finds the driver and NVRTC, compiles ``cuda/``, and launches it as PyTorch operators."""
