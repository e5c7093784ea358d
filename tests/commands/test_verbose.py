"""``--verbose``, and the logger "mamba_attn": what is decided, one line each."""

import logging

import pytest
import torch

from mamba_attn import ops
from mamba_attn.commands import cli
from mamba_attn.core import decisions


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(decisions, "_said", set())
    logger = logging.getLogger("mamba_attn")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def scan():
    u, A, B = torch.rand(1, 4, 3), -torch.rand(4, 2), torch.rand(1, 2, 3)
    return ops.selective_scan(u, u, A, B, B)


def test_a_decision_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="mamba_attn"):
        scan()
        scan()
    assert [record.getMessage() for record in caplog.records if "operators" in record.getMessage()] == [
        "operators on cpu: backend native"
    ]


def test_the_reason_for_a_slower_backend_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="mamba_attn"):
        torch.func.vmap(lambda u: ops.selective_scan(u[None], u[None], -torch.ones(4, 2), u[None, :2], u[None, :2]))(
            torch.rand(2, 4, 3)
        )
    assert "operators on cpu: backend blocked; not native, for torch.func cannot transform it" in caplog.text


def test_without_a_listener_nothing_is_said(capsys):
    scan()
    assert capsys.readouterr() == ("", "")
    assert not decisions._said


def test_the_flag(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "explain",
        "--model",
        "vim_micro",
        "--option",
        "depth=1",
        "--weights",
        "random",
        "--method",
        "raw_attention",
        "--beside",
        "none",
    ]
    assert cli.main([*given, "--out", "quiet"]) == 0
    assert "operators on" not in capsys.readouterr().err
    assert cli.main([*given, "--out", "loud", "-v"]) == 0
    told = capsys.readouterr().err
    assert " ms: model vim_micro: vim_micro, weights random, on cpu" in told
    assert " ms: operators on cpu: backend native" in told
