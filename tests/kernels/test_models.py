"""Whole models on the kernels: the traced pass, and every parameter's gradient, the gate's among them."""

from collections.abc import Iterator

import pytest
import torch

import mamba_attn
from mamba_attn.ops.cuda import fused
from tests.kernels.machines import MACHINES, Recorder, machine

SMALL = {"vim_micro": {"depth": 2}, "vmamba_micro": {"depths": (1, 1, 1, 1)}}


@pytest.fixture(params=MACHINES)
def there(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with machine(request.param) as recorder:
        yield recorder


def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = mamba_attn.models.create(name, image_size=64, **SMALL[name])
    return model.to(torch.get_default_device())


@pytest.mark.parametrize("name", SMALL)
def test_a_traced_pass_is_one_launch_a_layer_and_the_matrices_are_the_blocked_ones(there: Recorder, name: str) -> None:
    model, images = small(name), torch.randn(1, 3, 64, 64)
    for _ in range(2):  # the first pass also compares the adapter with the model's own forward
        there.launched.clear()
        with torch.no_grad(), mamba_attn.trace(model, attention="mean") as trace:
            model(images)
    matrices = [layer.attention() for layer in trace.layers]
    assert len(there.launched) == len(matrices)
    assert all(kernel.startswith("attention_") for kernel in there.launched)
    for layer, matrix in zip(trace.layers, matrices, strict=True):
        plain = layer.attention(backend="blocked")
        torch.testing.assert_close(matrix, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_the_gradient_of_the_other_backends(
    there: Recorder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(2, 3, 64, 64)
    results = []
    for kernels in (True, False):
        model = small(name)
        if not kernels:
            monkeypatch.setattr(fused.Fused, "unavailable", lambda self, record: "not now.")
        logits = model(images)
        torch.nn.functional.cross_entropy(logits, torch.tensor([3, 5])).backward()
        results.append({key: value.grad for key, value in model.named_parameters()})
    assert there.launched.count("selective_scan_backward") == there.launched.count("selective_scan") > 0
    for key, gradient in results[0].items():
        plain = results[1][key]
        scale = plain.abs().max().item()
        torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=key: f"{n}: {m}")
