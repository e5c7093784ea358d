"""Vim and VMamba in plain PyTorch, by name."""

from mamba_attn.models.registry import create, names

__all__ = ["create", "names"]
