import shutil

import pytest

from prefloop.store import Store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """The file of a store without rows: copying it is faster than migrating a new one for every test."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    Store(str(path)).close()
    return path


@pytest.fixture
def store(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path / "store.db")
    with Store(str(tmp_path / "store.db")) as store:
        yield store
