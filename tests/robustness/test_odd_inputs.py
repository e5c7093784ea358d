"""Whatever is typed or lies in a file: an answer or a sentence, in time, in bounds, and no other numbers."""

import itertools
import os
import warnings

import pytest

from mamba_attn.commands import cli
from tests.robustness.judging import judge
from tests.robustness.odd_inputs import Case, World, cases

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork: each case runs in a process of its own")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def _complaints(world, count, seed):
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, in a process with threads
        for number, case in enumerate(itertools.islice(cases(world, seed), count)):
            outcome = judge(case)
            if outcome.complaint:
                found.append(f"{number}: {outcome.name}: {outcome.complaint}\n{outcome.text.strip()[-600:]}")
    return found


def test_a_sample(world):
    assert not (found := _complaints(world, 60, 0)), "\n\n".join(found)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_thousand(world, seed):
    assert not (found := _complaints(world, 250, seed)), "\n\n".join(found)


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        (lambda folder: [][0], "ended with 99"),
        (lambda folder: 2, "refused without a sentence"),
        (lambda folder: 98, "other numbers"),
        (lambda folder: len(bytearray(2 * 10**9).strip()) * 0, "GB"),
        (lambda folder: os.write(2, b"mamba-attn: 'int' object has no attribute 'x'") and 2, "Python's insides"),
    ],
)
def test_the_judge_complains(run, complaint):
    assert complaint in judge(Case("a mutant", run)).complaint


@pytest.mark.parametrize("command", ["explain", "collect", "compare", "report", "findings", "erf", "models"])
def test_what_the_cases_start_from_works(world, command):
    outcome = judge(Case(command, lambda folder: cli.main(world.calls()[command])))
    assert (outcome.code, outcome.complaint) == (0, ""), outcome.text
