"""Methods on texts: areas in closed form, planted sources, resuming, and sentences for what does not fit."""

import json

import numpy as np
import pytest
import torch

import mamba_attn
from mamba_attn.commands.cli import main
from mamba_attn.datasets.loading import load
from mamba_attn.datasets.tasks import swapped
from mamba_attn.datasets.texts import open_texts
from mamba_attn.evaluation import texts
from mamba_attn.evaluation.specs import Model, choose_methods
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.texts import TextPlan, area, measure_texts, ranked

LINES = ["a charming and hilarious film, a little dull", "flat from start to end", "one of the best of the year"]


def chance(ids):
    """Of class 1, which counts fives."""
    count = (ids == 5).sum(1).double()
    return torch.sigmoid(4 * count - 2)


def test_areas_of_words_that_matter_first_and_last():
    ids, high, low = torch.tensor([[5, 3, 4, 6]]), 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(2.0))
    for fill in (1, None):  # replaced or left out: the count of fives is the same
        first = area(chance, ids, torch.tensor([0, 1, 2]), fill)
        last = area(chance, ids, torch.tensor([2, 1, 0]), fill)
        assert first == pytest.approx(((high + low) / 2 + 2 * low) / 3)
        assert last == pytest.approx((2 * high + (high + low) / 2) / 3)


def test_long_texts_are_shortened_in_steps():
    seen = []

    def length(ids):
        seen.append(ids.shape)
        return torch.ones(len(ids))

    assert area(length, torch.zeros(1, 500, dtype=torch.long), torch.arange(499), 1) == pytest.approx(1)
    assert seen == [(texts._STEPS + 1, 500)]


def test_ranking_puts_ties_in_an_order_that_the_seed_fixes():
    values = torch.tensor([1.0, 3.0, 1.0, 1.0])
    assert ranked(values, 0)[0] == 1
    assert torch.equal(ranked(values, 0), ranked(values, 0))
    assert any(not torch.equal(ranked(values, 0), ranked(values, seed)) for seed in range(1, 9))


def plan_of(names, data, methods, **options):
    chosen, _, unasked = choose_methods([methods])
    return TextPlan(
        [Model.parse(name) for name in names], [open_texts(each) for each in data], chosen, unasked, **options
    )


def test_sources_are_found_and_a_second_run_does_nothing(tmp_path, monkeypatch):
    def wanted(limit=6):
        return plan_of(["mamba_copy"], ["copying"], "frozen_contribution,random", limit=limit)

    (table,) = measure_texts(wanted(), Store(tmp_path / "s.jsonl"))
    figures = {name: {m: f.interval.value for m, f in its.items()} for name, its in table.figures.items()}
    assert table.accuracy == 1
    assert figures["source_first"]["frozen_contribution"] == 1
    assert figures["source_first"]["swap within a kind"] == 1
    assert 0.2 < figures["source_auc"]["random"] < 0.8
    assert set(figures["text_seconds"]) == {"frozen_contribution", "random"}
    calls = []
    monkeypatch.setattr(texts._OfTask, "lines", lambda self, name, keys: calls.append(keys) or [{"error": "x"}])
    (again,) = measure_texts(wanted(), Store(tmp_path / "s.jsonl"))
    assert {name: {m: f.interval.value for m, f in its.items()} for name, its in again.figures.items()} == figures
    assert calls == []
    measure_texts(wanted(7), Store(tmp_path / "s.jsonl"))  # more of the same texts, and those alone
    assert calls == [["6"]] * 3


def test_the_first_texts_are_the_same_whatever_their_number():
    few, many = (open_texts("copying").of_task(count) for count in (2, 5))
    assert torch.equal(few.ids, many.ids[:2])
    assert torch.equal(few.ids.gather(1, few.sources), few.answers)


def test_the_truth_of_the_tasks_is_their_models():
    """A swap at the source alone is heard of, so what stands there is what the model uses."""
    model, tasks = load("mamba_recall").model, open_texts("recall").of_task(4)
    lost = swapped(model, tasks)
    assert torch.equal(lost.argmax(2).T, tasks.sources)


def test_tokens_left_out_and_unknown(tmp_path):
    model = load("mamba_reviews")
    with pytest.raises(ValueError, match="compare\\(target='negative'\\): on texts, methods explain"):
        mamba_attn.compare(model, LINES, target="negative")
    (table,) = mamba_attn.compare(model, LINES, tmp_path, methods=["mamba_lrp", "random"], measures=["tokens"])
    gap = table.figures["tokens_gap"]
    assert next(iter(gap)) == "mamba_lrp"
    assert gap["mamba_lrp"].interval.value > 0.2 > gap["random"].interval.value
    assert "removed tokens become the tokenizer's unknown token, 1." in table.flags
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".txt", ".csv", ".json", ".jsonl"}
    page = (tmp_path / "compare.html").read_text()
    assert "LeRF - MoRF" in page
    assert page.count('class="mamba-tokens"') == 6  # a strip per text and method
    assert page.count("behind the outlined token") == 3
    assert "<b>MambaLRP</b>" in page
    assert "http" not in page
    contents = json.loads((tmp_path / "compare.json").read_text())
    assert contents["tables"][0]["figures"]["tokens_morf"]["mamba_lrp"]["images"] == 3


def test_one_bad_text_costs_itself_alone(tmp_path):
    (table,) = measure_texts(
        plan_of(["mamba_reviews"], [[*LINES, "."]], "random", fill="drop", measures=["tokens"]), Store(tmp_path / "s")
    )
    assert table.figures["tokens_gap"]["random"].images == 3
    ((reason, count),) = table.failed["random"].items()
    assert (count, "'.': 2 tokens; expected at least 3" in reason) == (1, True)


def test_the_command(tmp_path, capsys):
    arguments = ["compare", "--models", "mamba_copy", "--limit", "2", "--methods", "random", "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "mamba_copy on copying: where an answer was copied from, 2 texts, accuracy" in said
    assert "published in 2502.15612: another copying task, other models; not comparable" in said
    page = (tmp_path / "compare.html").read_text()
    assert page.count("to the outlined query; its source is token") == page.count('class="mamba-tokens"') == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "mamba_copy,vim_micro"], "mamba_copy reads text, vim_micro reads images; compare them in"),
        (["--models", "mamba_reviews"], "mamba_reviews was not trained on a task with known answers; give a text"),
        (["--models", "mamba_copy", "--data", "recall"], "--data recall: mamba_copy did not learn these tasks"),
        (["--models", "mamba_copy", "--data", "none.txt"], "--data none.txt: no such file; expected a text file"),
        (["--models", "mamba_copy", "--fill", "blur"], "--fill blur: this is for images"),
        (["--models", "mamba_copy", "--workers", "2"], "--workers: this is for images"),
        (["--models", "mamba_copy", "--measures", "pixels"], "--measures pixels: texts have no such measure"),
        (["--models", "mamba_copy", "--methods", "keep_and_remove_lrp"], "--methods keep_and_remove_lrp: mamba_copy: "),
        (["--models", "vim_micro"], "--data: expected a folder of images"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, capsys):
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
