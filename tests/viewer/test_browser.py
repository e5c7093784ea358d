"""The page in a real browser, served: gestures, controls, keys, the address."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mamba_attn
from benchmarks.browser import served
from mamba_attn.analytics import AttentionStore, collect
from mamba_attn.core.transform import Transform
from tests.analytics.cases import folder_of, request
from tests.viewer.browsing import Viewer
from tests.viewer.double import Double, tiny

GRID = (8, 12)  # of the last block with at least 36 cells, which is shown first
MIDDLE = 4 * 12 + 6


@pytest.fixture(scope="module")
def store():
    found = tiny()
    found.images = [
        type(i)(i.key, i.label, p, True, c)
        for i, p, c in zip(found.images, ["cat", "cat", "dog", "dog"], (True, False, False, True), strict=True)
    ]
    for image in found.images[1:]:  # the double keeps the first alone
        with torch.no_grad(), mamba_attn.trace(found.model()) as record:
            found.model()(mamba_attn.images.normalise(found.pixels(image)[None]))
        for mine, layer in zip(found.layers, record.layers, strict=True):
            found._matrix[(mine.name, "sum", image.key)] = layer.attention()[0].double().numpy()
            for route, matrix in enumerate(layer.attention(routes="each")[0].double().numpy()):
                found._matrix[(mine.name, route, image.key)] = matrix
    return found


@pytest.fixture(scope="module")
def address(store):
    with served(store) as found:
        yield found


def rows(store, image=0, layer=0, route="sum"):
    """The matrices of an image and of the mean."""
    its = store.layers[layer]
    return store.matrix(its, store.images[image], route), store.mean(its, route)


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


def test_route_direction_block_and_values(viewer, store):
    viewer.choose("scan direction", "←")
    image, mean = rows(store, route=2)
    viewer.heat(image[MIDDLE])
    viewer.choose("a patch", "gives to")
    viewer.heat(mean[:, MIDDLE], "mean")
    viewer.choose("show", "this photo")
    viewer.heat(image[:, MIDDLE])
    assert len(viewer.maps()) == 1
    viewer.more()
    viewer.choose("values", "strength")
    viewer.heat(np.abs(image[:, MIDDLE]))
    viewer.choose("scale", "divide by maximum")
    viewer.heat(np.abs(image[:, MIDDLE]) / np.abs(image[:, MIDDLE]).max())
    viewer.choose("values", "with sign")
    viewer.choose("scale", "as it is")
    viewer.page.get_by_label("logarithmic").check()
    expected = mamba_attn.figures.shown(image[:, MIDDLE], log=True)
    viewer.heat(expected)
    viewer.page.get_by_label("logarithmic").uncheck()
    viewer.page.locator("#strip button").nth(2).click()
    viewer.heat(rows(store, layer=2, route=2)[0][:, 4])  # the same place on a grid of 2 x 3
    viewer.choose("show", "varies")
    spread = np.sqrt(store.variance(store.layers[2], 2))
    viewer.heat(spread[:, 4], "spread")
    assert "the more this differs between photos" in viewer.page.locator("#lead").inner_text()
    assert "standard deviation" in viewer.page.locator("#bars").inner_text()
    viewer.page.locator("#card", has_text="differs most at").wait_for()


def test_one_scale_for_all_that_can_be_kept(viewer):
    def ends():
        return viewer.page.locator("#bars .end").all_inner_texts()

    before = ends()
    assert len(before) == 2
    viewer.page.get_by_label("keep it").check()
    viewer.page.mouse.click(*viewer.cell(0, 0))
    viewer.lit([0])
    viewer.page.wait_for_timeout(300)
    assert [re.sub("[≤≥ ]", "", one) for one in ends()] == [re.sub("[≤≥ ]", "", one) for one in before]
    viewer.page.get_by_label("keep it").uncheck()
    viewer.until("(was) => document.querySelector('#bars .end').innerText !== was", arg=before[0])


def test_points_of_patches_and_of_blocks(viewer, store):
    page = viewer.page
    places = viewer.points(96)
    alone = max(range(96), key=lambda at: np.sort(np.hypot(*(places - places[at]).T))[1])
    page.mouse.click(*places[alone])
    viewer.lit([alone])
    viewer.heat(rows(store)[0][alone])
    left, top = places.min(0) - 8
    right, bottom = places.max(0) + 8
    viewer.choose("drag", "box")
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


def test_photos_are_searched_filtered_and_ordered(viewer, store):
    page = viewer.page
    texts = page.locator("#list button").all_inner_texts
    assert texts() == ["cat ✓", "cat ✗ is dog", "dog ✗ is cat", "dog ✓"]
    page.get_by_label("Predictions").select_option("wrong")
    viewer.until("document.querySelectorAll('#list button').length === 2")
    page.get_by_label("Predictions").select_option("all")
    page.get_by_label("Search photos").fill("image_3")
    viewer.until("document.querySelectorAll('#list button').length === 1")
    page.get_by_label("Search photos").fill("")
    page.get_by_label("Order of photos").select_option("unusual")
    image_of = [rows(store, image)[0][MIDDLE] for image in range(4)]
    far = [np.linalg.norm(one - rows(store)[1][MIDDLE]) for one in image_of]
    wanted = ",".join(str(at) for at in np.argsort(far)[::-1])
    viewer.until(
        "(wanted) => [...document.querySelectorAll('#list button')].map((b) => b.dataset.image).join() === wanted",
        arg=wanted,
    )
    page.locator("#list button").nth(1).click()
    viewer.heat(image_of[int(wanted.split(",")[1])])


def test_numbers_and_pictures_are_saved(viewer, store, tmp_path):
    viewer.more()
    viewer.points(96)
    viewer.until("viewer.strips.size === 5")
    path = viewer.saved("numbers as NPZ", tmp_path)
    assert path.name == "vmamba_micro_stage_0_block_0_patch_4_6_takes_from.npz"
    with np.load(path) as found:
        image, mean = rows(store)
        np.testing.assert_allclose(found["map_image"].ravel(), image[MIDDLE], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(found["map_difference"].ravel(), (image - mean)[MIDDLE], rtol=1e-4, atol=1e-8)
        assert found["map_mean"].shape == tuple(found["grid"]) == GRID
        assert found["points"].shape == (96, 2)
        assert found["selected"].tolist() == found["lit"].tolist() == [MIDDLE]
        assert str(found["title"]) == "vmamba_micro: What patch (4, 6) takes from · stage 0, block 0"
        np.testing.assert_array_equal(found["photo"], store.pixels(store.images[0]))
        last = store.layers[-1]
        np.testing.assert_allclose(found[f"block_{last.name}"].shape, last.layout.grid)
    for what in ("maps", "points", "strip"):
        with Image.open(viewer.saved(f"{what} as PNG", tmp_path)) as picture:
            assert min(picture.size) > 90
            assert len(picture.getcolors(10**6)) > 20


def test_the_path_is_drawn_and_what_cannot_act_says_why(viewer):
    page = viewer.page
    viewer.more()

    def dark():
        return page.evaluate("viewer.maps()[1].canvas.toDataURL().length")

    before = dark()
    assert page.get_by_label("steps of the path").is_disabled()
    page.get_by_label("scan path").check()
    viewer.until("(before) => viewer.maps()[1].canvas.toDataURL().length !== before", arg=before)
    page.get_by_label("steps of the path").fill("5")
    viewer.until("viewer.state.step === 5")
    page.get_by_role("button", name="play the path").click()
    viewer.until("viewer.state.step === 0", timeout=10_000)
    viewer.until("document.querySelector('[data-name=gate]').disabled")  # the model has run by now
    assert page.locator("label:has([data-name=gate])").get_attribute("title") == "the scans of this block have no gate"
    palette = page.get_by_role("radiogroup", name=re.compile("^colours"))
    assert palette.get_attribute("title") == "values with a sign are blue and orange"
    viewer.choose("show", "this photo")
    page.get_by_label("with D").check()
    viewer.until("viewer.maps()[0].values && viewer.maps().length === 1")


def test_when_the_server_is_gone_a_banner_says_so(browser, store):
    with served(store) as address:
        page = browser.new_page()
        Viewer(page, address).open()
    page.keyboard.press("]")
    page.get_by_role("alert").filter(has_text="The explorer does not answer").wait_for()
    page.close()


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(400, "light"), (1440, "dark")]
    + [
        pytest.param(*each, marks=pytest.mark.full)
        for each in ((400, "dark"), (720, "light"), (720, "dark"), (1440, "light"))
    ],
)
def test_no_width_scrolls_sideways(browser, address, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    viewer = Viewer(page, address).open()
    for state in ("", "b=1&b.layer=2", "mode=every&large=true"):
        viewer.open(state)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > sum(map(int, re.findall(r"\d+", ground)[:3]))) == (
        scheme == "dark"
    )
    page.close()
    assert viewer.wrong == []


def test_axe_finds_nothing(viewer):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text()
    for scheme, state in (
        ("light", ""),
        ("light", "b=1"),
        ("dark", "mode=blocks&show=classes"),
        ("dark", "mode=every"),
    ):
        viewer.page.emulate_media(color_scheme=scheme)
        viewer.open(state)
        viewer.page.evaluate("""() => { document.querySelector('#more').open = true;
            document.querySelector('#help').hidden = false; }""")
        viewer.page.evaluate(script)
        found = viewer.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    viewer.page.emulate_media(color_scheme="light")


def test_at_200_percent_a_map_is_on_the_first_screen(browser, address):
    page = browser.new_page(viewport={"width": 720, "height": 450})  # 1440 x 900, twice as large
    viewer = Viewer(page, address).open()
    box = page.locator("canvas.map").first.bounding_box()
    assert box["y"] + box["height"] / 4 < 450
    page.close()
    assert viewer.wrong == []


def test_means_of_classes_and_their_difference(viewer, store):
    viewer.choose("show", "by class")
    each = [rows(store, image)[0][MIDDLE] for image in range(4)]  # cat, dog, cat, dog
    cat, dog = (each[0] + each[2]) / 2, (each[1] + each[3]) / 2
    viewer.heat(cat, "class")
    viewer.heat(cat - rows(store)[1][MIDDLE], "versus")
    viewer.page.get_by_label("minus", exact=True).select_option("dog")
    viewer.heat(dog, "other")
    viewer.heat(cat - dog, "versus")
    assert viewer.page.locator("#maps b").all_inner_texts() == ["cat", "dog", "cat minus dog"]
    assert "mean of 2 photos of this class" in viewer.page.locator("#maps").inner_text()
    viewer.page.get_by_label("class", exact=True).select_option("dog")
    viewer.heat(dog, "class")


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


def test_every_control_has_a_name(viewer):
    viewer.more()
    viewer.page.wait_for_timeout(300)
    nameless = viewer.page.evaluate("""() => {
        const all = [...document.querySelectorAll('button, select, input, canvas[tabindex]')];
        return all.filter((one) => {
            const label = one.getAttribute('aria-label') || one.labels?.[0]?.innerText || one.innerText || one.title;
            return one.checkVisibility() && !label?.trim();
        }).map((one) => one.outerHTML.slice(0, 200)); }""")
    assert nameless == []


def test_a_class_token_a_gate_two_models_and_a_photo_of_one_s_own(browser, tmp_path):
    torch.manual_seed(1)
    model = mamba_attn.models.create("vim_micro", image_size=(24, 40), depth=2, num_classes=3)
    pixels = np.random.default_rng(1).integers(0, 255, (2, 24, 40, 3), dtype=np.uint8)
    vim = Double(model, pixels, ["cat", "dog"], keep=2, name="vim_micro")
    vim.transform = Transform((24, 40))
    with served(tiny(2), vim) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        viewer = Viewer(page, address).open()
        page.get_by_label("model", exact=True).select_option("1")
        page.get_by_role("heading", name="Where does vim_micro look?").wait_for()
        page.get_by_role("button", name="class token").click()
        layout = vim.layers[0].layout
        layer = viewer.state()["panes"][0]["layer"]
        row = vim.matrix(vim.layers[layer], vim.images[0])[layout.class_tokens[0]][layout.patches.numpy()]
        viewer.heat(np.abs(row))
        assert "What the class token takes from" in page.locator("#caption").inner_text()
        viewer.more()
        viewer.until(
            "document.querySelector('[data-name=gate]') && !document.querySelector('[data-name=gate]').disabled"
        )
        page.get_by_label("with the gate").check()
        page.get_by_text("Gate and D exist for single images only.").first.wait_for()
        photo = tmp_path / "mine.png"
        Image.new("RGB", (50, 50), (250, 0, 0)).save(photo)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="add photo").click()
        chooser.value.set_files(str(photo))
        viewer.until("document.querySelectorAll('#list button').length === 3")
        viewer.until("viewer.state.panes[0].image === 2 && viewer.maps()[0].values")
        photo.write_text("no photo")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="add photo").click()
        chooser.value.set_files(str(photo))
        page.get_by_text("This file is no photo that can be read").wait_for()
        page.close()
    assert viewer.wrong == []


def test_softmax_attention_has_no_scan(browser, tmp_path):
    collect(request(folder_of(tmp_path, 1), "vit_micro", keep=1), tmp_path / "store")
    with served(AttentionStore.open(tmp_path / "store")) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        viewer = Viewer(page, address).open()
        viewer.more()
        page.keyboard.press("p")
        assert page.locator("label:has([data-name=path])").get_attribute("title") == "softmax attention has no path"
        assert page.locator("label:has([data-name=gate])").get_attribute("title") == "softmax attention has no gate"
        assert page.get_by_role("radiogroup", name="scan direction").count() == 0
        assert "rank" not in page.get_by_label("colour", exact=True).inner_text()
        page.mouse.move(*viewer.cell(0, 0))
        page.locator("#card", has_text="patch (0, 0)").wait_for()
        assert "visited" not in page.locator("#card").inner_text()
        page.close()
    assert viewer.wrong == []


def test_the_state_is_json(viewer):
    assert json.loads(json.dumps(viewer.state()))["panes"][0]["show"] == "all"
