"""SIGTERM and SIGKILL at random moments: a command that is called again until it ends leaves what one run leaves."""

import logging
import os
import random
import signal
import sys
import time
import traceback

import numpy as np
import pytest
from PIL import Image

from mamba_attn.commands import cli
from mamba_attn.core.decisions import LOGGER
from tests.robustness.odd_inputs import World

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork: commands run in processes of their own")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"))
    for index in range(4, 40):
        noise = np.random.default_rng(index).integers(0, 256, (20, 17, 3), np.uint8)
        Image.fromarray(noise).save(made.folder / "photos" / f"{index}.png")
    (made.folder / "photos" / "labels.csv").write_text(
        "file,label\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(40))
    )
    return made


def _start(arguments, folder):
    """The command in a forked process, in that folder."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(folder)
            for number in (1, 2):
                os.dup2(os.open(folder / f"said-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            LOGGER.addHandler(logging.StreamHandler())
            LOGGER.setLevel(logging.DEBUG)  # it says why something was not measured
            code = cli.main(arguments)
        except BaseException:  # noqa: BLE001 - SystemExit and KeyboardInterrupt, too
            traceback.print_exc()  # into the folder: the process ends before anybody else could say it
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _calls(world):
    calls = world.calls()
    calls["collect"] += ["--batch", "2"]
    compare = calls["compare"]
    compare[compare.index("--limit") + 1] = "6"
    return calls


def _content(command, folder):
    """What a run left, without how often it was begun."""
    if command == "collect":  # a page of the store holds its numbers
        os.waitpid(_start(["report", "out", "--out", "out.html"], folder), 0)
        return (folder / "out.html").read_bytes()
    return {path.name: path.read_bytes() for path in sorted((folder / "out").rglob("*")) if path.suffix in _LASTING}


_LASTING = {".csv", ".txt", ".html", ".npz"}


@pytest.mark.parametrize("command", ["collect", "compare", "findings", "erf"])
def test_killed_again_and_again(world, tmp_path, command):
    call, chance = _calls(world)[command], random.Random(command)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(_start(call, whole), 0)[1]) == 0
    seconds = time.monotonic() - started
    codes = []
    for number in range(8):
        child = _start(call, broken)
        if number < 6:
            time.sleep(seconds * chance.uniform(0.05, 0.8))
            os.kill(child, signal.SIGTERM if number % 2 else signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert codes[-1] in (0, 143, -signal.SIGKILL), (broken / "said-2").read_text()
    assert codes[-1] == 0
    assert _content(command, broken) == _content(command, whole)


def test_sigterm_is_no_traceback(world, tmp_path):
    child = _start(_calls(world)["collect"], tmp_path)
    said = tmp_path / "said-2"
    while "collecting" not in (said.read_text() if said.exists() else ""):
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 143)
    assert "Traceback" not in said.read_text()
