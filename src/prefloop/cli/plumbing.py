"""What commands have in common: their options, and opening stores and runs."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from prefloop.records import PrefloopError

if TYPE_CHECKING:
    from prefloop.stages.context import Run
    from prefloop.store import Store

DEFAULT_STORE = "runs/prefloop.db"

console = Console()

RunFile = Annotated[Path, Parameter(help="the run file (TOML)")]
StoreOption = Annotated[
    str | None, Parameter(name="--store", help="path or database URL of the store (else PREFLOOP_STORE)")
]
SetOption = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative=(),
        help="set one key of the run file: --set train.beta=0.2; nothing after = takes it out",
    ),
]
IterationOption = Annotated[
    int | None, Parameter(name="--iteration", help="which iteration, from 1 on; the current one when left out")
]

IgnoreMemoryOption = Annotated[
    bool, Parameter(name="--ignore-memory", negative=(), help="start even where the plan says that memory is too short")
]


def location_of(store: str | None, otherwise: str | None = None) -> str:
    """Where the store is: as the option or PREFLOOP_STORE says, else `otherwise`, else in its usual place."""
    return store or os.environ.get("PREFLOOP_STORE") or otherwise or DEFAULT_STORE


@contextmanager
def open_store(store: str | None, *, must_exist: bool = True) -> Iterator[Store]:
    """The store that an option names."""
    from prefloop.store import Store

    with Store(location_of(store), must_exist=must_exist) as opened:
        yield opened


@contextmanager
def training_store(store: str | None, output: Path, *, own: bool) -> Iterator[Store]:
    """The store of a training on data of one's own: beside its output where its rows come from files.

    One that was made for a training that never began is removed.
    """
    from prefloop.stages.context import LOCK
    from prefloop.stages.fit_settings import work_directory
    from prefloop.store import Store

    beside = work_directory(output) / Path(DEFAULT_STORE).name
    location = location_of(store, str(beside) if own else None)
    made_here = location == str(beside) and not beside.exists()
    try:
        with Store(location, must_exist=not own) as opened:
            yield opened
    except BaseException:
        if made_here and not (beside.parent / LOCK).exists():
            for file in beside.parent.glob(f"{beside.name}*"):
                file.unlink()
            with contextlib.suppress(OSError):  # something else is there
                beside.parent.rmdir()
        raise


@contextmanager
def described_run(file: Path, store: str | None, overrides: list[str] | None, *, keep: bool = True) -> Iterator[Run]:
    """A run as its file describes it; not locked yet. Without `keep` no store is made where there is none."""
    from prefloop.config import apply_overrides, parse_settings, read_run_file
    from prefloop.stages.context import Run
    from prefloop.stages.settings import RunSettings
    from prefloop.store import Store

    data = apply_overrides(read_run_file(file), overrides or [])
    if "objective" in data:
        raise PrefloopError(f"{file} is a training of its own, not a run: `prefloop train {file}`")
    settings = parse_settings(RunSettings, data, str(file))
    default = str(Path(settings.directory) / Path(DEFAULT_STORE).name)
    location = location_of(store, settings.store or default)
    with contextlib.ExitStack() as open_things:
        if not keep and "://" not in location and not Path(location).exists():
            elsewhere = open_things.enter_context(tempfile.TemporaryDirectory(prefix="prefloop-"))
            location = str(Path(elsewhere) / Path(DEFAULT_STORE).name)
        opened = open_things.enter_context(Store(location))
        open_things.enter_context(_ended_in_order())
        yield Run(settings, opened)


class TerminatedError(KeyboardInterrupt):
    """A signal of `ending_signals`, which ends a run as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def ending_signals() -> list[signal.Signals]:
    """What ends a command from outside: SIGTERM, and SIGHUP where a terminal that closes is to end it (no nohup)."""
    hung_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, *([signal.SIGHUP] if hung_up else [])]


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let a signal end what was started here, too, such as agents: by itself it would leave them behind."""
    if threading.current_thread() is not threading.main_thread():  # Python tells signals to no other
        yield
        return
    before = {number: signal.signal(number, _terminate) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise TerminatedError(number)


@contextmanager
def open_stage(
    file: Path, store: str | None, overrides: list[str] | None, *, ignore_memory: bool = True
) -> Iterator[Run]:
    """A locked run whose progress is shown; unless `ignore_memory`, one that does not fit into memory is refused."""
    from prefloop.stages.context import opened

    with described_run(file, store, overrides) as described, shown_progress(described), opened(described) as run:
        if not ignore_memory:
            from prefloop.planning import check_memory

            check_memory(run)
        yield run


@contextmanager
def shown_progress(run: Run) -> Iterator[None]:
    """Show how a run goes."""
    from prefloop.live import LiveProgress

    with LiveProgress(console, run.settings.iterations) as progress:
        run.progress = progress
        yield


def iteration_of(run: Run, number: int | None, stage: str) -> int:
    """The iteration whose stage is to be done, from 0 on; says so where that is done already."""
    there_are = run.settings.iterations
    if number is None:
        number = run.current_iteration() + 1
        if number > there_are:
            raise PrefloopError(
                f"all {there_are} iterations of run {run.settings.name} are done: name one by --iteration"
            )
    if not 1 <= number <= there_are:
        raise PrefloopError(f"--iteration {number}: the run file has iterations 1 to {there_are}")
    if run.found(number - 1, stage) is not None:
        console.print(f"{stage} of iteration {number} was done before; nothing is done again", highlight=False)
    return number - 1
