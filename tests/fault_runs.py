"""A miniature run, run through the command line in processes of its own that tests kill, starve and start again."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefloop.stages.context import run_id
from prefloop.store import Store
from prefloop.store.database import integrity_problems
from prefloop.store.schema import metadata
from prefloop.store.store import logical_rows

KILLER = Path(__file__).with_name("faults") / "killer.py"

# All stages have work to do, more than one unit of it and more than one saved state; an update is refused and tried
# again. Undisturbed it takes about ten seconds on one core, of which three are imports.
MINIATURE: dict[str, Any] = {
    "name": "mini",
    "seed": 3,
    "iterations": 2,
    "num_threads": 1,
    "environment": {"name": "booking"},
    "policy": {
        "initial": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 512}
    },
    "sft": {
        "num_demonstrations": 200,
        "num_steps": 40,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "checkpoint_every": 10,
    },
    "rollout": {
        "num_tasks": 8,
        "samples_per_task": 4,
        "tasks_per_unit": 4,
        "sampling": {"max_new_tokens": 40},
    },
    "judge": {"rules": {"noise_sd": 0.1, "lowest": -2.0}},
    "curation": {"margin": 0.02},
    "train": {"learning_rate": 4e-3, "batch_size": 4, "num_epochs": 2, "checkpoint_every": 2},
    "guard": {"num_tasks": 16, "max_drop": 1.0, "max_kl": 10.0, "max_update_kl": 1e9},  # tiny policies go far
    "evaluation": {"num_tasks": 32},
}
NOT_LOGICAL = {"seconds", "seconds_by_stage", "wall_s"}


def miniature(**changes: Any) -> dict[str, Any]:
    """The miniature run file, some of its keys ("train__beta") set."""
    settings = copy.deepcopy(MINIATURE)
    for path, value in changes.items():
        *tables, key = path.split("__")
        table = settings
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return settings


def toml(settings: dict[str, Any], prefix: str = "") -> str:
    """Settings as TOML."""
    values = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    tables = [(f"{prefix}{key}", value) for key, value in settings.items() if isinstance(value, dict)]
    head = [f"[{prefix[:-1]}]"] if prefix else []
    return "\n".join([*head, *values, *(toml(value, f"{name}.") for name, value in tables)])


@dataclass
class MiniatureRun:
    """A run in a folder of its own."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=miniature)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.toml").write_text(toml(self.settings))

    @property
    def id(self) -> str:
        return run_id(self.settings["name"])

    @property
    def directory(self) -> Path:
        return self.folder / "runs" / self.settings["name"]

    def store(self) -> Store:
        return Store(str(self.folder / "runs" / "prefloop.db"), must_exist=True)

    def start(self, *arguments: str, point: str = "", file_limit: int | None = None) -> subprocess.Popen[str]:
        """`prefloop run run.toml`, or another command; `point` is where it kills itself (see killer.py)."""
        program = [str(KILLER), point] if point else ["-m", "prefloop.cli"]
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        return subprocess.Popen(
            [sys.executable, *program, *(arguments or ("run", "run.toml"))],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=limit if file_limit is not None else None,
        )

    def go(self, *arguments: str, **options: Any) -> Ended:
        """Run a command to its end."""
        process = self.start(*arguments, **options)
        return _ended(process)

    def finish(self) -> Outcome:
        """Run to the end of the run, and say what it came to."""
        ended = self.go()
        assert ended.code == 0, ended.errors
        return self.outcome()

    def outcome(self) -> Outcome:
        """What a finished run came to."""
        with self.store() as store:
            assert integrity_problems(store.engine) == []
            finished = store.event(self.id, self.settings["iterations"], "finish")
            assert finished is not None
            end = store.checkpoint(finished["end_checkpoint"])
            rows = {name: _rows(store, name) for name in metadata.tables}
        assert end is not None
        weights = next((self.folder / end.path).glob("*model.safetensors")).read_bytes()
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        kept = [path for path in files if path.name not in ("lock", "report.html")]
        digests = {str(path.relative_to(self.directory)): _sha256(path.read_bytes()) for path in kept}
        return Outcome(_sha256(weights), rows, digests)

    def wait_for_events(self, number: int, process: subprocess.Popen[str]) -> None:
        """Wait until so many events are recorded, or the process has ended."""
        database = self.folder / "runs" / "prefloop.db"
        while process.poll() is None:
            with (
                contextlib.suppress(sqlite3.OperationalError),  # it is not made yet
                contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection,
            ):
                if connection.execute("SELECT count(*) FROM event").fetchone()[0] >= number:
                    return
            time.sleep(0.01)

    def finished_stages(self) -> set[tuple[int, str]]:
        """The (iteration, kind) of what is recorded as finished; empty before there is a store."""
        if not (self.folder / "runs" / "prefloop.db").exists():
            return set()
        with self.store() as store:
            return {(event["iteration"], event["kind"]) for event in store.events(self.id)}

    def stage_at_work(self) -> str:
        """The stage that comes after the last one that is finished."""
        finished = self.finished_stages()
        order = ["demonstrations", "sft", "start", "policy", "evaluate"]
        steps = [(-1, kind) for kind in order]
        for iteration in range(self.settings["iterations"]):
            steps += [(iteration, kind) for kind in ("rollout", "judge", "curate", "train")]
        steps += [(self.settings["iterations"], kind) for kind in ("evaluate", "finish")]
        return next((kind for step in steps if step not in finished for kind in step[1:]), "after the end")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    errors: str

    @property
    def error_line(self) -> str:
        """The one line of an error that is reported as it should be."""
        assert self.code == 1, (self.code, self.errors)
        assert re.fullmatch(r"error: [^\n]+\n", self.errors), self.errors
        return self.errors.strip()


@dataclass(frozen=True)
class Outcome:
    """The end checkpoint's weights (SHA-256), the rows of every table, and the run's files (SHA-256 by name)."""

    weights: str
    rows: dict[str, list[str]]
    files: dict[str, str]

    def assert_same(self, other: Outcome, without: tuple[str, ...] = ()) -> None:
        assert self.weights == other.weights
        for name in sorted(self.rows.keys() - set(without)):
            assert self.rows[name] == other.rows[name], f"table {name} differs"
        assert self.files == other.files


def kill(process: subprocess.Popen[str], after_s: float = 0.0) -> bool:
    """`kill -9` a process after some time; whether it was still alive. Nothing of its session is left then."""
    try:
        process.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return _ended(process).code == -signal.SIGKILL


def _ended(process: subprocess.Popen[str]) -> Ended:
    output, errors = process.communicate(timeout=240)
    assert not _session_lives(process.pid), "a child process outlived the command"
    return Ended(process.returncode, output, errors)


def _session_lives(session: int) -> bool:
    for _ in range(50):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


def _rows(store: Store, name: str) -> list[str]:
    found = [json.loads(row) for row in logical_rows(store, metadata.tables[name])]
    if name == "event":
        for row in found:
            row["detail"] = {key: value for key, value in row["detail"].items() if key not in NOT_LOGICAL}
    return sorted(json.dumps(row, sort_keys=True) for row in found)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
