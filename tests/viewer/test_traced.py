"""Pages of a forward pass that no store holds: images, a volume, texts; read and seen in a browser."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mamba_attn
from benchmarks.browser import served
from mamba_attn.core.layout import TokenLayout
from mamba_attn.datasets.texts import encode
from mamba_attn.images import samples
from mamba_attn.viewer import notebook
from mamba_attn.viewer.source import Source, patches_of, sheet_of, tokens_of
from mamba_attn.viewer.state import Pane
from mamba_attn.viewer.traced import Traced, traced
from tests.viewer.browsing import Viewer

TEXT = "the king said to the queen"


@pytest.fixture(scope="module")
def text():
    return traced(mamba_attn.load("mamba_plays"), TEXT)


@pytest.fixture(scope="module")
def volume():
    """Two volumes of 4 x 3 x 5 patches of 2 x 4 x 4 pixels, by a small network."""
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv3d(1, 16, (2, 4, 4), (2, 4, 4))
            self.layers = mamba_attn.models.create("mamba_copy", embed_dim=16, depth=2).layers

        def forward(self, x):
            x = self.patches(x).flatten(2).mT
            for layer in self.layers:
                x = layer(x)
            return x

    model = Network().eval()
    layout = TokenLayout(grid=(4, 3, 5), patch_size=(2, 4, 4))
    with torch.no_grad(), mamba_attn.trace(model, layout=layout) as record:
        model(torch.rand(2, 1, 8, 12, 20))
    return Traced(record)


def test_a_trace_has_a_store_s_interface(volume):
    layer = volume.layers[1]
    with torch.no_grad():
        expected = layer.record.attention().numpy()
    np.testing.assert_allclose(volume.mean(layer), expected.mean(0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(volume.variance(layer), expected.var(0), rtol=1e-3, atol=1e-12)
    np.testing.assert_array_equal(volume.matrix(layer, volume.images[1], 0), expected[1])
    lines = volume.lines(layer, 3, 5, image=volume.images[0], columns=True)
    np.testing.assert_array_equal(lines, expected[0][:, 3:5].T)
    assert [start for start, _ in volume.feature_rows(layer, 1)] == [0, 1]
    assert layer.orders.tolist() == [list(range(60))]


def test_slices_of_a_volume_lie_on_a_sheet(volume):
    layout = volume.layers[0].layout
    assert sheet_of(layout) == (6, 10, 2)  # two slices of 3 x 5 next to each other, two such rows
    order = np.arange(60).reshape(4, 3, 5)
    expected = np.block([[order[0], order[1]], [order[2], order[3]]])
    assert patches_of(layout) == expected.ravel().tolist()
    assert tokens_of(layout, [7]) == [17]  # sheet row 0, column 7: slice 1, column 2
    assert volume.pixels(volume.images[0]).shape == (24, 40, 3)
    assert sheet_of(TokenLayout(grid=(7, 3))) == (7, 3, 0)
    assert sheet_of(TokenLayout.line(9)) == (1, 9, 0)


def test_a_model_is_run_on_images_and_on_a_text(text):
    shown = traced(mamba_attn.load("vmamba_micro", weights="demo"), samples()[:2], labels=["dress", "cat"])
    assert [image.key for image in shown.images] == [path.name for path in samples()[:2]]
    assert all(image.predicted in shown.classes for image in shown.images)
    assert [image.correct for image in shown.images] == [
        shown.images[0].predicted == "dress",
        None,
    ]  # a cat is no class
    assert shown.pixels(shown.images[0]).shape == (128, 128, 3)
    assert "".join(text.images[0].words) == TEXT
    assert text.pixels(text.images[0]) is None
    with pytest.raises(ValueError, match="expected paths of images, or a text"):
        traced(mamba_attn.load("vmamba_micro"), [])
    with pytest.raises(ValueError, match="reads text: expected inputs= as a text"):
        traced(mamba_attn.load("mamba_plays"), [TEXT])


def test_names_are_one_for_each_image(volume):
    with torch.no_grad(), mamba_attn.trace(model := mamba_attn.models.create("mamba_copy")) as record:
        model(torch.zeros(2, 5, dtype=torch.int64))
    assert [image.words for image in Traced(record).images] == [("0",) * 5] * 2
    with pytest.raises(ValueError, match="expected 2, one for each image"):
        Traced(record, keys=["one"])


def test_images_of_one_name_are_not_taken_for_each_other(volume):
    twins = copy(volume)
    twins.images = [replace(image, key="same") for image in volume.images]
    source = Source(twins)
    for number in (0, 1):
        row = source.read(Pane(what="image", image=number), [7])
        np.testing.assert_array_equal(row, volume.matrix(volume.layers[0], volume.images[number])[7])
        np.testing.assert_array_equal(source.pixels(Pane(image=number)), volume.pixels(volume.images[number]))


def test_a_text_is_a_line_of_tokens(browser, text):
    with served(text) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        viewer = Viewer(page, address).open()
        viewer.heat(np.abs(text.matrix(text.layers[-1], text.images[0])[-1]))
        page.get_by_role("heading", name="What token 25 “n” takes from · block 2").wait_for()
        assert page.locator(".tokens").inner_text() == TEXT
        assert page.locator(".tokens .chosen").inner_text() == "n"
        assert "The text is cut into tokens." in page.locator("#lead").inner_text()
        page.locator(".tokens span").nth(6).click()
        viewer.heat(np.abs(text.matrix(text.layers[-1], text.images[0])[6]))
        page.locator(".tokens span").nth(3).hover()
        page.locator("#card", has_text="token 3 “ ”").wait_for()
        page.keyboard.press("ArrowLeft")
        viewer.lit([5])
        page.locator("#strip button").first.click()
        viewer.heat(np.abs(text.matrix(text.layers[0], text.images[0])[5]))
        assert not page.locator("#starts, #photos").first.is_visible()
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.close()
    assert viewer.wrong == []


def test_several_texts_are_called_texts(browser, tmp_path):
    model = mamba_attn.load("mamba_plays")
    batch = torch.cat([encode(model.tokenizer, each) for each in (TEXT, TEXT[::-1])])
    with torch.no_grad(), mamba_attn.trace(model.model) as record:
        model.model(batch)
    file = tmp_path / "texts.html"
    file.write_text(notebook(record, model=model).page, encoding="utf-8")
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    viewer = Viewer(page, file.as_uri()).open()
    assert "2 texts" in page.locator("#where").inner_text()
    assert page.locator("#maps b").all_inner_texts() == ["This text", "Usual", "What is special here"]
    assert "mean of 2 texts" in page.locator("#maps").inner_text()
    assert page.get_by_label("colour", exact=True).inner_text() == "place\nrank"
    for state in ("", "show=spread", "mode=blocks", "show=classes"):
        viewer.open(state)
        assert "photo" not in page.locator("main").inner_text(), state
    page.close()
    assert viewer.wrong == []


def test_a_volume_is_a_sheet_of_slices(browser, volume, tmp_path):
    file = tmp_path / "volume.html"
    file.write_text(notebook(volume).page, encoding="utf-8")
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    viewer = Viewer(page, file.as_uri()).open("sign=signed")
    matrix = volume.matrix(volume.layers[1], volume.images[0])[:, patches_of(volume.layers[1].layout)]
    token = np.ravel_multi_index((2, 1, 2), (4, 3, 5))
    viewer.heat(matrix[token], tolerance=1e-3)
    page.get_by_role("heading", name="What patch (2, 1, 2) takes from").wait_for()
    page.mouse.click(*viewer.cell(5, 9))  # the last patch: slice 3, row 2, column 4
    viewer.heat(matrix[59], tolerance=1e-3)
    page.get_by_role("heading", name="What patch (3, 2, 4) takes from").wait_for()
    page.close()
    assert viewer.wrong == []


def test_a_notebook_shows_traces_and_models(volume):
    assert "mamba_plays" in notebook(mamba_attn.load("mamba_plays"), inputs=TEXT)._repr_html_()
    model = mamba_attn.load("mamba_copy")
    with torch.no_grad(), mamba_attn.trace(model.model) as record:
        model.model(torch.zeros(1, 6, dtype=torch.int64))
    assert "Where does mamba_copy look?" in notebook(record, model=model).page
    with pytest.raises(ValueError, match="or a text for a model that reads texts"):
        notebook(mamba_attn.load("mamba_plays"))
