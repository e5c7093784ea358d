"""The help of every command: at once, on 80 columns, with examples that parse."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mamba_attn
from mamba_attn.attribution import catalogue
from mamba_attn.commands import cli

ROOT = Path(__file__).parents[2]
COMMANDS = ("explain", "explore", "compare", "collect", "report", "findings", "erf", "bench", "models", "doctor")


@pytest.fixture
def helped(monkeypatch, capsys):
    """What --help prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return shown


def test_help_does_not_wait_for_torch():
    code = """
import sys
from mamba_attn.commands import cli
for arguments in ([], ["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:])):
    try:
        cli.main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
print([name for name in ("torch", "numpy", "rich") if name in sys.modules], file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *COMMANDS[1:]]  # explain's lists the methods, which needs torch
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "[]"
    assert f"mamba-attn {mamba_attn.__version__}\n" in result.stdout


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns_and_has_examples(helped, name):
    text = helped(*filter(None, [name]))
    assert [line for line in text.splitlines() if len(line) > 80] == []
    examples = re.findall(rf"^  mamba-attn {name}.*", text, re.MULTILINE)
    assert len(examples) >= 3
    for example in examples if name else ():
        words = shlex.split(example, comments=True)[1:]
        parser = cli.parser()
        assert parser.parse_args(words).command == name


def test_the_help_of_explain_lists_every_method(helped):
    listed = set(re.findall(r"[a-z_]+", helped("explain").partition("methods, by")[2]))
    assert set(catalogue.METHODS) <= listed
    deaf = re.search(r"These ignore --layer: ([^.]*)\.", helped("explain"))[1]
    assert {"occlusion", "random"} <= set(re.split(r",\s+", deaf))
    assert "raw_attention" not in deaf
