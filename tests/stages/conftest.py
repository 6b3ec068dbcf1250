from pathlib import Path

import pytest

from fit_runs import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    return tiny_model(tmp_path_factory.mktemp("model"))
