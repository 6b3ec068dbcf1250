"""The age of a rollout is kept by the update that learned from it, once."""

import pytest

from prefloop.records import PrefloopError
from prefloop.store import Store
from prefloop.store.ages import add_ages, read_ages
from store_records import fill


@pytest.fixture
def store():
    with Store(":memory:") as opened:
        fill(opened, "t")
        opened.add_run("run", "mine", "runs/mine", {})
        yield opened


def test_each_update_has_its_own(store):
    add_ages(store, "run", 0, {"t": 0})
    add_ages(store, "run", 2, {"t": 2})
    add_ages(store, "run", 2, {"t": 5})  # done again after a kill: what is there stays
    add_ages(store, "run", 3, {"t": None})
    assert [read_ages(store, "run", i) for i in range(4)] == [
        {"t": 0},
        {},
        {"t": 2},
        {"t": None},
    ]


def test_what_is_not_there_or_not_written_yet_has_no_age(store):
    with pytest.raises(PrefloopError, match="refuses a row"):
        add_ages(store, "run", 0, {"nobody's": 0})
    with pytest.raises(PrefloopError, match="refuses a row"):
        add_ages(store, "run", 0, {"t": -1})
