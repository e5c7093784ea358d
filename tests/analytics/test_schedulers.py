"""The recipes of docs/how-to/large_runs.md: parts made by Dask, and by submitit."""

import pytest

from mamba_attn.analytics import collect
from tests.analytics import cases
from tests.analytics.cases import content, same
from tests.analytics.test_parts import PARTS
from tests.test_docs import run

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]  # of foreign packages


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    selector = cases.folder_of(folder, 2)
    collect(cases.request(selector, **PARTS), folder / "whole")
    return selector, content(folder / "whole")


def test_dask(place, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'dask[distributed]'")
    selector, whole = place
    request, store = cases.request(selector, **PARTS), str(tmp_path / "store")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            found = run("how-to/large_runs.md")["with_dask"](client, request, store)
    assert (found.new, found.counted) == (0, 6)  # collect had nothing left to do
    assert same(content(store), whole)


def test_submitit(place, tmp_path):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")
    selector, whole = place
    request, store = cases.request(selector, **PARTS), str(tmp_path / "store")
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=10)
    found = run("how-to/large_runs.md")["with_submitit"](executor, request, store)
    assert (found.new, found.counted) == (0, 6)
    assert same(content(store), whole)
