"""The page and the picture: complete, readable, without network."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mamba_attn.attribution.queries import Query
from mamba_attn.datasets import loading
from mamba_attn.explanations import choices
from mamba_attn.explanations.answer import answer
from mamba_attn.explanations.explaining import Pages
from mamba_attn.explanations.page import index, marked, page, predictions, sheet
from mamba_attn.figures.colours import limits
from tests.explanations.cases import VIM, VIT, photo, save


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    vim = loading.load("vim_micro", save(folder / "vim", "vim_micro", VIM))
    vit = loading.load("vit_micro", save(folder / "vit", "vit_micro", VIT))
    question = choices.Question(
        vim, choices.parse_methods([], vim, place=True), query=Query("pixel", ((9.0, 20.0),)), target=2
    )
    path = photo(folder)
    return [answer(question, path), answer(question.of_companion(vit), path)]


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def picture(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_everything_is_inside_and_named(answers):
    text = page("a & <b>.jpg", answers, "mamba-attn explain 'a & <b>.jpg'")
    tags = Tags(text)
    pictures = tags.all("img")
    # per model: the photo, it under each of three maps, the maps, the rows of all layers on a photo, the matrices
    assert len(pictures) == sum(1 + 2 * 3 + 1 + len(each.grids) + len(each.matrices) for each in answers)
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in pictures)
    assert not re.search(r"https?:|<script [^>]*src|<link|@import|url\(", text)
    assert "a &amp; &lt;b&gt;.jpg" in text
    assert "<b>.jpg" not in text
    for words in ("raw attention", "attention rollout", "Mamba-Attribution", "Transformer-Attribution"):
        assert f"<b>{words}</b>" in text
    assert text.count("[red]not markup[/red]") == 2 * (1 + 1)  # among the likeliest, and as the class explained
    assert text.count("the marked patch") == 4 + sum(1 + len(each.grids) for each in answers)
    assert tags.open == []


def test_right_and_wrong_are_said_where_the_class_is_known(answers, tmp_path):
    best, *_, least = answers[0].probabilities.argsort()[::-1].tolist()
    right, wrong = (replace(answers[0], label=each) for each in (best, least))
    verdict = f"wrong, label: {answers[0].class_name(least)}"
    assert (right.verdict, wrong.verdict) == ("correct", verdict)
    assert (answers[0].truth, answers[0].verdict) == (None, "")
    assert f"({verdict})" in predictions([wrong])
    assert f'<div class="wrong">{verdict}</div>' in page("a", [wrong], "")
    hat = photo(tmp_path / "hat")
    assert answer(answers[0].question, hat).truth == "hat"


def test_maps_of_the_likeliest_classes_are_on_the_page(answers, tmp_path):
    asked = answer(answers[0].question._replace(target=None), photo(tmp_path))
    (maps,) = asked.of_classes.values()
    best = np.argsort(-asked.probabilities, kind="stable").tolist()
    assert list(maps) == best[:3]
    # the two come from passes of different folds, which the kernel sums in another order
    own = asked.maps["mamba_attribution"]
    np.testing.assert_allclose(maps[asked.explained], own, rtol=1e-6, atol=1e-6 * float(np.abs(own).max()))
    other = asked.question.methods[-1].build(asked.question.subject.model, None)
    inputs = asked.question.subject.transform.normalise(asked.image[None])
    expected = other.attribute(inputs, best[1], **asked.question.query.argument)[0, 0]
    np.testing.assert_allclose(maps[best[1]], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    tags = Tags(page("a", [asked], ""))
    buttons = [each for each in tags.all("input") if each.get("type") == "radio"]
    assert [each["value"] for each in buttons] == [f"0/{number}" for number in best[:3]]
    assert ["checked" in each for each in buttons] == [True, False, False]
    assert answers[0].of_classes["mamba_attribution"] == {}  # a class was asked for


def test_the_rows_of_all_layers_are_on_the_grid(answers):
    for each in answers:
        assert list(each.grids) == list(each.read)
        assert {grid.shape for grid in each.grids.values()} == {(4, 4)}
        name = list(each.read)[-1]
        assert set(each.grids[name].ravel()) <= set(each.read[name])


def test_the_page_s_controls_in_a_browser(answers, browser, tmp_path):
    asked = answer(answers[0].question._replace(target=None), photo(tmp_path))
    file = tmp_path / "page.html"
    file.write_text(page("a", [asked], ""), encoding="utf-8")
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    shown.goto(file.as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") <= 1280
    titles = "[...document.querySelectorAll('figure[data-class]')].map((one) => one.hidden)"
    assert shown.evaluate(titles) == [False, True, True]
    shown.locator("label:has(input[type=radio])").nth(1).click()
    assert shown.evaluate(titles) == [True, False, True]
    shown.get_by_label("layer of vim_micro").fill("1")
    assert shown.locator(".layers .heat:visible").count() == 1
    assert "layer 1 of 2" in shown.locator(".layers figcaption").inner_text()
    matrix = next(iter(asked.matrices.values()))
    picture = shown.locator(".matrix").first
    picture.scroll_into_view_if_needed()
    box, count = picture.bounding_box(), len(matrix)
    top = limits(matrix)["limits"][1]
    row, column = np.argwhere(np.abs(matrix) < 0.9 * top)[5]
    shown.mouse.move(*(box[side] + 1 + (at + 0.5) * 254 / count for side, at in (("x", column), ("y", row))))
    said = shown.locator("output").first.inner_text()
    assert said.startswith(f"token {row} reads token {column}: about ")
    assert abs(float(said.rpartition(" ")[2]) - matrix[row, column]) < 0.02 * top
    shown.close()


def test_the_photo_and_the_maps_are_pictures_of_the_arrays(answers):
    from mamba_attn.figures import png

    sources = [image["src"] for image in Tags(page("a", answers, "")).all("img")]
    assert np.array_equal(picture(sources[0]), answers[0].image)
    raw = answers[0].maps["raw_attention"]
    assert np.array_equal(picture(sources[2]), png.matrix_rgb(raw, **limits(raw)))


def test_the_query_is_marked_where_it_is(answers):
    (circle, *_) = Tags(page("a", answers, "")).all("circle")
    assert (circle["cx"], circle["cy"]) == ("20", "9")
    box = answers[0].question._replace(query=Query("box", ((2.0, 4.0, 30.0, 20.0),)))
    replaced = type(answers[0])(**{**vars(answers[0]), "question": box})
    (rectangle, *_) = Tags(page("a", [replaced], "")).all("rect")
    assert [rectangle[name] for name in ("x", "y", "width", "height")] == ["2", "4", "28", "16"]


def test_the_list_of_pages_links_them():
    tags = Tags(index(["a & b.jpg", "c.png"], ["a & b", "c"]))
    assert [link["href"] for link in tags.all("a")] == ["a & b.html", "c.html"]
    assert [image["src"] for image in tags.all("img")] == ["a & b.png", "c.png"]


def test_the_index_comes_in_pages(answers, tmp_path, monkeypatch):
    monkeypatch.setattr("mamba_attn.explanations.explaining._PER_INDEX", 2)
    pages = Pages(tmp_path)
    for number in range(3):
        pages.add(f"{'hat' if number else 'shoes'}/{number}.jpg", answers[:1])
    pages.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hat", "index-page-2.html", "index.html", "shoes"]
    first, second = (Tags((tmp_path / name).read_text()) for name in ("index.html", "index-page-2.html"))
    assert [link["href"] for link in first.all("a")] == ["index-page-2.html", "shoes/0.html", "hat/1.html"]
    assert [link["href"] for link in second.all("a")] == ["index.html", "hat/2.html"]
    assert (tmp_path / "hat" / "2.html").is_file()


def test_files_that_are_written_over_are_no_longer_what_was_noted_of_them(answers, tmp_path):
    records = tmp_path / "explained.jsonl"
    records.write_text('{"name": "a", "of": "an image and a question"}\n{"name": "b", "of": "cut')
    Pages(tmp_path).add("a.jpg", answers[:1])
    assert json.loads(records.read_text().splitlines()[-1]) == {"name": "a", "of": ""}


def test_the_sheet_has_a_row_per_model(answers):
    one, both = sheet(answers[:1]), sheet(answers)
    panels = 1 + 3 + len(answers[0].matrices)
    assert one.shape[1] == panels * 256 + (panels + 1) * 8
    assert both.shape[0] == 2 * one.shape[0]
    assert np.array_equal(both[: one.shape[0], : one.shape[1]], one)
    crop = Image.fromarray(answers[0].image).resize((256, 256), Image.Resampling.BICUBIC)
    ours = np.asarray(
        Image.fromarray(marked(answers[0].image, Query("pixel", ((9.0, 20.0),)))).resize(
            (256, 256), Image.Resampling.BICUBIC
        )
    )
    assert np.array_equal(one[8:264, 8:264], ours)
    assert not np.array_equal(one[8:264, 8:264], np.asarray(crop))


def test_marks_are_drawn_at_the_query():
    image = np.full((64, 96, 3), 255, dtype=np.uint8)
    assert marked(image, None) is image
    rows, columns = np.nonzero((marked(image, Query("pixel", ((20.0, 70.0),))) != 255).any(-1))
    assert abs(rows.mean() - 20) < 1
    assert abs(columns.mean() - 70) < 1
    rows, columns = np.nonzero((marked(image, Query("box", ((10.0, 20.0, 50.0, 60.0),))) != 255).any(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 59, 10, 49)
    assert bool((image == 255).all())


def test_a_few_large_values_do_not_hide_the_rest():
    values = np.linspace(1, 2, 1000).reshape(20, 50)
    values[0, 0] = 1e6
    low, high = limits(values)["limits"]
    assert low > 1
    assert high < 2.01
    low, high = limits(-values)["limits"]
    assert (low, limits(-values)["signed"]) == (-high, True)
    assert limits(np.zeros((3, 3))) == {"signed": False}
