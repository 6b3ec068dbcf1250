"""The store: append records, read them back.

Adding is idempotent: a row whose id is there already is left as it is, so that a unit of work done twice after a
crash changes nothing. Every `add_*` commits by itself unless it runs inside `Store.transaction`, which groups
them into one commit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Select, Table, case, delete, func, select, text, true, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, IntegrityError

from prefloop.records import (
    AuthorKind,
    Checkpoint,
    Comparison,
    Dataset,
    JSONObject,
    Judgement,
    PrefloopError,
    Rater,
    Signal,
    Split,
    StepLabel,
    Task,
    TokenPath,
    Trajectory,
    canonical_json,
    content_hash,
)
from prefloop.store import database, rows, schema
from prefloop.store.rows import Row

T = TypeVar("T")

CHUNK = 2000
IN_CHUNK = 500  # ids in one query: below SQLite's limit of bound parameters

SCORES_BY_TASK = """
SELECT trajectory.task_id, scored.trajectory_id, scored.score
FROM (
    SELECT trajectory_id, avg(score) AS score
    FROM judgement
    WHERE rater_id = :rater_id AND status = 'ok'
    GROUP BY trajectory_id
) AS scored
JOIN trajectory {hint} ON trajectory.id = scored.trajectory_id
ORDER BY trajectory.task_id, scored.score DESC, scored.trajectory_id
"""


class Store:
    """All records of all runs, in one database.

    `clock` gives seconds since the epoch; it labels rows and times leases.
    """

    def __init__(self, location: str, *, must_exist: bool = False, clock: Callable[[], float] = time.time) -> None:
        self.location = location
        self.clock = clock
        self.engine = database.open_engine(location, must_exist=must_exist)
        self._local = threading.local()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the database."""
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Group what is added inside into one commit, all of it or nothing; nested uses join the outer one.

        An error inside undoes the whole of it, even where somebody between catches it.

        Raises:
            PrefloopError: the disk is full, the store is locked for too long, or a row breaks a rule of the schema.
        """
        current: Connection | None = getattr(self._local, "connection", None)
        if current is not None:
            try:
                yield current
            except BaseException:
                self._local.failed = True
                raise
            return
        with self._clear_errors(), self.engine.begin() as connection:
            self._local.connection, self._local.failed = connection, False
            try:
                yield connection
            finally:
                self._local.connection = None
            if self._local.failed:
                raise PrefloopError(f"store {self.location}: a part of this step failed; nothing of it was saved")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading; inside a transaction it sees what the transaction wrote.

        Raises:
            PrefloopError: the store is locked for too long or damaged.
        """
        current: Connection | None = getattr(self._local, "connection", None)
        if current is not None:
            yield current
        else:
            with self._clear_errors(), database.reading(self.engine) as connection:
                yield connection

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            raise PrefloopError(f"store {self.location} refuses a row: {error.orig}") from error
        except DatabaseError as error:
            raise PrefloopError(f"store {self.location}: {error.orig}; nothing of this step was saved") from error

    # --- writing ----------------------------------------------------------------------------------------

    def insert(self, table: Table, new: Iterable[Row]) -> int:
        """Append rows, leaving those whose key exists; the number of rows that were new."""
        dialect = postgresql if self.engine.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(table).on_conflict_do_nothing()
        before_after = []
        with self.transaction() as connection:
            for chunk in _chunks(new, CHUNK):
                counted = connection.execute(statement, chunk).rowcount
                before_after.append(max(counted, 0))
        return sum(before_after)

    def add_run(self, run_id: str, name: str, directory: str, settings: JSONObject) -> None:
        """Record a run and the settings it was started with."""
        row = {
            "id": run_id,
            "name": name,
            "directory": directory,
            "settings": settings,
            "settings_hash": content_hash(settings),
            "created_at": self.clock(),
        }
        self.insert(schema.run, [row])

    def change_settings(self, run_id: str, settings: JSONObject) -> None:
        """Replace the settings of a run; the caller sees to it that nothing it did depends on those that change.

        Raises:
            PrefloopError: the run has trajectories, which depend on all of them.
        """
        if self.has_trajectories(run_id):
            raise PrefloopError(f"run {run_id} has begun: its settings stay")
        values = {"settings": settings, "settings_hash": content_hash(settings)}
        with self.transaction() as connection:
            connection.execute(update(schema.run).where(schema.run.c.id == run_id).values(**values))

    def forget_run(self, run_id: str) -> None:
        """Forget a run that has not done anything.

        Raises:
            PrefloopError: the run has recorded what it did.
        """
        if self.events(run_id):
            raise PrefloopError(f"run {run_id} has begun: it stays")
        with self.transaction() as connection:
            connection.execute(delete(schema.run).where(schema.run.c.id == run_id))

    def add_tasks(self, tasks: Iterable[Task]) -> int:
        """Record tasks; returns how many were new."""
        return self.insert(schema.task, (rows.task_row(task) for task in tasks))

    def add_trajectories(self, trajectories: Iterable[Trajectory]) -> int:
        """Record trajectories with their token paths; returns how many were new. Their tasks must be there."""
        now = self.clock()
        num_new = 0
        with self.transaction():
            for chunk in _chunks(trajectories, CHUNK):
                num_new += self.insert(schema.trajectory, (rows.trajectory_row(t, now) for t in chunk))
                paths = [row for t in chunk for row in rows.token_path_rows(t)]
                if paths:
                    self.insert(schema.token_path, paths)
        return num_new

    def add_raters(self, raters: Iterable[Rater]) -> None:
        """Record raters."""
        self.insert(schema.rater, (rows.rater_row(rater) for rater in raters))

    def add_judgements(self, judgements: Iterable[Judgement]) -> int:
        """Record judgements; returns how many were new. Their raters and trajectories must be there.

        A judgement that stands is left as it is; a recorded failure gives way to a later attempt.
        """
        now, table = self.clock(), schema.judgement
        dialect = postgresql if self.engine.dialect.name == "postgresql" else sqlite
        insert = dialect.insert(table)
        statement = insert.on_conflict_do_update(
            index_elements=[table.c.id],
            set_={column.name: insert.excluded[column.name] for column in table.c},
            where=table.c.status != "ok",
        )
        with self.transaction() as connection:
            chunks = _chunks((rows.judgement_row(j, now) for j in judgements), CHUNK)
            return sum(max(connection.execute(statement, chunk).rowcount, 0) for chunk in chunks)

    def add_comparisons(self, comparisons: Iterable[Comparison]) -> int:
        """Record comparisons; returns how many were new (a submission sent twice is recorded once)."""
        now = self.clock()
        return self.insert(schema.comparison, (rows.comparison_row(c, now) for c in comparisons))

    def add_step_labels(self, labels: Iterable[StepLabel]) -> int:
        """Record labels of steps; returns how many were new."""
        now = self.clock()
        return self.insert(schema.step_label, (rows.step_label_row(label, now) for label in labels))

    def add_signals(self, signals: Iterable[Signal]) -> int:
        """Record users' signals; returns how many were new."""
        now = self.clock()
        return self.insert(schema.signal, (rows.signal_row(signal, now) for signal in signals))

    def add_dataset(self, dataset: Dataset) -> str:
        """Freeze a dataset; returns its id."""
        head = {
            "id": dataset.id,
            "recipe": dataset.recipe,
            "run_id": dataset.run_id or None,
            "iteration": dataset.iteration,
            "created_at": self.clock(),
        }
        with self.transaction():
            self.insert(schema.dataset, [head])
            self.insert(schema.dataset_member, rows.dataset_member_rows(dataset))
        return dataset.id

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint that is already safe on disk."""
        self.insert(schema.checkpoint, [rows.checkpoint_row(checkpoint, self.clock())])

    def add_event(self, run_id: str, iteration: int, kind: str, detail: JSONObject) -> None:
        """Record what a stage of an iteration found; the first record of its kind stays."""
        row = {
            "id": content_hash("event", run_id, iteration, kind),
            "run_id": run_id,
            "iteration": iteration,
            "kind": kind,
            "detail": detail,
            "created_at": self.clock(),
        }
        self.insert(schema.event, [row])

    def erase(self, trajectory_id: str) -> None:
        """Remove a trajectory's body and tokens on request; its tombstone stays.

        Raises:
            PrefloopError: there is no such trajectory.
        """
        table, paths = schema.trajectory, schema.token_path
        with self.transaction() as connection:
            values: Row = {"messages": None, "erased_at": self.clock(), "extra": {}}
            statement = update(table).where(table.c.id == trajectory_id).values(**values)
            if connection.execute(statement).rowcount == 0:
                raise PrefloopError(f"there is no trajectory {trajectory_id} in {self.location}")
            connection.execute(paths.delete().where(paths.c.trajectory_id == trajectory_id))

    # --- reading ----------------------------------------------------------------------------------------

    def run(self, run_id: str) -> RowMapping | None:
        """The row of a run, or None."""
        return self._first(select(schema.run).where(schema.run.c.id == run_id))

    def runs(self) -> list[RowMapping]:
        """All runs, the oldest first."""
        return self._all(select(schema.run).order_by(schema.run.c.created_at, schema.run.c.id))

    def tasks(self, ids: Iterable[str] | None = None, *, split: Split | None = None) -> dict[str, Task]:
        """Tasks by id: those named, or all (of a split), ordered by id."""
        query = select(schema.task).order_by(schema.task.c.id)
        if split is not None:
            query = query.where(schema.task.c.split == split.value)
        return {row["id"]: rows.task_from_row(row) for row in self._by_ids(query, schema.task.c.id, ids)}

    def trajectories(
        self,
        ids: Iterable[str] | None = None,
        *,
        run_id: str | None = None,
        iteration: int | None = None,
        author_kind: AuthorKind | None = None,
        author: str | None = None,
        with_paths: bool = False,
    ) -> list[Trajectory]:
        """Trajectories that match, ordered by (iteration, task, sample, id); erased ones are left out.

        With `ids`, in the order of the ids.
        """
        table = schema.trajectory
        wanted = {"run_id": run_id, "iteration": iteration, "author": author}
        query = select(table).where(table.c.erased_at.is_(None))
        for name, value in wanted.items():
            if value is not None:
                query = query.where(table.c[name] == value)
        if author_kind is not None:
            query = query.where(table.c.author_kind == author_kind.value)
        ids = list(ids) if ids is not None else None
        found = self._by_ids(
            query.order_by(table.c.iteration, table.c.task_id, table.c.sample, table.c.id), table.c.id, ids
        )
        paths = self._token_paths([row["id"] for row in found]) if with_paths else {}
        result = [rows.trajectory_from_row(row, paths.get(row["id"], ())) for row in found]
        if ids is None:
            return result
        by_id = {trajectory.id: trajectory for trajectory in result}
        return [by_id[i] for i in ids if i in by_id]

    def has_trajectories(self, run_id: str) -> bool:
        """Whether a run has made a trajectory, erased ones included."""
        return (
            self._first(select(schema.trajectory.c.id).where(schema.trajectory.c.run_id == run_id).limit(1)) is not None
        )

    def _token_paths(self, ids: Sequence[str]) -> dict[str, tuple[TokenPath, ...]]:
        table = schema.token_path
        query = select(table).order_by(table.c.trajectory_id, table.c.position)
        paths: dict[str, tuple[TokenPath, ...]] = {}
        for row in self._by_ids(query, table.c.trajectory_id, ids):
            paths[row["trajectory_id"]] = (*paths.get(row["trajectory_id"], ()), rows.token_path_from_row(row))
        return paths

    def raters(self) -> dict[str, Rater]:
        """All raters by id."""
        return {row["id"]: rows.rater_from_row(row) for row in self._all(select(schema.rater))}

    def judgements(
        self, *, trajectory_ids: Iterable[str] | None = None, rater_id: str | None = None
    ) -> list[Judgement]:
        """Judgements of the named trajectories, or of all, ordered by (trajectory, rater, replicate)."""
        table = schema.judgement
        query = select(table).order_by(table.c.trajectory_id, table.c.rater_id, table.c.replicate)
        if rater_id is not None:
            query = query.where(table.c.rater_id == rater_id)
        return [rows.judgement_from_row(row) for row in self._by_ids(query, table.c.trajectory_id, trajectory_ids)]

    def top_k(self, rater_id: str, k: int) -> list[tuple[str, str, float]]:
        """(task, trajectory, score) of the k best of each task by a rater's mean score, best first.

        Ties go to the smaller trajectory id, which is a hash and so favours nobody.
        """
        # Left alone, SQLite looks the task up by the primary key, whose index does not hold it.
        hint = "INDEXED BY ix_trajectory_id_task_id" if self.engine.dialect.name == "sqlite" else ""
        with self.reading() as connection:
            scored = connection.execute(text(SCORES_BY_TASK.format(hint=hint)), {"rater_id": rater_id}).tuples()
            # Cut here and not in a window of SQL, which is slower than handing all rows over.
            by_task = groupby(scored, key=itemgetter(0))
            return [(task, trajectory, score) for _, group in by_task for task, trajectory, score in islice(group, k)]

    def comparisons(self, *, rater_id: str | None = None) -> list[Comparison]:
        """Comparisons that stand, in the order they were made: those replaced or withdrawn are left out."""
        table = schema.comparison
        query = select(table).order_by(table.c.created_at, table.c.id)
        if rater_id is not None:
            query = query.where(table.c.rater_id == rater_id)
        found = self._all(query)
        replaced = {row["replaces"] for row in found if row["replaces"]}
        standing = [row for row in found if row["id"] not in replaced and row["status"] != "withdrawn"]
        return [rows.comparison_from_row(row) for row in standing]

    def step_labels(
        self, *, trajectory_ids: Iterable[str] | None = None, rater_id: str | None = None
    ) -> list[StepLabel]:
        """Labels of steps of the named trajectories, or of all, ordered by trajectory and id."""
        table = schema.step_label
        query = select(table).order_by(table.c.trajectory_id, table.c.id)
        if rater_id is not None:
            query = query.where(table.c.rater_id == rater_id)
        return [rows.step_label_from_row(row) for row in self._by_ids(query, table.c.trajectory_id, trajectory_ids)]

    def dataset(self, dataset_id: str) -> Dataset:
        """A frozen dataset.

        Raises:
            PrefloopError: there is no such dataset, or its members do not have its hash.
        """
        head = self._first(select(schema.dataset).where(schema.dataset.c.id == dataset_id))
        if head is None:
            raise PrefloopError(f"there is no dataset {dataset_id} in {self.location}")
        member, t = schema.dataset_member, schema.trajectory
        query = select(member, t.c.task_id).join(t, t.c.id == member.c.chosen_id)
        found = self._all(query.where(member.c.dataset_id == dataset_id).order_by(member.c.position))
        dataset = rows.dataset_from_rows(head, found)
        if dataset.id != dataset_id:
            raise PrefloopError(f"dataset {dataset_id} in {self.location} is damaged: its members hash to {dataset.id}")
        return dataset

    def datasets(self, *, run_id: str | None = None) -> list[RowMapping]:
        """Rows of the datasets, the oldest first, with `num_members` and `kind`: what the first member is."""
        head, member, first = schema.dataset, schema.dataset_member, schema.dataset_member.alias("first")
        count = select(func.count()).where(member.c.dataset_id == head.c.id).scalar_subquery()
        kind = case(
            (first.c.rejected_id.is_not(None), "pairs"),
            (first.c.value.is_not(None), "rollouts"),
            (first.c.labelled.is_not(true()), "demonstrations"),
            (first.c.desirable.is_(None), "steps"),
            else_="labelled samples",
        )
        joined = head.outerjoin(first, (first.c.dataset_id == head.c.id) & (first.c.position == 0))
        query = select(head, count.label("num_members"), kind.label("kind")).select_from(joined)
        query = query.order_by(head.c.created_at, head.c.id)
        return self._all(query if run_id is None else query.where(head.c.run_id == run_id))

    def checkpoints(self, *, run_id: str | None = None) -> list[Checkpoint]:
        """Checkpoints, the oldest first."""
        table = schema.checkpoint
        query = select(table).order_by(table.c.iteration, table.c.created_at, table.c.id)
        query = query if run_id is None else query.where(table.c.run_id == run_id)
        return [rows.checkpoint_from_row(row) for row in self._all(query)]

    def checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        """The checkpoint of this id, or None."""
        row = self._first(select(schema.checkpoint).where(schema.checkpoint.c.id == checkpoint_id))
        return None if row is None else rows.checkpoint_from_row(row)

    def events(self, run_id: str, *, kind: str | None = None) -> list[RowMapping]:
        """What the stages of a run recorded (`iteration`, `kind`, `detail`, `created_at`), in order."""
        table = schema.event
        query = select(table).where(table.c.run_id == run_id).order_by(table.c.iteration, table.c.created_at)
        return self._all(query if kind is None else query.where(table.c.kind == kind))

    def event(self, run_id: str, iteration: int, kind: str) -> JSONObject | None:
        """The detail of one event, or None when that stage has not finished."""
        row = self._first(
            select(schema.event.c.detail).where(schema.event.c.id == content_hash("event", run_id, iteration, kind))
        )
        return None if row is None else dict(row["detail"])

    def counts(self) -> dict[str, int]:
        """The number of rows of each table."""
        with self.reading() as connection:
            return {
                name: connection.execute(select(func.count()).select_from(table)).scalar_one()
                for name, table in schema.metadata.tables.items()
            }

    # --- queries ----------------------------------------------------------------------------------------

    def _all(self, query: Select[Any]) -> list[RowMapping]:
        with self.reading() as connection:
            return list(connection.execute(query).mappings())

    def _first(self, query: Select[Any]) -> RowMapping | None:
        with self.reading() as connection:
            return connection.execute(query).mappings().first()

    def _by_ids(self, query: Select[Any], column: Any, ids: Iterable[str] | None) -> list[Any]:
        if ids is None:
            return self._all(query)
        return [row for chunk in _chunks(ids, IN_CHUNK) for row in self._all(query.where(column.in_(chunk)))]


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def logical_rows(store: Store, table: Table, *, without: Sequence[str] = ("created_at",)) -> list[str]:
    """The rows of a table as canonical JSON, sorted, without the columns that depend on when they were written."""
    with store.reading() as connection:
        found = connection.execute(select(table)).mappings()
        kept = [{k: _plain(v) for k, v in row.items() if k not in without} for row in found]
    return sorted(canonical_json(row) for row in kept)


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value
