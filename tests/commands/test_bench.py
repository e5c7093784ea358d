import re

import pytest
import torch

from mamba_attn.commands import bench, cli


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_table_has_every_model_and_deit(capsys, monkeypatch):
    monkeypatch.setattr(bench, "_medians", lambda calls, rounds, device: {
        key: {"forward": 2.0, "traced": 2.5, "attention": 5.0}[key[1]] / (1 + (key[0] == bench._DEIT)) for key in calls
    })  # fmt: skip
    assert cli.main(["bench", "--model", "vim_micro", "vmamba_micro", "vim_micro", "--batch", "2"]) == 0
    title, header, *rows = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("batch 2, CPU time of one thread, torch ")
    assert re.split("  +", header) == list(bench._HEADER)
    assert [re.split("  +", row) for row in rows] == [
        ["vim_micro", "2000.0 ms", "2500.0 ms", "5000.0 ms", "12", "2.00", "3.00"],
        ["vmamba_micro", "2000.0 ms", "2500.0 ms", "5000.0 ms", "10", "2.00", "3.00"],
        ["deit_tiny_patch16_224", "1000.0 ms", "1250.0 ms", "2500.0 ms", "12", "1.00", "1.50"],
    ]


def test_calls_take_turns_and_the_first_is_not_timed():
    called = []
    calls = {(name, "forward"): lambda name=name: called.append(name) for name in "ab"}
    assert set(bench._medians(calls, 3, "cpu")) == set(calls)
    assert called == list("abababab")


def test_what_is_timed_is_the_trace_and_its_matrices():
    from mamba_attn import models

    model = models.create("vim_micro", image_size=32, depth=2, embed_dim=16)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        plain, nothing = bench._traced(model, images, attention=False)
        logits, matrices = bench._traced(model, images, attention=True)
    assert nothing is None
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert [tuple(each.shape) for each in matrices] == [(2, 17, 17)] * 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "vim_tinny"], "--model vim_tinny: no such model. Did you mean 'vim_tiny'"),
        (["--batch", "0"], "--batch 0: expected a number from 1 on."),
        (["--rounds", "0"], "--rounds 0: expected a number from 1 on."),
        (["--device", "cuda"], "--device cuda: PyTorch sees no CUDA device here; use --device cpu."),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(capsys, monkeypatch, options, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mamba-attn bench: {sentence}")
