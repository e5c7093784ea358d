"""Gradients of gradients through the CPU kernel, against the blocked path's in float64."""

import pytest
import torch

from mamba_attn import ops


def inputs(dtype):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.rand(*shape, generator=generator).to(dtype).requires_grad_()

    return draw(2, 6, 5), draw(2, 6, 5), draw(6, 3), draw(2, 3, 5), draw(2, 3, 5), draw(6)


def scan(backend, u, delta, A, B, C, D):
    return ops.selective_scan(u, delta, -A, B, C, D, backend=backend)


def attention(backend, u, delta, A, B, C, D):
    return ops.hidden_attention(delta, -A, B, C, backend=backend)


@pytest.mark.parametrize("what", [scan, attention])
def test_gradient_penalties(what):
    """Their gradient needs the backward pass's own; the first input alone also reaches the penalty by another path."""
    found = {}
    for backend, dtype in (("native", torch.float32), ("blocked", torch.float64)):
        tensors = inputs(dtype)
        y = what(backend, *tensors)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True, allow_unused=True)
        used = [gradient for gradient in first if gradient is not None]
        penalty = sum(gradient.square().sum() for gradient in used) + tensors[1].pow(3).sum()
        found[backend] = torch.autograd.grad(penalty, tensors, allow_unused=True)
    for ours, exact in zip(found["native"], found["blocked"], strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), exact, rtol=2e-4, atol=2e-4 * exact.abs().max().item())
