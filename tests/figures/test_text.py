"""A strip of tokens, layers x tokens, labelled matrices, and what other viewers take."""

import re

import numpy as np
import pytest
import torch

import mamba_attn
from mamba_attn import figures
from mamba_attn.models import create

WORDS = ["The", " <b>", "\n", " cat"]
VALUES = np.array([1.0, -2.0, 0.0, 0.5])


def spans(strip):
    return re.findall(
        r'<span([^>]*) style="background:rgba\(var\(--(\w+)\),([\d.]+)\)" title="([^"]*)">([^<]*)</span>', strip
    )


def test_a_strip_is_red_for_blue_against_and_says_values():
    strip = figures.tokens(WORDS, torch.tensor(VALUES), asked=-1, quiet=[0], title="a < b", note="of <s>")
    found = spans(strip)
    assert [hue for _, hue, *_ in found] == ["for", "against", "against", "for"]
    assert [float(alpha) for _, _, alpha, *_ in found] == pytest.approx([0.425, 0.85, 0, 0.2125], abs=6e-4)
    assert [text for *_, text in found] == ["The", "&lt;b&gt;", "↵", "cat"]
    assert re.sub("<span[^>]*>|</span>", "", strip.split("</b>")[1]).startswith("The &lt;b&gt;↵\n cat")
    assert [title for *_, title, _ in found][1] == "1: &#x27; &lt;b&gt;&#x27; -2"
    assert [kinds for kinds, *_ in found] == [' class="quiet"', "", "", ' class="asked"']
    assert "<b>a &lt; b</b>" in strip
    assert "<small>of &lt;s&gt;</small>" in strip
    assert "prefers-color-scheme:dark" in strip
    assert "white-space:pre-wrap" in strip
    assert strip._repr_html_() == strip
    assert "<script" not in strip


def test_a_limit_is_the_full_colour_and_zeros_have_none():
    assert [float(s[2]) for s in spans(figures.tokens(WORDS, VALUES, limit=1))] == [0.85, 0.85, 0, 0.425]
    assert {s[2] for s in spans(figures.tokens(WORDS, 0 * VALUES))} == {"0.000"}


def test_a_strip_is_a_page(tmp_path):
    figures.tokens(WORDS, VALUES).write_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"values": VALUES[:3]}, r"tokens\(values\(3,\)\): expected a finite value for each of the 4 tokens"),
        ({"values": VALUES * np.nan}, r"expected a finite value"),
        ({"asked": 4}, r"tokens\(asked=4\): there are 4 tokens; expected -4..3"),
        ({"limit": 0.0}, r"tokens\(limit=0.0\)"),
    ],
)
def test_a_strip_refuses(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        figures.tokens(**{"words": WORDS, "values": VALUES} | given)


def test_layers_x_tokens():
    values = np.arange(8.0).reshape(2, 4) - 3
    figure = figures.token_grid(values, WORDS, ["layer 0", "layer 1"])
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z, values)
    assert (heat.zmin, heat.zmax) == (-4, 4)
    assert list(figure.layout.xaxis.ticktext) == ["The", "·<b>", "↵", "·cat"]
    assert list(figure.layout.yaxis.ticktext) == ["layer 0", "layer 1"]
    with pytest.raises(ValueError, match=r"token_grid\(values\(2, 4\)\): expected \(layers, tokens\) = \(3, 4\)"):
        figures.token_grid(values, WORDS, ["a", "b", "c"])


def test_a_matrix_with_the_words_along_it():
    figure = figures.matrix(np.eye(4), labels=WORDS)
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext) == ["The", "·<b>", "↵", "·cat"]
    assert list(figure.data[0].customdata[1][3]) == ["·<b>", "·cat"]
    many = [f"a very long word {number}" for number in range(150)]
    ticks = figures.matrix(np.eye(150), labels=many).layout.xaxis
    assert len(ticks.ticktext) == 25
    assert max(map(len, ticks.ticktext)) == 14
    with pytest.raises(ValueError, match=r"matrix\(labels of 4 tokens\): the matrix is \(3, 3\)"):
        figures.matrix(np.eye(3), labels=WORDS)


@pytest.fixture(scope="module")
def traces():
    torch.manual_seed(0)
    text = create("mamba_copy", depth=4, embed_dim=8)
    vision = create("vim_tiny", depth=3, embed_dim=8, image_size=32, num_classes=2)
    found = {}
    for name, model, x in (("text", text, torch.randint(0, 18, (2, 7))), ("vision", vision, torch.randn(1, 3, 32, 32))):
        with torch.no_grad(), mamba_attn.trace(model) as trace:
            model(x)
        found[name] = trace
    return found


def test_text_next_to_vision_at_three_depths(traces):
    figure = figures.depths(traces)
    heats = [each for each in figure.data if each.type == "heatmap"]
    assert [np.shape(heat.z) for heat in heats] == [(7, 7)] * 3 + [(5, 5)] * 3
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles[:3] == ["text, layer 2 of 4", "text, layer 3 of 4", "text, layer 4 of 4"]
    own = traces["text"].layers[1].attention("absolute")[0].numpy()
    assert np.corrcoef(heats[0].z.ravel(), own.ravel())[0, 1] > 0.9
    assert not np.triu(heats[0].z, 1).any()
    with pytest.raises(ValueError, match=r"depths\(0 traces"):
        figures.depths({})


def test_what_bertviz_takes(traces):
    attention = figures.to_bertviz(traces["text"])
    assert [tuple(each.shape) for each in attention] == [(1, 3, 7, 7)] * 4
    assert all(float(each.min()) >= 0 and float(each.sum(-1).max()) == pytest.approx(1) for each in attention)
    own = traces["text"].layers[0].attention("positive")[0]
    torch.testing.assert_close(attention[0][0, 1], own / own.sum(-1).max())
