"""kill -9 of `prefloop train OBJECTIVE` at any moment: the same line goes on and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fit_runs import pair_rows, tiny_model, write_rows
from prefloop.store import Store
from prefloop.store.database import integrity_problems
from prefloop.training.checkpoint import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLER = Path(__file__).with_name("killer.py")
LINE = (
    "train dpo --data rows.jsonl --model tiny --output out --num-epochs 2 --batch-size 6 --held-out 0.25 "
    "--evaluate-every 2 --checkpoint-every 2 --learning-rate 0.01 --num-threads 1 --device cpu"
)

# A process of the chain dies at its point, and the next goes on from there.
POINTS = [
    "commit:1:after",  # the run is recorded
    "commit:2",  # the import
    "commit:5:after",  # the datasets and what the training begins with
    "step:2",
    "rename:1",  # the first state, after step 2
    "rename:1:after",
    "step:3",  # step 5: state 4 is saved
    "rename:2:after",  # state 6, then the output
    "commit:5",  # the checkpoint and what came of it
    "commit:5:after",
]
PUBLISHED, RECORDED = 7, 9  # from these points on the output is there, and what came of it


def go(folder: Path, point: str = "") -> int:
    program = [str(KILLER), f"fit:{point}"] if point else ["-m", "prefloop.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *program, *LINE.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr or f"{point} was never reached"
    return done.returncode


def prepared(folder: Path) -> Path:
    folder.mkdir()
    tiny_model(folder)
    write_rows(folder / "rows.jsonl", pair_rows())
    return folder


def test_kills_at_exact_points(tmp_path: Path):
    undisturbed, killed = (prepared(tmp_path / name) for name in ("undisturbed", "killed"))
    assert go(undisturbed) == 0
    for number, point in enumerate(POINTS):
        assert go(killed, point) == -signal.SIGKILL
        assert (killed / "out").exists() == (number >= PUBLISHED)
        with Store(str(killed / "out.run" / "prefloop.db"), must_exist=True) as store:
            events = {event["kind"] for run in store.runs() for event in store.events(run["id"])}
        assert ("start" in events, "finish" in events) == (number >= 2, number >= RECORDED)
    assert go(killed) == 0  # which removes what the last kill left
    assert verify(killed / "out") == verify(undisturbed / "out")
    with Store(str(killed / "out.run" / "prefloop.db"), must_exist=True) as store:
        assert integrity_problems(store.engine) == []
        (run,) = store.runs()
        assert {event["kind"] for event in store.events(run["id"])} == {"start", "recipe", "data", "train", "finish"}
        assert len(store.checkpoints()) == 2 and len(store.datasets()) == 2
    assert not (killed / "out.run" / "training").exists()
