"""Gestures on the page in a real browser: what is selected, and what is drawn after it."""

import re

import numpy as np

from tests.viewer.browsing import MIDDLE, rows


def test_the_first_screen_explains_itself(viewer, store):
    viewer.open()
    image, mean = map(np.abs, rows(store))
    viewer.heat(image[MIDDLE], "image")
    viewer.heat(mean[MIDDLE], "mean")
    viewer.heat(image[MIDDLE] - mean[MIDDLE], "difference")  # as the pictures are: the left less the middle
    page = viewer.page
    assert "The deeper the orange, the more it takes" in page.locator(".lead").inner_text()
    page.get_by_role("heading", name="Where does vmamba_micro look?").wait_for()
    page.get_by_role("heading", name="What patch (4, 6) takes from · stage 0, block 0").wait_for()
    assert page.locator("#maps b").all_inner_texts() == ["This image", "Usual", "What is special here"]
    assert "4 photos · 2 of 4 photos right" in page.locator("#where").inner_text()
    viewer.until("viewer.strips.size === 5")
    arrows = page.get_by_role("radiogroup", name="scan direction").inner_text().split()[2:]
    assert arrows == ["all", "→", "↓", "←", "↑"]
    viewer.points(96)
    viewer.lit([MIDDLE])
    pixels = page.evaluate("""() => { const c = viewer.maps()[1].canvas;
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return new Set(Array.from({ length: 400 }, (_, k) => d.slice(k * 40, k * 40 + 3).join())).size; }""")
    assert pixels > 3  # something is drawn


def test_patches_are_chosen_by_click_shift_and_drag(viewer, store):
    image, mean = rows(store)
    page = viewer.page
    page.mouse.click(*viewer.cell(2, 3))
    viewer.heat(image[27])
    viewer.lit([27])
    page.keyboard.down("Shift")
    page.mouse.click(*viewer.cell(5, 9, at=1))
    viewer.lit([27, 69])
    viewer.heat(mean[[27, 69]].mean(0), "mean")
    page.mouse.click(*viewer.cell(2, 3))
    page.keyboard.up("Shift")
    viewer.lit([69])
    viewer.drag([viewer.cell(1, 1), viewer.cell(3, 4)])
    region = [row * 12 + column for row in range(1, 4) for column in range(1, 5)]
    viewer.lit(region)
    viewer.heat(image[region].mean(0))
    assert "12 patches" in page.locator("#caption").inner_text()
    viewer.more()
    viewer.choose("drag over patches", "lasso")
    corners = [viewer.cell(*place) for place in ((0, 0), (0, 5), (6, 0))]
    viewer.drag(corners)
    viewer.until("viewer.lit(0).length > 12")
    chosen = viewer.page.evaluate("viewer.lit(0)")
    assert 0 not in chosen or len(chosen) < 42  # a triangle, not the box around it
    page.get_by_role("button", name="clear selection").click()
    viewer.heat(image.mean(0))
    assert page.get_by_role("button", name="clear selection").is_disabled()


def test_what_is_under_the_pointer_is_in_the_card_and_covers_nothing(viewer, store):
    page = viewer.page
    page.mouse.move(*viewer.cell(2, 5))
    card = page.locator("#card", has_text="patch (2, 5)")
    card.wait_for()
    assert "30th, 43rd, 67th and 54th of 96 in scans 1-4" in card.inner_text()
    image, _ = rows(store)
    strongest = int(np.abs(image[29]).argmax())
    assert f"({strongest // 12}, {strongest % 12})" in card.inner_text()
    assert page.locator("#peek").is_visible()
    page.mouse.move(5, 5)
    page.locator("#card", has_text="selected").wait_for()
    places = viewer.points(96)
    page.mouse.move(*places[17])
    page.locator("#card", has_text="under the pointer").wait_for()


def test_points_of_patches_and_of_blocks(viewer, store):
    page = viewer.page
    places = viewer.points(96)
    alone = max(range(96), key=lambda at: np.sort(np.hypot(*(places - places[at]).T))[1])
    page.mouse.click(*places[alone])
    viewer.lit([alone])
    viewer.heat(rows(store)[0][alone])
    viewer.choose("drag", "box")
    places = viewer.points(96)  # the caption of a chosen patch may have moved them
    left, top = places.min(0) - 8
    right, bottom = places.max(0) + 8
    viewer.drag([(left, top), (right, bottom)])
    viewer.lit(range(96))
    viewer.page.locator("#strip button").nth(3).click()
    viewer.choose("compare", "blocks of this stage")
    places = viewer.points(8)
    assert viewer.page.locator("#plots .kind").all_inner_texts() == ["block 0", "block 1"]
    page.mouse.click(*places[2])
    viewer.until("viewer.state.panes[0].layer === 2 && viewer.state.panes[0].image === 2")
    viewer.lit([2])
    viewer.until("document.querySelectorAll('#list button').length === 1")  # the photo of the point
    page.keyboard.press("Escape")
    viewer.until("document.querySelectorAll('#list button').length === 4")
    page.locator("canvas.plot").focus()
    page.keyboard.press("ArrowDown")
    viewer.until("viewer.state.panes[0].layer === 3")
    viewer.choose("compare", "every block")
    viewer.until("document.querySelectorAll('.plots button').length === 5")
    page.get_by_title("open stage 1, block 0").nth(1).click()
    viewer.until("viewer.state.panes[0].layer === 1 && viewer.state.panes[0].mode === 'patches'")
    viewer.points(24)
    page.get_by_role("button", name="larger points view").click()
    assert np.ptp(viewer.points(24), axis=0).max() > np.ptp(places, axis=0).max() * 0.9


def test_unchosen_points_are_drawn_once_and_their_legend_comes_back(viewer):
    page = viewer.page
    viewer.points(96)
    key = "viewer.points()[0].backdrop.key"
    before = page.evaluate(key)
    page.mouse.click(*viewer.cell(2, 3))
    viewer.lit([27])
    assert page.evaluate(key) == before  # what a click changes is drawn over it
    said = page.locator("#plots .legend").inner_text()
    assert said.startswith("colour: column")
    viewer.choose("compare", "every block")
    viewer.until("document.querySelectorAll('.plots button').length === 5")
    viewer.choose("compare", "patches of this block")
    viewer.points(96)
    assert page.locator("#plots .legend").inner_text() == said
    page.get_by_label("colour", exact=True).select_option("row")
    viewer.until(f"before => {key} !== before", before)
    assert "colour: row" in page.locator("#plots .legend").inner_text()


def test_a_slow_layout_says_what_it_does_and_can_be_cancelled(viewer):
    page = viewer.page
    before = viewer.points(96)
    viewer.choose("layout", "UMAP")
    page.get_by_text(re.compile(r"UMAP of 96 patches: \d+ s")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    viewer.choose("layout", "t-SNE")
    viewer.until("viewer.points()[0].key.includes('tsne')", timeout=60_000)
    assert np.abs(viewer.points(96) - before).max() > 5


def test_the_points_most_alike_can_be_chosen(viewer, store):
    mean = rows(store)[1]
    nearest = np.argsort(np.linalg.norm(mean - mean[MIDDLE], axis=1))[1:7].tolist()
    buttons = viewer.page.locator("#card button")
    buttons.first.wait_for()
    assert buttons.all_inner_texts() == [*(f"({at // 12}, {at % 12})" for at in nearest), "select these"]
    buttons.last.click()
    viewer.lit([MIDDLE, *nearest])
    viewer.open("mode=blocks&layer=2&points=2/0")
    buttons.first.wait_for()
    assert re.fullmatch(r"block [01], image_\d.jpg", buttons.first.inner_text())
    buttons.first.click()
    viewer.until("viewer.state.pairs.length === 1 && String(viewer.state.pairs[0]) !== '2,0'")


def test_keys_alone(viewer, store):
    page, image = viewer.page, rows(store)[0]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    viewer.lit([MIDDLE - 13])
    viewer.heat(image[MIDDLE - 13])
    for key, name, value in (
        ("r", "direction", "column"), ("m", "show", "image"), ("v", "mode", "blocks"), ("]", "layer", 1),
        ("[", "layer", 0), ("3", "route", 2), ("0", "route", -1), (".", "image", 1), (",", "image", 0),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert viewer.state()["panes"][0][name] == value, key
    for key, name, value in (
        ("s", "sign", "positive"),
        ("p", "path", True),
        ("+", "step", 1),
        ("-", "step", 1),
        ("l", "lock", None),
    ):
        page.keyboard.press(key)
        page.wait_for_timeout(50)
        assert viewer.state()[name] == value or (value is None and viewer.state()[name] > 0), key
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert viewer.state()["cells"] == []
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.className || document.activeElement.id || document.activeElement.dataset.name"
            )
        )
    assert {"map", "plot", "copy", "layer", "search", "compare"} <= reached
