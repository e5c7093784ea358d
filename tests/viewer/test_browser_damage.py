"""In a real browser: a store that is damaged while it is shown, and a model whose weights are gone."""

import shutil

import pytest

from benchmarks.browser import served
from mamba_attn.analytics import AttentionStore, collect
from tests.analytics.cases import folder_of, request
from tests.viewer.browsing import Explorer


@pytest.fixture
def folder(tmp_path):
    collect(request(folder_of(tmp_path, 1), "vmamba_micro", keep=1), tmp_path / "store")
    return tmp_path / "store"


def test_damage_is_a_sentence_in_place_of_the_picture(browser, folder):
    shutil.rmtree(folder / next(folder.glob("statistics-*")).name / "001" / "mean" / "sum" / "c")
    with served(AttentionStore.open(folder)) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        opened = Explorer(page, address)
        opened.open(address)
        page.keyboard.press("]")  # the block whose numbers are lost
        notices = page.locator(".notice", has_text="'001/mean/sum' is missing or damaged (numbers are missing)")
        notices.nth(1).wait_for()
        assert opened.drawn("patches")["z"] is None
        assert opened.drawn("scatter")["points"] == opened.drawn("scatter")["traces"] == 0
        page.get_by_title("save the patches view as NPZ").click()
        page.locator("#message", has_text="numbers are missing").wait_for()
        page.keyboard.press("[")
        opened.wait("Where patches look, on average")
        page.wait_for_function("document.querySelector('.graph.patches .js-plotly-plot')._fullData.length > 2")
        assert page.locator("#message").inner_text() == ""
        page.close()
    assert opened.wrong == []


def test_weights_that_moved_are_a_sentence(browser, folder):
    with served(AttentionStore.open(folder)) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        opened = Explorer(page, address)
        opened.open(address)
        opened.choose("show", "this image")
        page.get_by_text("Display", exact=True).click()
        page.get_by_text("D", exact=True).click()  # which needs the model, of weights that are in no file
        page.locator(".notice", has_text="eights").wait_for()
        assert opened.drawn("patches")["z"] is None
        page.close()
    assert opened.wrong == []
