"""What every benchmark shares: its options, interleaved timing, a table, and cells that survive an interruption.

A benchmark is a list of cells. A cell measures something and returns its figures (flat, for `--json`) and the rows
that people read. Every cell is saved when it is done, in a file of its own under `out/benchmarks`; the same command
goes on after the last saved one, and a run that finished leaves nothing of its cells behind, so that the next one
measures them again. Cells that it was not asked for stay: two runs with different `--only` can go side by side.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import json
import logging
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 160  # of a table that is written to a file
STATE = Path(__file__).resolve().parents[1] / "out" / "benchmarks"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that nothing here uses


@dataclass(frozen=True)
class Options:
    """What the user asked for: `only` is a glob pattern of cell names, `quick` the same code on less.

    `seed` is None where none was given to a script that has seeds of its own.
    """

    json: Path | None
    only: str
    quick: bool
    seed: int | None
    fresh: bool

    def first_seed(self, own: int) -> int:
        """The first of several seeds: the one that was asked for, else the script's own."""
        return own if self.seed is None else self.seed


@dataclass(frozen=True)
class Measured:
    """What a cell found: figures by name, and rows of the table by column."""

    figures: dict[str, float]
    rows: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Timing:
    """Repeated process CPU and wall seconds of one thing."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)

    @staticmethod
    def text(seconds: Sequence[float]) -> str:
        """Median with minimum and maximum."""
        return f"{statistics.median(seconds):.2f} [{min(seconds):.2f}-{max(seconds):.2f}]"


Cell = Callable[[Options], Measured]


def parse_options(
    description: str | None, argv: Sequence[str] | None = None, *, default_seed: int | None = 0
) -> Options:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file: a flat object of name and number")
    parser.add_argument("--only", default="*", help="glob pattern of the cells to measure")
    parser.add_argument("--quick", action="store_true", help="the same code on less, in a minute or two")
    parser.add_argument("--seed", type=int, default=default_seed)
    parser.add_argument("--fresh", action="store_true", help="measure cells again that an interrupted run has left")
    return Options(**vars(parser.parse_args(argv)))


def interleaved(runs: Mapping[str, Callable[[], object]], num: int, *, warm: bool = False) -> dict[str, Timing]:
    """Time each in turn, `num` times: what disturbs the machine disturbs all alike.

    A round without measurement comes first, unless all were run before (`warm`).
    """
    timings = {name: Timing() for name in runs}
    for round_ in range(int(warm), num + 1):
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if round_:
                timings[name].cpu.append(cpu)
                timings[name].wall.append(wall)
    return timings


def versions(*packages: str) -> str:
    """The machine and the versions that a figure depends on, in one line."""
    machine = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    return ", ".join([machine, *(f"{package} {_version(package)}" for package in packages)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def run_cells(
    name: str,
    cells: Mapping[str, Cell],
    options: Options,
    caption: str,
    *,
    summary: Callable[[dict[str, float]], dict[str, float]] = lambda figures: {},
) -> dict[str, float]:
    """Measure the cells that `--only` names, print their table, write `--json`; the figures.

    An interrupted run of the same name, seed and size is continued. `summary` adds figures made of the cells' own.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    chosen = {key: cell for key, cell in cells.items() if fnmatch.fnmatch(key, options.only)}
    if not chosen:
        raise SystemExit(f"no cell matches {options.only!r}: there are {', '.join(cells)}")
    place = STATE / "cells" / _name_of_run(name, options)
    found: dict[str, Measured] = {}
    for key, cell in chosen.items():
        saved = None if options.fresh else _saved(place / f"{key}.json", caption)
        if saved is not None:
            console.print(f"{key}: measured before the interruption")
            found[key] = saved
            continue
        with console.status(f"{key} …"):
            found[key] = cell(options)
        _save(place / f"{key}.json", caption, found[key])
    _print(console, name, found, caption)
    figures = {figure: value for measured in found.values() for figure, value in measured.figures.items()}
    summed = summary(figures)
    for figure, value in summed.items():
        console.print(f"{figure:>28} {value:.4g}", highlight=False)
    figures |= summed
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    for key in chosen:
        (place / f"{key}.json").unlink(missing_ok=True)
    return figures


def _name_of_run(name: str, options: Options) -> str:
    seed = "" if options.seed is None else f"-{options.seed}"
    return f"{name}{seed}{'-quick' if options.quick else ''}"


def _saved(file: Path, caption: str) -> Measured | None:
    """A cell that was measured before; None where there is none, or it is of another machine or version, or damaged."""
    try:
        saved = json.loads(file.read_text())
        return Measured(saved["figures"], saved["rows"]) if saved["caption"] == caption else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _save(file: Path, caption: str, cell: Measured) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")  # two processes may write the same cell
    new.write_text(json.dumps({"caption": caption, **asdict(cell)}))
    new.replace(file)


@contextmanager
def locked(file: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """No other process holds the lock of this name meanwhile (LOCK_SH: unless all share it); yields its descriptor."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        fcntl.flock(opened, how)
        yield opened.fileno()


@contextmanager
def shared(place: Path) -> Iterator[None]:
    """A directory of what several processes make once and use; the last one that comes to its end removes it."""
    with locked(place.with_name(f"{place.name}.lock"), fcntl.LOCK_SH) as descriptor:
        yield
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another one uses it still
        shutil.rmtree(place, ignore_errors=True)


def _print(console: Console, name: str, found: Mapping[str, Measured], caption: str) -> None:
    rows = [{"": key, **row} for key, measured in found.items() for row in measured.rows or _plain(measured)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=name, caption=escape(caption))
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*(escape(row.get(column, "")) for column in columns))
    console.print(table)


def _plain(measured: Measured) -> list[dict[str, str]]:
    return [{figure: f"{value:.4g}" for figure, value in measured.figures.items()}]
