"""The stand-in driver, and kernels of the tests' own."""

from pathlib import Path

import pytest

from tests.ops.cuda.fake_cuda import FakeCuda, build


@pytest.fixture(scope="session")
def fake_cuda_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def fake_cuda(fake_cuda_path: Path) -> FakeCuda:
    return FakeCuda(fake_cuda_path)
