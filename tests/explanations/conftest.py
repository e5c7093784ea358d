from tests.viewer.conftest import browser  # noqa: F401 - a fixture
