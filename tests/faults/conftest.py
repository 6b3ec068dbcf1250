"""One undisturbed miniature run for all the tests of faults."""

import pytest

from fault_runs import MiniatureRun, Outcome


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the miniature run comes to when nothing goes wrong."""
    return MiniatureRun(tmp_path_factory.mktemp("undisturbed")).finish()
