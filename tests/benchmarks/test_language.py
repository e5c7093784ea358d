"""Tasks with known answers: what is asked for stands at its source, small models learn them, ranks are ranks."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import language, text_page, text_truth
from benchmarks.marked_pages import filled
from mamba_attn.datasets.tasks import ASK, source_ranks
from mamba_attn.models import create


@pytest.mark.parametrize("name", language.TASKS)
def test_the_answer_stands_at_its_source(name):
    batch = language.TASKS[name].make(5, torch.Generator().manual_seed(3))
    assert torch.equal(batch.ids.gather(1, batch.sources), batch.answers)
    assert int(batch.sources.max()) < int(batch.queries.min())
    if name == "mamba_copy":
        assert bool((batch.sources.diff(dim=1) > 0).all())  # asked for in their order
        assert bool((batch.ids[:, batch.queries] == ASK).all())
    else:
        assert torch.equal(batch.ids.gather(1, batch.sources - 1), batch.ids[:, batch.queries])  # the key before it
        assert all(len(set(row)) == len(row) for row in batch.ids[:, batch.queries].tolist())


def test_training_lowers_the_loss_and_is_repeatable(monkeypatch):
    def trained(steps):
        short = dataclasses.replace(language.TASKS["mamba_copy"], steps=steps)
        monkeypatch.setitem(language.TASKS, "mamba_copy", short)
        return language.train_task("mamba_copy", log=lambda line: None)[0]

    batch = language.copying(64, torch.Generator().manual_seed(9))
    losses = []
    for model in (trained(2), trained(2), trained(40)):
        with torch.no_grad():
            logits = model(batch.ids)[:, batch.queries].flatten(0, 1)
        losses.append(float(torch.nn.functional.cross_entropy(logits, batch.answers.flatten())))
    assert losses[0] == losses[1] > losses[2]


@pytest.mark.full
@pytest.mark.parametrize(("name", "seconds"), [("mamba_copy", 60), ("mamba_recall", 180)])
def test_learnt_from_nothing(name, seconds):
    model, card = language.train_task(name)
    assert card["accuracy"] >= 0.99
    assert card["cpu_seconds"] <= seconds
    found = text_truth.measure(name, model, 50, text_truth.CONSERVING)
    assert found["methods"]["MambaLRP"]["recall at 2"] >= 0.95


def test_ranks_of_planted_values():
    batch = language.copying(40, torch.Generator().manual_seed(1))
    sizes = batch.queries.double().numpy()[None]
    planted = [torch.zeros(40, 24).scatter(1, batch.sources[:, [q]], 1.0) for q in range(4)]

    def judged(values):
        found = np.stack([source_ranks(values[q], batch, q).numpy() for q in range(4)], 1)
        return text_truth.scores(found, sizes)

    best = judged(planted)
    assert (best["first"], best["AUC"], best["AP"], best["mean rank"]) == (1, 1, 1, 0)
    assert judged([-each for each in planted])["AUC"] == 0
    same = judged([torch.ones(40, 24)] * 4)
    assert (same["first"], same["AUC"]) == (0, 0.5)
    late = [each + 100 * (torch.arange(24) >= batch.queries[q]) for q, each in enumerate(planted)]
    assert judged(late) == best  # the question and what comes after it do not count
    noise = torch.rand(40, 24, generator=torch.Generator().manual_seed(2))
    assert judged([noise] * 4)["AUC"] == pytest.approx(0.5, abs=0.08)


def test_the_methods_find_it():
    model = create("mamba_copy", weights="demo")
    found = text_truth.measure("mamba_copy", model, 12, (*text_truth.CONSERVING, "RawAttention"))["methods"]
    assert found["swap within a kind"]["first"] == 1
    assert found["FrozenContribution"]["first"] > 0.95
    assert found["MambaLRP"]["recall at 2"] > 0.95
    assert found["RawAttention"]["first"] < 0.2


def test_the_page_is_what_was_measured():
    results = text_page.measured()
    page = text_page.PAGE.read_text()
    assert filled(page, text_page.PARTS, results) == page
    assert not any(its["quick"] for its in results.values())
    for task in language.TASKS:
        methods = results["truth"]["details"][task]["methods"]
        assert methods["swap within a kind"]["first"] == 1
        assert methods["RawAttention"]["first"] < methods["RandomMap"]["first"] > methods["AttentionRollout"]["first"]
        assert results["truth"]["details"][task]["accuracy"] >= 0.99
