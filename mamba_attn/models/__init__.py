"""Vim, VMamba and a small Mamba language model in plain PyTorch, and timm's ViT, by name.

``create`` builds one, with weights of this package, official ones or a file's; ``transform`` prepares images for it;
``names`` lists all.
"""

from mamba_attn.models.registry import create, names, transform

__all__ = ["create", "names", "transform"]
