"""Vim and VMamba in plain PyTorch, and a ViT of timm's beside them, by name."""

from mamba_attn.models.registry import create, names, transform

__all__ = ["create", "names", "transform"]
