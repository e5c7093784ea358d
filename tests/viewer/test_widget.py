"""Points as a widget of jupyter-scatter; with the real package where it is installed."""

import importlib.util

import numpy as np
import pytest

from mamba_attn.viewer import scatter
from mamba_attn.viewer.points import Scatter
from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import Pane
from tests.viewer.double import tiny

installed = pytest.mark.skipif(
    importlib.util.find_spec("jscatter") is None, reason="jupyter-scatter is not installed: .ci/run puts it aside"
)


@pytest.fixture(scope="module")
def store():
    return tiny()


def test_without_the_package_the_sentence_says_what_to_install(store, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"jupyter-scatter not installed: pip install 'mamba_attn\[scatter\]'"):
        scatter(store)


@installed
@pytest.mark.filterwarnings("ignore")  # of foreign packages
def test_patches_are_selected_by_their_tokens(store):
    found = scatter(store, 1, colour="row", height=300)
    table = found._data  # as it was given
    np.testing.assert_allclose(table[["x", "y"]], Scatter(Source(store)).points(Pane(layer=1)), rtol=1e-6)
    assert table.loc[17, ["row", "column"]].tolist() == [2, 5]  # of a grid of 4 x 6
    assert found.selection([17, 3]).selection().tolist() == [17, 3]
    assert found.color()["by"] == "row"
    assert found.height() == 300


@installed
@pytest.mark.filterwarnings("ignore")
def test_blocks_are_coloured_by_class_and_selected_by_pairs(store):
    found = scatter(store, 3, mode="blocks")
    table = found._data  # as it was given
    assert table.index.tolist() == [(block, image) for block in (0, 1) for image in range(4)]
    assert table["class"].tolist() == ["cat", "dog"] * 4
    assert found.color()["by"] == "class"
    assert found.selection([(1, 2)]).selection().tolist() == [(1, 2)]
    assert scatter(store, 3, mode="blocks", colour="block")._data["block"].tolist() == ["0"] * 4 + ["1"] * 4


@installed
@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments_are_sentences(store):
    for wrong in ({"layer": 5}, {"mode": "every"}, {"direction": "up"}, {"method": "mds"}, {"colour": "class"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            scatter(store, **wrong)
