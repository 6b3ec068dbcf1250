"""The schema that migrations make is the one that the code believes in."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

import prefloop.store
from prefloop.records import Dataset, Ended, Pair, PrefloopError, Thread
from prefloop.store import Store, database, schema
from store_records import TASK, fill


def checks(path: Path) -> dict[str, str]:
    """Table definitions as SQLite keeps them, with spaces, quotes and the order of clauses evened out."""
    with sqlite3.connect(path) as connection:
        found = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name <> 'alembic_version'"
        )
        lines = {name: sql.replace('"', "").splitlines() for name, sql in found}
        return {name: "\n".join(sorted(line.strip().rstrip(",") for line in found)) for name, found in lines.items()}


def test_migrations_make_what_the_metadata_says(tmp_path: Path):
    with Store(str(tmp_path / "migrated.db")) as store, store.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, schema.metadata) == []
    # Alembic does not compare CHECK constraints: the text of the tables does.
    engine = create_engine(f"sqlite:///{tmp_path / 'metadata.db'}")
    schema.metadata.create_all(engine)
    engine.dispose()
    assert checks(tmp_path / "migrated.db") == checks(tmp_path / "metadata.db")


def test_the_code_knows_the_newest_migration():
    scripts = ScriptDirectory(str(Path(prefloop.store.__file__).parent / "migrations"))
    assert scripts.get_heads() == [database.HEAD]


def test_nothing_in_the_schema_stands_in_the_way_of_postgresql():
    for table in schema.metadata.sorted_tables:
        made = str(CreateTable(table).compile(dialect=postgresql.dialect()))
        assert made.strip().startswith(f"CREATE TABLE {table.name}")
    assert "JSONB" in str(CreateTable(schema.task).compile(dialect=postgresql.dialect()))


def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "new.db"
    with Store(str(path)) as store, store.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = path.read_bytes()
    with pytest.raises(PrefloopError, match=r"new\.db.* was written by another version of prefloop") as caught:
        Store(str(path))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE song (title TEXT)")
    before = path.read_bytes()
    with pytest.raises(PrefloopError, match="is a database, but not a prefloop store"):
        Store(str(path))
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("remember the milk\n" * 100)
    with pytest.raises(PrefloopError, match=r"notes\.txt.* is not a prefloop store"):
        Store(str(path))
    assert path.read_text().startswith("remember the milk")


def test_a_store_that_must_exist_is_not_made(tmp_path: Path):
    with pytest.raises(PrefloopError, match="there is no store at"):
        Store(str(tmp_path / "none.db"), must_exist=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["nosuchdb://x/y", "://", "postgresql+nodriver://h/d"])
def test_a_location_that_names_no_database_is_clear(location: str):
    with pytest.raises(PrefloopError, match="neither a path nor a database URL"):
        Store(location)


def test_a_folder_that_cannot_hold_a_store_is_clear(tmp_path: Path):
    with pytest.raises(PrefloopError, match="cannot be opened"):
        Store(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefloopError, match="cannot be opened"):
        Store(str(tmp_path / "file" / "store.db"))


@pytest.mark.parametrize(
    ("library", "mode"), [((3, 40, 1), "TRUNCATE"), ((3, 51, 2), "TRUNCATE"), ((3, 51, 3), "WAL"), ((4, 0, 0), "WAL")]
)
def test_wal_is_used_only_where_the_library_is_free_of_its_bug(library: tuple[int, ...], mode: str):
    assert database.journal_mode(library) == mode


def test_connections_are_durable_and_check_references(tmp_path: Path):
    with Store(str(tmp_path / "s.db")) as store, store.reading() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("foreign_keys", "synchronous", "journal_mode", "busy_timeout")
        }
    mode = database.journal_mode().lower()
    assert pragma == {"foreign_keys": 1, "synchronous": 2, "journal_mode": mode, "busy_timeout": 30_000}


def test_damage_is_found(tmp_path: Path):
    path = tmp_path / "s.db"
    with Store(str(path)) as store:
        assert database.integrity_problems(store.engine) == []
    with sqlite3.connect(path) as connection:  # without foreign keys, as a careless tool would
        connection.execute("INSERT INTO token_path VALUES ('gone', 0, '', '', '', '', '', '')")
    with Store(str(path)) as store:
        (problem,) = database.integrity_problems(store.engine)
    assert "token_path" in problem and "trajectory" in problem


def test_a_dataset_of_the_first_schema_is_read_as_it_was(tmp_path: Path):
    path = tmp_path / "old.db"
    dataset = Dataset({"made": "by hand"}, (Pair(TASK.id, "x", "y", 0.8, 0.9, 2.0, ("e",)),))
    with Store(str(path)) as store:
        fill(store, "x", "y")
        store.add_dataset(dataset)
    with sqlite3.connect(path) as connection:
        for column in ("margin", "tied", "labelled", "desirable", "value"):
            connection.execute(f"ALTER TABLE dataset_member DROP COLUMN {column}")
        for table in ("step_metrics", "logprob", "rollout_age"):
            connection.execute(f"DROP TABLE {table}")
        _without_threads(connection)
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    with Store(str(path)) as store:
        assert store.dataset(dataset.id) == dataset


def _without_threads(connection: sqlite3.Connection):
    """The table of trajectories as it was before an agent could hold several conversations."""
    connection.execute("ALTER TABLE trajectory DROP COLUMN threads")
    connection.execute("PRAGMA writable_schema = ON")
    since = "'deadline', 'interrupted', "
    connection.execute("UPDATE sqlite_master SET sql = replace(sql, ?, '') WHERE name = 'trajectory'", (since,))


def test_a_table_that_is_made_anew_keeps_its_rows_and_those_that_refer_to_them(tmp_path: Path):
    path = tmp_path / "old.db"
    with Store(str(path)) as store:
        fill(store, "x", "y")
        before = store.trajectories(["x", "y"], with_paths=True)
    with sqlite3.connect(path) as connection:
        _without_threads(connection)
        connection.execute("ALTER TABLE dataset_member DROP COLUMN value")
        connection.execute("DROP TABLE rollout_age")
        connection.execute("UPDATE alembic_version SET version_num = '0003'")
    threads = (Thread(0, 1, 1, ({"name": "t"},), (0, 2)), Thread(1, 2, 0, (), (1,)))
    late = replace(before[0], id="late", ended=Ended.DEADLINE, threads=threads)
    with Store(str(path)) as store:
        assert [t.messages for t in store.trajectories(["x", "y"])] == [t.messages for t in before]
        assert database.integrity_problems(store.engine) == []
        store.add_trajectories([late])
        (found,) = store.trajectories(["late"])
        assert (found.ended, found.threads) == (late.ended, late.threads)
    with sqlite3.connect(path) as connection:  # as threads were recorded before their turns had times
        (found,) = connection.execute("SELECT threads FROM trajectory WHERE id = 'late'").fetchone()
        untimed = [{key: value for key, value in thread.items() if key != "times"} for thread in json.loads(found)]
        connection.execute("UPDATE trajectory SET threads = ? WHERE id = 'late'", (json.dumps(untimed),))
    with Store(str(path)) as store:
        assert store.trajectories(["late"])[0].threads == tuple(replace(thread, times=()) for thread in threads)
    with sqlite3.connect(path) as connection, pytest.raises(sqlite3.IntegrityError, match="ended_known"):
        connection.execute("UPDATE trajectory SET ended = 'nonsense'")
