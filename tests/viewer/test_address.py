"""The page's address in a real browser: links, Back, guided starts, two panes."""

import json

import numpy as np
import pytest

from tests.viewer.browsing import MIDDLE, Viewer, rows


def test_the_address_holds_the_view_and_back_undoes(viewer, store):
    page = viewer.page
    image, _ = rows(store)
    page.mouse.click(*viewer.cell(2, 3))
    viewer.heat(image[27])
    page.wait_for_timeout(500)
    viewer.drag([viewer.cell(1, 1), viewer.cell(3, 4)])
    viewer.until("viewer.lit(0).length === 12")
    page.wait_for_timeout(500)
    viewer.choose("scan direction", "↓")
    viewer.heat(rows(store, route=1)[0][viewer.state()["cells"]].mean(0))
    link = page.url
    page.go_back()
    viewer.heat(image[viewer.state()["cells"]].mean(0))
    page.keyboard.press("u")
    viewer.lit([27])
    page.go_forward()
    page.go_forward()
    viewer.lit(viewer.state()["cells"])
    other = Viewer(page.context.browser.new_page(), viewer.address).open(link.partition("#")[2])
    other.heat(rows(store, route=1)[0][other.state()["cells"]].mean(0))
    assert other.state()["cells"] == viewer.state()["cells"]
    other.page.close()


def test_a_damaged_link_says_so_and_shows_the_start(viewer, store):
    for link in (
        "layer=x", "cells=8x12/5:", "show=nothing", "cells=0x0/1", "opacity=much", "b=1&b.mode=x", "points=1/a",
        "cells=8x12/999", "gate=1",
    ):  # fmt: skip
        viewer.open(link)
        viewer.heat(np.abs(rows(store)[0][MIDDLE]))
        assert "This link is damaged or incomplete" in viewer.page.locator("#message").inner_text(), link


def test_links_of_another_store_show_what_there_is(viewer):
    viewer.open("layer=99&image=99&route=9&store=4&b=1&b.layer=77&step=99999&lock=-3")
    viewer.until("viewer.maps().length === 3")
    found = viewer.state()
    assert [(its["layer"], its["image"], its["store"]) for its in found["panes"]] == [(4, 3, 0), (4, 0, 0)]
    assert found["lock"] == 0


def test_two_panes_and_what_they_differ_in(viewer, store):
    page = viewer.page
    page.get_by_role("button", name="side by side").click()
    viewer.until("viewer.maps().length === 3")
    viewer.choose("show", "usual")  # of pane B, whose controls these are now
    image, mean = rows(store)
    viewer.heat(image[MIDDLE] - mean[MIDDLE], "apart")
    viewer.choose("controls of", "pane A")
    page.locator("#strip button").nth(1).click()
    viewer.until("viewer.maps().length === 2")
    page.mouse.click(*viewer.cell(1, 1, at=0))
    viewer.lit([6 + 1], at=0)
    viewer.lit([26, 27, 38, 39], at=1)  # the same place of the photo
    tops = [page.locator("canvas.map").nth(at).bounding_box()["y"] for at in (0, 1)]
    assert tops[0] == tops[1]
    page.keyboard.press("b")
    viewer.until("viewer.state.panes.length === 1")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (1, "Every dot is one block"),
        (2, "One colour is one column"),
        (3, "The strip follows one patch"),
        (4, "what this photo alone does"),
    ],
)
def test_guided_starts(viewer, start, words):
    page = viewer.page
    page.locator(f"[data-name=start-{start}]").click()
    page.locator("#story", has_text=words).wait_for()
    found = viewer.state()
    assert found["start"] == start
    shown = {1: ("blocks", 3), 2: ("patches", 0), 3: ("every", 0), 4: ("patches", 0)}[start]
    assert (found["panes"][0]["mode"], found["panes"][0]["layer"]) == shown
    page.wait_for_timeout(400)  # quicker ones are one step for Back
    page.mouse.click(*viewer.cell(0, 0))
    viewer.until("document.querySelector('#story').innerText === ''")
    page.go_back()
    page.locator("#story", has_text=words).wait_for()


def test_the_state_is_json(viewer):
    assert json.loads(json.dumps(viewer.state()))["panes"][0]["show"] == "all"
