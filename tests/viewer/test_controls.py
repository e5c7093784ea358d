"""The controls of the page in a real browser: values, scales, photos, classes, the path, files."""

import re

import numpy as np
import torch
from PIL import Image

import mamba_attn
from benchmarks.browser import served
from mamba_attn.analytics import AttentionStore, collect
from mamba_attn.core.transform import Transform
from tests.analytics.cases import folder_of, request
from tests.viewer.browsing import GRID, MIDDLE, Viewer, rows
from tests.viewer.double import Double, tiny


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
