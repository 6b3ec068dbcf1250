"""Importing a file into the store: one transaction, every bad row named, nothing twice."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefloop.formats.agents import TAU_BENCH, convert_tau_bench, convert_tool_calls, is_call_list
from prefloop.formats.limits import MIB, Limits, RawRow, RowProblemError
from prefloop.formats.reading import FILES, read_rows
from prefloop.formats.rows import Bundle, Context
from prefloop.formats.trl import convert_messages, convert_trl
from prefloop.records import PrefloopError, Rater, RaterKind, Task
from prefloop.store import Store, schema
from prefloop.store.rows import task_row

Convert = Callable[[Mapping[str, Any], int, Context], Bundle]

FORMATS: dict[str, Convert] = {
    "trl": convert_trl,
    "openai-chat": convert_messages,
    TAU_BENCH: convert_tau_bench,
    "tool-calls": convert_tool_calls,
}
AUTO = "auto"
FLUSH_ROWS = 1000
FLUSH_BYTES = 8 * MIB
MAX_LISTED_ERRORS = 1000


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that could not be imported: where it is, the key that is wrong, and why."""

    file: str
    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}"
        return f"{where}: {self.key}: {self.reason}" if self.key else f"{where}: {self.reason}"


@dataclass(slots=True)
class ImportReport:
    """What an import did. `num_rows` counts the rows read, good and bad; `num_skipped` the bad ones, of which the
    first 1000 are listed in `errors`; the other counts are rows new in the store, and `num_known` counts the
    records that were in it (or earlier in the file) already.
    """

    file: str
    format: str
    num_rows: int = 0
    num_skipped: int = 0
    num_tasks: int = 0
    num_trajectories: int = 0
    num_judgements: int = 0
    num_comparisons: int = 0
    num_step_labels: int = 0
    num_known: int = 0
    errors: list[RowError] = field(default_factory=list)


def import_file(
    store: Store,
    path: str | Path,
    *,
    format: str = AUTO,  # noqa: A002  (the name that users type)
    on_error: Literal["stop", "skip"] = "stop",
    limits: Limits | None = None,
    rater: Rater | None = None,
    held_out: float = 0.0,
    on_row: Callable[[int, Bundle], None] = lambda line, bundle: None,
    called: str = "",
) -> ImportReport:
    """Import a file of tasks, trajectories and what was said of them.

    JSON Lines, a JSON list or Parquet, plain or gzipped, in one of `FORMATS`; `auto` goes by the first object.
    `rater` is who made the file's preferences and labels (by default a person called `import`; for tau-bench its
    test). `held_out` is the share of prompts that become held-out tasks. `on_row` is told of the line and the records
    of every good row, those that the store knew before too. Messages speak of `called`, else of the file's name.
    Importing the same rows again adds nothing.

    Raises:
        PrefloopError: a bad row with `on_error="stop"`, an unreadable file, a limit that was passed, an unknown
            format, or a file without a row. Nothing of the file is kept then.
    """
    path = Path(path)
    if format != AUTO and format not in FORMATS:
        raise PrefloopError(f"format {format!r} is not one of {', '.join((AUTO, *FORMATS))}")
    if on_error not in ("stop", "skip"):
        raise PrefloopError(f"on_error is {on_error!r}: expected 'stop' or 'skip'")
    if not 0 <= held_out <= 1:
        raise PrefloopError(f"held_out is {held_out}: expected a share of the prompts, from 0 to 1")
    with store.transaction(), _fewer_collections():
        importer = _Importer(store, path, format, on_error, limits or Limits(), rater, held_out, on_row, called)
        return importer.run()


@contextmanager
def _fewer_collections() -> Iterator[None]:
    """Let the garbage collector look less often: an import makes many small objects and no cycles."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 100_000) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def detect_format(row: Mapping[str, Any]) -> str:
    """The name of the format that a row has."""
    if "traj" in row and "reward" in row:
        return TAU_BENCH
    if any(is_call_list(row.get(side)) for side in ("chosen", "rejected", "completion")):
        return "tool-calls"
    return "openai-chat" if row.get("messages") is not None else "trl"


def import_rater(format_name: str) -> Rater:
    """The rater of a file that names none."""
    if format_name == TAU_BENCH:
        return Rater(RaterKind.TEST, TAU_BENCH)
    return Rater(RaterKind.HUMAN, "import")


def _printable(name: str) -> str:
    """A file's name without bytes that are no text."""
    return name.encode("utf-8", "replace").decode()


class _Importer:
    """One import: converts rows, collects records and writes them in chunks."""

    def __init__(
        self,
        store: Store,
        path: Path,
        format_name: str,
        on_error: str,
        limits: Limits,
        rater: Rater | None,
        held_out: float,
        on_row: Callable[[int, Bundle], None],
        called: str,
    ) -> None:
        self.store = store
        self.path = path
        self.on_error = on_error
        self.limits = limits
        self.rater = rater
        self.held_out = held_out
        self.on_row = on_row
        self.file = _printable(path.name)
        self.report = ImportReport(_printable(called or path.name), format_name)
        self.context: Context | None = None
        self.pending: list[Bundle] = []
        self.pending_bytes = 0

    def run(self) -> ImportReport:
        """Read every row."""
        for raw in read_rows(self.path, self.limits):
            self.report.num_rows += 1
            try:
                bundle = self._convert(raw)
            except RowProblemError as problem:
                self._refuse(raw.line, problem)
            except (PrefloopError, ValueError) as error:
                self._refuse(raw.line, RowProblemError("", str(error)))
            else:
                self.on_row(raw.line, bundle)
                self._keep(bundle, raw.num_bytes)
        self._flush()
        if self.report.num_rows == 0:
            raise PrefloopError(f"{self.report.file} holds no rows: expected {FILES}")
        return self.report

    def _convert(self, raw: RawRow) -> Bundle:
        if raw.problem is not None:
            raise raw.problem
        if not isinstance(raw.value, dict):
            raise RowProblemError("", f"expected an object, found {type(raw.value).__name__}")
        if self.context is None:
            self.context = self._start(raw.value)
        return FORMATS[self.context.format](raw.value, raw.line, self.context)

    def _keep(self, bundle: Bundle, num_bytes: int) -> None:
        self.pending.append(bundle)
        self.pending_bytes += num_bytes
        if len(self.pending) >= FLUSH_ROWS or self.pending_bytes >= FLUSH_BYTES:
            self._flush()

    def _start(self, row: Mapping[str, Any]) -> Context:
        if self.report.format == AUTO:
            self.report.format = detect_format(row)
        rater = self.rater or import_rater(self.report.format)
        return Context(self.file, self.report.format, rater, self.limits, self.held_out)

    def _refuse(self, line: int, problem: RowProblemError) -> None:
        error = RowError(self.report.file, line, problem.key, problem.reason)
        if self.on_error == "stop":
            raise PrefloopError(f"{error}; nothing of the file was imported (--on-error skip leaves bad rows out)")
        self.report.num_skipped += 1
        if len(self.report.errors) < MAX_LISTED_ERRORS:
            self.report.errors.append(error)

    def _flush(self) -> None:
        bundles, self.pending, self.pending_bytes = self.pending, [], 0
        if not bundles or self.context is None:
            return
        store, report = self.store, self.report
        if any(b.judgements or b.comparisons or b.step_labels for b in bundles):
            store.add_raters([self.context.rater])
        tasks: dict[str, Task] = {task.id: task for bundle in bundles for task in bundle.tasks}
        report.num_tasks += store.insert(schema.task, map(task_row, tasks.values()))
        report.num_trajectories += self._count(store.add_trajectories, [t for b in bundles for t in b.trajectories])
        report.num_judgements += self._count(store.add_judgements, [j for b in bundles for j in b.judgements])
        report.num_comparisons += self._count(store.add_comparisons, [c for b in bundles for c in b.comparisons])
        report.num_step_labels += self._count(store.add_step_labels, [s for b in bundles for s in b.step_labels])

    def _count(self, add: Callable[[list[Any]], int], records: list[Any]) -> int:
        num_new = add(records) if records else 0
        self.report.num_known += len(records) - num_new
        return num_new


def iter_prompts(path: str | Path, *, held_out: float = 0.0, limits: Limits | None = None) -> Iterator[Task]:
    """The distinct tasks of a file of prompts, in the order of the file, without a store.

    Any row with a prompt will do: what was answered to it is left aside.

    Raises:
        PrefloopError: a bad row, or an unreadable file.
    """
    path, limits = Path(path), limits or Limits()
    seen: set[str] = set()
    for raw in read_rows(path, limits):
        try:
            tasks = _prompt_tasks(raw, path.name, limits, held_out)
        except RowProblemError as problem:
            raise PrefloopError(str(RowError(path.name, raw.line, problem.key, problem.reason))) from None
        for task in tasks:
            if task.id not in seen:
                seen.add(task.id)
                yield task


def _prompt_tasks(raw: RawRow, file: str, limits: Limits, held_out: float) -> list[Task]:
    if raw.problem is not None:
        raise raw.problem
    if not isinstance(raw.value, dict):
        raise RowProblemError("", f"expected an object, found {type(raw.value).__name__}")
    name = detect_format(raw.value)
    tasks = FORMATS[name](raw.value, raw.line, Context(file, name, import_rater(name), limits, held_out)).tasks
    if not all(task.messages for task in tasks):
        raise RowProblemError("prompt", "the row has no prompt")
    return tasks
