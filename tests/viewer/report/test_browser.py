"""The frozen page in a real browser, from the disk: the same page, without a server."""

import numpy as np
import pytest

from benchmarks.browser import served
from mamba_attn.viewer import notebook
from mamba_attn.viewer.report.quantised import ERROR
from tests.viewer.browsing import Viewer
from tests.viewer.report import cases

MIDDLE = 4 * 12 + 6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return cases.stored(tmp_path_factory.mktemp("vmamba"))


@pytest.fixture(scope="module")
def file(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(cases.report(store)[0], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def address(file):
    return file.as_uri()


def heat(viewer, store, expected, what="image"):
    viewer.heat(expected, what, tolerance=4 * ERROR * 8)


def test_the_page_works_from_the_disk(viewer, store):
    assert "photos" in viewer.page.locator("#where").inner_text()
    page, kept = viewer.page, next(at for at, image in enumerate(store.images) if image.kept)
    image, mean = store.matrix(0, kept), store.mean(0)
    heat(viewer, store, image[MIDDLE])
    heat(viewer, store, mean[MIDDLE], "mean")
    heat(viewer, store, (image - mean)[MIDDLE], "difference")
    page.mouse.click(*viewer.cell(2, 3))
    heat(viewer, store, image[27])
    viewer.lit([27])
    page.locator("#card button").first.wait_for()
    nearest = np.argsort(np.linalg.norm(mean - mean[27], axis=1))[1:7]
    assert page.locator("#card button").all_inner_texts()[:-1] == [f"({at // 12}, {at % 12})" for at in nearest]
    page.keyboard.press("3")
    heat(viewer, store, store.matrix(0, kept, 2)[27])
    viewer.choose("a patch", "gives to")
    heat(viewer, store, store.mean(0, 2)[:, 27], "mean")
    viewer.points(96)
    page.keyboard.press("0")
    viewer.choose("show", "varies")
    heat(viewer, store, np.sqrt(store.variance(0))[:, 27], "spread")
    viewer.choose("show", "all three")
    viewer.choose("compare", "blocks of this stage")
    places = viewer.points(5)
    page.mouse.click(*places[1])
    viewer.until("viewer.state.panes[0].image === 1")
    page.wait_for_timeout(400)
    page.go_back()
    viewer.until("viewer.state.pairs.length === 0")
    viewer.until("viewer.strips.size === 3")


def test_what_is_not_on_the_page_is_greyed_or_said(viewer, store):
    page = viewer.page
    assert page.get_by_role("button", name="Save as one page").count() == 0
    assert page.get_by_role("radiogroup", name="layout").get_by_text("UMAP").locator("..").get_attribute("title") == (
        "not on this page: mamba-attn report --method umap holds it"
    )
    missing = next(at for at, image in enumerate(store.images) if not image.kept)
    viewer.open(f"image={missing}")
    page.get_by_text("its matrix is not on this page: mamba-attn explore shows it.").first.wait_for()
    viewer.open("gate=true")
    page.get_by_text("Gate and D need the model").first.wait_for()


def test_names_do_no_harm(viewer):
    viewer.open("mode=blocks&colour=class")
    viewer.page.wait_for_timeout(300)
    assert viewer.page.evaluate("window.harmed") is None
    assert cases.HOSTILE in viewer.page.locator("#list").inner_html().replace("&lt;", "<").replace("&gt;", ">").replace(
        "&quot;", '"'
    ) or cases.HOSTILE in (viewer.page.locator("#list button").nth(1).get_attribute("title") or "")


def test_at_400_pixels_nothing_scrolls_sideways(browser, file):
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
    Viewer(page, file.as_uri()).open()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.close()


def test_the_explorer_saves_its_state_as_one_page(browser, store, tmp_path):
    with served(store) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        viewer = Viewer(page, address).open("layer=2&sign=absolute")
        page.mouse.click(*viewer.cell(1, 2))
        kept = next(at for at, image in enumerate(store.images) if image.kept)
        expected = np.abs(store.matrix(2, kept)[1 * 6 + 2])
        heat(viewer, store, expected)
        saved = viewer.saved("Save as one page", tmp_path)
        page.close()
    assert saved.name == "vmamba_micro_stage_1_block_1_patch_1_2_takes_from.html"
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    frozen = Viewer(page, saved.as_uri())
    page.goto(saved.as_uri())
    frozen.until("window.viewer && viewer.maps().length === 3")
    heat(frozen, store, expected)
    assert frozen.maps()[0]["grid"] == [4, 6]
    page.close()
    assert frozen.wrong == []


def test_a_notebook_shows_it_in_a_frame(browser, store, tmp_path):
    shown = notebook(store, images=1)
    cell = tmp_path / "cell.html"
    cell.write_text(f"<!doctype html><meta charset=utf-8>{shown._repr_html_()}")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(cell.as_uri())
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", name="Where does vmamba_micro look?").wait_for()
    inside = page.frames[1]
    for _ in range(100):
        if inside.evaluate("window.viewer?.maps()[0]?.values?.length") == 96:
            break
        page.wait_for_timeout(50)
    frame.get_by_role("button", name="clear selection").click()
    frame.get_by_role("heading", name="What patches take from, on average").wait_for()
    page.close()
    assert wrong == []


def test_a_notebook_needs_a_store():
    with pytest.raises(ValueError, match="expected at least one store"):
        notebook()
