"""A text explained: numbers that add up, one page without network, and sentences for what does not fit."""

import re

import numpy as np
import pytest
import torch

import mamba_attn
from mamba_attn.commands.cli import main
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.loading import complete, load
from mamba_attn.explanations import explain_text
from mamba_attn.explanations.texts import labelled

TEXT = "A . B . . C D . ? ?"


@pytest.fixture(scope="module")
def model():
    return load("mamba_copy")


@pytest.fixture(scope="module")
def answer(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return explain_text(model, TEXT, folder, command="the command"), folder


def test_what_is_found_is_the_models(model, answer):
    found, folder = answer
    ids = model.tokenizer.encode(TEXT)
    with torch.no_grad(), mamba_attn.trace(model.model) as record:
        logits = model.model(ids)[0, -1]
    np.testing.assert_allclose(found.probabilities, logits.softmax(0).numpy(), rtol=1e-5)
    assert found.explained == int(logits.argmax())
    assert found.best()[0][:2] == (found.explained, found.target)
    assert "".join(found.words) == TEXT
    assert found.layers == list(record)
    rows = np.stack([layer.row(len(found.words) - 1)[0].detach().numpy() for layer in record.layers])
    np.testing.assert_allclose(found.rows, rows, rtol=1e-5, atol=1e-7)
    assert {strip.shape for strip in found.strips.values()} == {(len(found.words),)}
    assert len(found.strips) == 5
    stored = np.load(folder / "text.npz")
    assert set(found.strips) < set(stored)


def test_the_page_needs_no_network(answer):
    found, folder = answer
    page = (folder / "index.html").read_text()
    assert not re.search(r"(src|href)=\"?https?://|<script|url\(", page)
    assert page.count('<div class="mamba-tokens">') == 5
    assert page.count("<svg class=labelled") == 1 + len(found.matrices)
    assert "the command" in page
    assert "prefers-color-scheme:dark" in page


def test_labels_stand_at_their_rows_and_are_thinned_out_where_many():
    svg = labelled(np.eye(3), ["a", "<b>", "\n"], ["x", "y", "z"])
    assert re.findall(r">([^<]*)</text>", svg) == ["a", "&lt;b&gt;", "&#39;\\n&#39;", "x", "y", "z"]
    wide = labelled(np.ones((2, 400)), ["a", "b"], [str(number) for number in range(400)])
    assert 20 <= len(re.findall("</text>", wide)) - 2 <= 24


def test_a_target_by_name_number_and_class(model):
    assert explain_text(model, TEXT, target="C").target == "C"
    assert explain_text(model, TEXT, target=3, methods=["raw_attention"]).explained == 3
    reviews = load("mamba_reviews")
    found = explain_text(reviews, "a delightful movie", target="negative", methods=["mamba_lrp"])
    assert found.target == "negative"
    assert found.best()[0][1] == "positive"
    assert list(found.strips) == ["mamba_lrp"]


def test_the_command(tmp_path, capsys):
    assert main(["explain", "--text", TEXT, "--model", "mamba_copy", "--target", "B", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^\*? +[\d.]+%  'B'$", said, re.MULTILINE)
    assert "10 tokens, 2 layers; open" in said
    assert (tmp_path / "index.html").is_file()


class Pieces:
    """A tokenizer with transformers' methods: a token per letter."""

    def __call__(self, text, return_tensors=None, add_special_tokens=True):
        ids = [ord(letter) % 19 for letter in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def convert_ids_to_tokens(self, number):
        return chr(97 + number)

    def decode(self, ids):
        return chr(97 + ids[0])


def test_refused(model):
    with pytest.raises(ValueError, match=r"explain_text\(text=' '\): the text is empty"):
        explain_text(model, " ")
    with pytest.raises(ValueError, match="there is no tokenizer next to the model; save the one"):
        explain_text(LoadedModel(model.model, name="net", reads="text"), TEXT)
    with pytest.raises(ValueError, match=r"this model reads images; use mamba_attn\.explain"):
        explain_text(LoadedModel(model.model), TEXT)
    with pytest.raises(ValueError, match="target='Paris': no such token or class; there are A, B, C"):
        explain_text(model, TEXT, target="Paris")
    spelt = LoadedModel(model.model, name="net", reads="text", tokenizer=Pieces())
    with pytest.raises(ValueError, match=r"makes 2 tokens of it \('.', '.'\), and one is explained; give the first"):
        explain_text(spelt, "abc", target="xy")
    assert explain_text(spelt, "abc", target="x", methods=["raw_attention"]).words == [
        Pieces().decode([ord(letter) % 19]) for letter in "abc"
    ]
    with pytest.raises(ValueError, match="reads text, and this is for images"):
        complete(model)
    with pytest.raises(ValueError, match=r"load\('mamba_copy', size=\): this model reads text"):
        load("mamba_copy", size=(4, 4))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--query", "1,2"], "--query is for images"),
        (["--model", "vim_micro"], "--model vim_micro: this model reads images; leave --text out"),
    ],
)
def test_what_is_for_images_is_refused(options, sentence, tmp_path, capsys):
    command = ["explain", "--text", TEXT, "--model", "mamba_copy", "--out", str(tmp_path), *options]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
