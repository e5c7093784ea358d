"""Vim and VMamba in plain PyTorch, and timm's ViT, by name."""

from mamba_attn.models.registry import create, names, transform

__all__ = ["create", "names", "transform"]
