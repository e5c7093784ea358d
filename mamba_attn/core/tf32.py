"""TF32: whether a GPU may round the inputs of float32 products and convolutions, and how to forbid it for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _switches() -> tuple[str, list[Any]]:
    """The attribute that says so, and its owners. Once torch 2.9's is set, reading the older one may raise."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return "fp32_precision", [matmul, cudnn.conv]  # type: ignore[attr-defined]
    return "allow_tf32", [matmul, cudnn]


def tf32_allowed() -> bool:
    """Whether products or convolutions may be rounded."""
    name, owners = _switches()
    return any(getattr(owner, name) in (True, "tf32") for owner in owners)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Forbid it inside the block; afterwards the user's choice is as before."""
    name, owners = _switches()
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, "ieee" if name == "fp32_precision" else False)
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            setattr(owner, name, value)
