"""Small language models: causal, exact under a trace, with weights whose cards are true."""

import pytest
import torch

import mamba_attn
from benchmarks import language
from mamba_attn.datasets.loading import complete
from mamba_attn.errors import WeightsError
from mamba_attn.models import create, registry
from mamba_attn.models.language import MambaLanguageModel, Vocabulary
from mamba_attn.testing import check_adapter

TEXT = registry.demos("text")


def test_names_are_of_text_or_of_images():
    assert {*TEXT} == {"mamba_copy", "mamba_recall", "mamba_reviews", "mamba_plays"} == {*registry.names("text")}
    assert not {*TEXT} & {*registry.names()}
    assert not {*TEXT} & {*registry.demos()}
    with pytest.raises(ValueError, match=r"names\(reads='sound'\): expected one of \('images', 'text'\)"):
        registry.names("sound")
    with pytest.raises(ValueError, match=r"transform\('mamba_copy'\): this model reads text"):
        registry.transform("mamba_copy")
    assert mamba_attn.load("mamba_copy").reads == "text"
    with pytest.raises(ValueError, match="mamba_copy reads text, and this is for images"):
        complete(mamba_attn.load("mamba_copy"))
    with pytest.raises(WeightsError, match=r"these weights read images. Those of text: mamba_copy"):
        registry.vocabulary("vim_digits")


@pytest.mark.parametrize("classes", [0, 3])
def test_it_is_causal_and_its_matrices_are_what_runs(classes):
    torch.manual_seed(0)
    model = MambaLanguageModel(vocabulary=11, embed_dim=6, depth=3, d_state=3, num_classes=classes).double().eval()
    ids = torch.randint(0, 11, (2, 9))
    report = check_adapter(model, ids)
    assert max(report.matrix_error, report.output_error) < 1e-12
    with torch.no_grad():
        logits = model(ids)
        other = ids.clone()
        other[:, 5] = (other[:, 5] + 1) % 11
        changed = model(other)
    if classes:
        assert logits.shape == (2, 3)
        assert not torch.equal(changed, logits)
    else:
        torch.testing.assert_close(changed[:, :5], logits[:, :5], rtol=1e-12, atol=1e-14)
        assert bool((changed[:, 5:] != logits[:, 5:]).any(-1).all())


def test_words_bytes_and_symbols():
    words = Vocabulary(["<pad>", "<unk>", "<end>", "don't", "stop", "!"], "words")
    assert words.encode("Don't STOP now!").tolist() == [[3, 4, 1, 5, 2]]
    assert words.decode(torch.tensor([3, 4])) == ["don't", " stop"]
    raw = Vocabulary([], "bytes")
    assert raw.encode("Ay\n").tolist() == [[65, 121, 10]]
    assert raw.decode(raw.encode("Ay\n")[0]) == ["A", "y", "\n"]
    assert Vocabulary(["A", "."], "symbols").encode("A . .").tolist() == [[0, 1, 1]]
    with pytest.raises(ValueError, match=r"encode\('A B'\): 'B' is no token; expected A \."):
        Vocabulary(["A", "."], "symbols").encode("A B")
    with pytest.raises(ValueError, match=r"encode\(' '\): the text is empty"):
        raw.encode(" ")
    with pytest.raises(ValueError, match=r"Vocabulary\(split='letters'\)"):
        Vocabulary([], "letters")


@pytest.mark.parametrize("name", TEXT)
def test_the_card_is_true_of_the_file(name):
    from safetensors import safe_open

    card, path = registry.demo_card(name), registry._DEMOS / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {value.get_dtype() for value in shapes.values()} == {"F16"}
    model = create(name, weights="demo")
    assert set(shapes) == set(model.state_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) == card["parameters"]
    assert len(registry.vocabulary(name).tokens) == model.vocabulary
    assert card["command"].startswith(f"python benchmarks/language.py {name} ")
    assert {"seed", "steps", "cpu_seconds", "versions"} <= set(card)
    assert all(source["license"] and source["source"] for source in card["data"].values())
    if name in language.TASKS:
        batch = language.TASKS[name].make(64, torch.Generator().manual_seed(5))
        assert language.accuracy(model, batch) >= 0.99 <= card["accuracy"]
    elif name == "mamba_reviews":
        assert "MIT" in card["data"]["movie review snippets"]["license"]
        said = {
            text: card["classes"][int(model(registry.vocabulary(name).encode(text)).argmax())]
            for text in ("a wonderful, moving film.", "a dull and lifeless mess.")
        }
        assert [*said.values()] == ["positive", "negative"]
        assert card["top1"] > 72
    else:
        assert "CC BY" in card["data"]["plays and poems of Shakespeare"]["license"]
        text = "Enter the King.\n\nKING. What is the matter with the"
        ids = registry.vocabulary(name).encode(text)
        logits = model(ids)[0, :-1]
        bits = torch.nn.functional.cross_entropy(logits, ids[0, 1:]) / torch.log(torch.tensor(2.0))
        assert bits < 4 < 8  # a byte has 8
        assert card["bits_per_byte"] < 2.3


def test_the_weights_are_small():
    files = [registry._DEMOS / f"{name}.{end}" for name in TEXT for end in ("json", "safetensors")]
    assert sum(file.stat().st_size for file in files) < 6e6


def test_a_word_that_is_knocked_out_is_not_copied():
    model, vocabulary = create("mamba_copy", weights="demo"), registry.vocabulary("mamba_copy")
    ids = vocabulary.encode(". . B . . . K . . . . P . . . C . . . . ? ? ? ?")
    with torch.no_grad():
        assert "".join(vocabulary.tokens[i] for i in model(ids)[0, -4:].argmax(-1)) == "BKPC"
        with mamba_attn.knockout(model, columns=range(6, 10)):  # the convolution hands it on to three more
            said = "".join(vocabulary.tokens[i] for i in model(ids)[0, -4:].argmax(-1))
    assert "K" not in said
    assert said[0] + said[2:] == "BPC"


def test_a_notebook_shows_what_the_last_token_reads():
    model = create("mamba_copy", weights="demo")
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(registry.vocabulary("mamba_copy").encode(". . B . . . K ?"))
    shown = trace[1]._repr_html_()
    assert "what the last token, 7, reads" in shown
    assert "is read" not in shown
