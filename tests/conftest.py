"""One thread, fixed seeds, NaN in uninitialised memory, and no trace may leave anything on a model."""

import importlib
import importlib.util
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; subprocesses inherit it

import hypothesis
import pytest
import torch

import tests.typechecker  # noqa: F401 - pyproject.toml names it, and only its first part would be imported there
from tests.leaks import Watch

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")
WATCH = Watch()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before any test module is imported, so that each of them sees the watched trace and a timm that imports."""
    torch.set_num_threads(1)
    config = session.config  # with workers, the main process imports no tests, unless it only lists them
    if hasattr(config, "workerinput") or config.getoption("dist") == "no" or config.getoption("collectonly"):
        importlib.import_module("mamba_attn")
        if importlib.util.find_spec("mamba_attn.tracing.tracer"):
            WATCH.install(importlib.import_module("mamba_attn.tracing.tracer"))


@pytest.fixture(autouse=True)
def _seed_and_nan_fill() -> Iterator[None]:
    """One thread, seeds; and torch.empty, in Python and C++, gives NaN (the largest integer for integer types)."""
    torch.set_num_threads(1)  # commands and benchmarks under test set their own
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose traces left something on a model, except what its ``changes_model`` marker names."""
    WATCH.collect()
    yield
    marker = request.node.get_closest_marker("changes_model")
    found = [text for aspect, text in WATCH.collect() if marker is None or aspect not in marker.args]
    if found:
        pytest.fail("a trace left this behind:\n" + "\n".join(found), pytrace=False)
