"""What a notebook shows: pictures that are whole, names that stay text, sentences instead of errors."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_attn import models, trace
from mamba_attn.core import notebook
from mamba_attn.figures import colours
from mamba_attn.tracing.layers import ScanLayer
from tests.analytics.cases import subject


def pictures(text):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB"))
        for found in re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    ]


@pytest.mark.parametrize("values", [np.linspace(0, 1, 35), np.linspace(-1, 3, 35), np.zeros(35), -np.ones(35)])
def test_colours_are_those_of_the_figures(values):
    values = values.reshape(5, 7)
    limits = colours.limits(values)
    palette = colours.DIVERGING if limits["signed"] else colours.VIRIDIS
    expected = colours.to_rgb(values, colours.scale(values, colours=palette, **limits))
    assert np.abs(notebook.coloured(values).astype(int) - expected.astype(int)).max() <= 1


def test_large_maps_are_averaged_over_blocks():
    values = np.arange(300 * 40.0).reshape(300, 40)
    cells = notebook._smaller(values)
    assert cells.shape == (100, 14)
    assert cells[3, 2] == values[9:12, 6:9].mean()
    assert cells[-1, -1] == values[297:, 39:].mean()


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro", "vit_micro"])
def test_a_layer_shows_the_row_and_the_column_of_the_patch_in_the_middle(name):
    model = subject(name).model
    with torch.no_grad(), trace(model) as record:
        model(torch.randn(2, 3, 24, 40))
    layer = record.layers[0]
    height, width = layer.layout.grid
    token = int(layer.layout.patches[height // 2 * width + width // 2])
    text = layer._repr_html_()
    matrix = layer.attention()[0].numpy()
    for found, line in zip(pictures(text), (matrix[token], matrix[:, token]), strict=True):
        values = line[layer.layout.patches.numpy()].reshape(height, width)
        assert found.shape == (height, width, 3)
        assert np.abs(found.astype(int) - notebook.coloured(values)).max() <= 1
    assert f"grid <b>{height} x {width}</b>" in text
    assert ("heads" if name == "vit_micro" else "routes") in text
    whole = record._repr_html_()
    assert all(text in whole for text in (layer._repr_html_() for layer in record.layers))


def test_a_layer_without_a_place_or_with_nan_says_so():
    model = subject("vim_micro").model
    with torch.no_grad(), trace(model) as record:
        model(torch.full((1, 3, 24, 40), torch.nan))
    assert "contain NaN or Inf" in record.layers[0]._repr_html_()
    with torch.no_grad(), trace(model.layers, layout=None) as parts:
        pass
    assert "No layer has run yet" in parts._repr_html_()
    scan = record.layers[0].scan
    bare = ScanLayer("bare", scan.replace(layout=None, source_u=torch.zeros_like(scan.source_u)))
    assert "the tokens&#x27; place in the image is not known" in bare._repr_html_()
    bare.name = "<b onclick=alert(1)>"
    assert "<b onclick" not in bare._repr_html_()


def test_many_layers_are_named(monkeypatch):
    from mamba_attn.tracing import tracer

    monkeypatch.setattr(tracer, "_SHOWN", 1)
    model = models.create("vim_micro", image_size=24, depth=3, embed_dim=16)
    with torch.no_grad(), trace(model) as record:
        model(torch.randn(1, 3, 24, 24))
    assert "and 2 more: layers.1.mixer, layers.2.mixer" in record._repr_html_()
