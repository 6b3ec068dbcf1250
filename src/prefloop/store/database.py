"""Opening the database: SQLite by default, PostgreSQL by URL; durability settings and migrations."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from prefloop.records import PrefloopError

BUSY_TIMEOUT_S = 30.0
WAL_SAFE_SINCE = (3, 51, 3)  # earlier libraries can corrupt a database in WAL mode when two processes write
HEAD = "0006"


def store_url(location: str) -> str:
    """The database URL of a store named by URL or by the path of a SQLite file."""
    return location if "://" in location else f"sqlite:///{location}"


def journal_mode(library: tuple[int, ...] = sqlite3.sqlite_version_info) -> str:
    """WAL where the SQLite library is free of its corruption bug, else a rollback journal.

    The journal is truncated and synced at commit rather than deleted: a journal whose deletion was lost in a
    power failure would roll the commit back.
    """
    return "WAL" if library >= WAL_SAFE_SINCE else "TRUNCATE"


def open_engine(location: str, *, must_exist: bool = False) -> Engine:
    """An engine on the store, its schema brought up to date.

    Raises:
        PrefloopError: the store does not exist (with `must_exist`), cannot be opened, is not a store, or was
            written by a newer version.
    """
    try:
        url = make_url(store_url(location))
        if url.get_backend_name() == "sqlite":
            _prepare_file(url.database, must_exist)
        engine = create_engine(url)
    except ModuleNotFoundError as error:
        raise PrefloopError(f"that kind of store needs the package {error.name}: pip install {error.name}") from None
    except (ArgumentError, NoSuchModuleError) as error:
        location = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", location)
        raise PrefloopError(f"store {location!r} is neither a path nor a database URL: {error}") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    location = url.render_as_string(hide_password=True) if url.password else location
    try:
        _migrate(engine, location)
    except OperationalError as error:
        raise PrefloopError(f"store {location!r} cannot be opened: {error.orig}") from None
    except DBAPIError as error:
        raise PrefloopError(f"{location!r} is not a prefloop store: {error.orig}") from None
    return engine


def _prepare_file(path: str | None, must_exist: bool) -> None:
    if not path or path == ":memory:":
        return
    if must_exist and not Path(path).exists():
        raise PrefloopError(f"there is no store at {path}: name it with --store or PREFLOOP_STORE")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrefloopError(f"store {path!r} cannot be opened: {error}") from None


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transaction handling would begin deferred, which fails at once when two writers upgrade.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    cursor.execute(f"PRAGMA journal_mode = {journal_mode()}")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_size_limit = 67108864")
    cursor.execute("PRAGMA cache_size = -65536")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _migrate(engine: Engine, location: str) -> None:
    with engine.execution_options(read_only=True).connect() as connection:
        version = _schema_version(connection, location)
    if version == HEAD:
        return
    # Imported only when there is something to do: it would slow down every command.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    with _without_references(engine) as connection, as_file(files("prefloop.store") / "migrations") as scripts:
        config = Config()
        config.set_main_option("script_location", str(scripts))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise PrefloopError(f"store {location!r} was written by another version of prefloop: {error}") from None


@contextmanager
def _without_references(engine: Engine) -> Iterator[Connection]:
    """A transaction in which a table may be made anew: SQLite would miss the rows that refer to it meanwhile."""
    with engine.connect() as connection:
        sqlite = engine.dialect.name == "sqlite"
        if sqlite:
            connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
        with connection.begin():
            yield connection
        if sqlite:
            connection.connection.cursor().execute("PRAGMA foreign_keys = ON")


def _schema_version(connection: Connection, location: str) -> str | None:
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if tables:
        raise PrefloopError(f"{location!r} is a database, but not a prefloop store (it has no schema version)")
    return None


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that sees one consistent state and takes no write lock."""
    with engine.execution_options(read_only=True).connect() as connection:
        yield connection


def integrity_problems(engine: Engine) -> list[str]:
    """What is wrong with the database file and its references; empty when it is whole."""
    if engine.dialect.name != "sqlite":
        return []
    with reading(engine) as connection:
        found: list[Any] = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        orphans = list(connection.exec_driver_sql("PRAGMA foreign_key_check"))
    problems = [str(line) for line in found if line != "ok"]
    return problems + [f"table {row[0]}: row {row[1]} refers to a missing row of {row[2]}" for row in orphans]
