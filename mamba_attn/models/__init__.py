"""Vim and VMamba in plain PyTorch, and a ViT of timm's, by name.

``create`` builds one, with weights of this package, official ones or a file's; ``transform`` is what it is shown of an
image, ``names`` are all there are.
"""

from mamba_attn.models.registry import create, names, transform

__all__ = ["create", "names", "transform"]
