"""Statistics that would not fit: refused before anything is allocated, with what would."""

import numpy as np
import pytest
import torch

from mamba_attn.analytics import collect, sizes
from mamba_attn.analytics.index import StoredLayer
from mamba_attn.analytics.sizes import batch_size, part_size, require_memory
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import MatrixTooLargeError
from tests.analytics import cases


def layer(name, side, routes=4, kind="selective scans"):
    tokens = side * side
    orders = np.tile(np.arange(tokens), (routes, 1))
    return StoredLayer(name, kind, 0, 0, routes, TokenLayout((side, side)), orders, tokens <= 512)


LAYERS = [layer("a", 56), layer("b", 28), layer("c", 14)]
SUM, EACH = 16, 5 * 16


def free(monkeypatch, count):
    monkeypatch.setattr(sizes, "free_bytes", lambda device: count + sizes._RESERVE)


def test_what_would_fit(monkeypatch):
    free(monkeypatch, 1_040_612_608)
    require_memory(LAYERS, "each", 1)
    free(monkeypatch, 8 * 10**8)
    with pytest.raises(MatrixTooLargeError) as caught:
        require_memory(LAYERS, "each", 1)
    assert str(caught.value) == (
        "means and variances of 3 layers (the largest, a: 4 routes, 3136 x 3136) need 1,040,612,608 bytes, 800,000,000 "
        "are free. What would fit: routes='sum'; or batch=1 layers=['b', 'c']. Rows and columns take "
        "linear memory: trace(model), then layer.row(token), layer.column(token)."
    )
    free(monkeypatch, 11 * 10**8)
    with pytest.raises(MatrixTooLargeError, match=r"What would fit: batch=1; or routes='sum'\. Rows"):
        require_memory(LAYERS, "each", 3)
    free(monkeypatch, 2 * 10**6)
    with pytest.raises(MatrixTooLargeError, match=r"What would fit: batch=1 routes='sum' layers=\['c'\]\. Rows"):
        require_memory(LAYERS, "each", 1)
    free(monkeypatch, 10**5)
    with pytest.raises(MatrixTooLargeError, match=r"None of the layers would fit\. Rows and columns take linear"):
        require_memory(LAYERS, "each", 1)


def test_batches_fit_their_matrices():
    assert [batch_size([each]) for each in LAYERS] == [1, 13, 16]
    assert batch_size([layer("huge", 80)]) == 1


def test_parts_are_few_and_short():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [part_size(LAYERS[2:], wanted, cpu) for wanted in (1, 640, 1280, 50_000, 1_281_167)] == [
        64,
        80,
        160,
        1024,
        1024,
    ]
    assert part_size(LAYERS, 1_281_167, gpu) == 1024
    assert part_size(LAYERS, 1_281_167, cpu) == 2**30 // 3136**2  # images of which each takes seconds


def test_nothing_is_made_when_it_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "_UNASKED", 0)
    free(monkeypatch, 10)
    with pytest.raises(MatrixTooLargeError, match="None of the layers would fit"):
        collect(cases.request(cases.folder_of(tmp_path, 1)), tmp_path / "store")
    assert not (tmp_path / "store").exists()
