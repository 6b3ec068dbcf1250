"""One run of the booking loop, from a start policy that all algorithms of a seed share, and what the store holds of it.

CPU seconds are those of this process, without the evaluations on held-out tasks, which are for the reader.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefloop.config import apply_overrides, parse_settings, read_run_file
from prefloop.loop import run_loop
from prefloop.records import Checkpoint, JSONObject
from prefloop.stages.context import BEFORE, Progress, Run, opened
from prefloop.stages.evaluating import evaluate_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.store import Store

RUN_FILE = Path(__file__).resolve().parents[1] / "examples" / "booking.toml"
QUICK = (
    *("sft.num_steps=40", "sft.num_demonstrations=200", "iterations=1", "evaluation.num_tasks=16"),
    *("guard.num_tasks=16", "rollout.num_tasks=4", "rollout.tasks_per_unit=4", "rollout.samples_per_task=4"),
)

MORE = 12 * 64 * 8
UNUSED: JSONObject = {"algorithm": "sft", "learning_rate": 1e-3}
TO_THE_END = "guard.max_rolled_back=100"
"""A loop whose updates are all taken back goes on, so that all algorithms have as many attempts."""

Point = tuple[float, float]
"""CPU seconds since the loop began, and success on the held-out tasks of the policy that there was then."""


class Clock(Progress):
    """The CPU and wall seconds since it was made, without those of pauses: evaluations on held-out tasks.

    `after` holds the CPU seconds at which each iteration ended.
    """

    def __init__(self) -> None:
        self._began = self._now()
        self._paused = np.zeros(2)
        self.after: list[float] = []

    @staticmethod
    def _now() -> NDArray[np.float64]:
        return np.array([time.process_time(), time.perf_counter()])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within does not count."""
        self._paused -= self._now()
        yield
        self._paused += self._now()

    def begin(self, iteration: int, stage: str, total: int) -> None:
        if stage == "evaluate":
            self._paused -= self._now()

    def end(self, iteration: int, stage: str, detail: JSONObject) -> None:
        if stage == "evaluate":
            self._paused += self._now()
        if stage == "train":
            self.lap()

    def lap(self) -> None:
        """An iteration has ended."""
        self.after.append(self.seconds[0])

    @property
    def seconds(self) -> tuple[float, float]:
        """CPU, wall."""
        cpu, wall = self._now() - self._began - self._paused
        return float(cpu), float(wall)


def settings_of(seed: int, directory: str, table: JSONObject, overrides: Sequence[str]) -> RunSettings:
    """The run file with tables in place of its own; the noise of the judge is a function of the run's name and seed."""
    data = {**read_run_file(RUN_FILE), **table, "directory": directory}
    seeds = (f"seed={seed}", f"judge.rules.seed={seed}")
    return parse_settings(RunSettings, apply_overrides(data, (*seeds, *overrides)), str(RUN_FILE))


def start_of(seed: int, directory: Path, quick: bool) -> str:
    """The directory of the policy that imitates the demonstrator; made once.

    Its demonstrations are of other flights than the loop's, whose seed it does not have.
    """
    own = f"policy.initial.seed={seed}"
    return _imitating(settings_of(seed + 1000, str(directory), {}, (own, *(QUICK if quick else ()))), directory)


def imitating_more(
    seed: int, directory: Path, start: str, sft: JSONObject, quick: bool
) -> tuple[str, dict[str, float]]:
    """The directory of the start policy after as many more demonstrations as a loop has attempts; and seconds."""
    table = {"policy": {"model": start}, "sft": {**sft, "num_demonstrations": 64 if quick else MORE}}
    clock = Clock()
    path = _imitating(settings_of(seed + 2000, str(directory), table, ()), directory)
    cpu, wall = clock.seconds
    return path, {"cpu_s": cpu, "wall_s": wall}


def _imitating(settings: RunSettings, directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    with Store(str(directory / "start.db")) as store, opened(Run(settings, store)) as run:
        checkpoint = store.checkpoint(start_policy(run))
        assert checkpoint is not None
        return checkpoint.path


@contextmanager
def a_run(
    seed: int, table: JSONObject, start: str, overrides: Sequence[str] = (), progress: Progress | None = None
) -> Iterator[Run]:
    """A run from a start policy, in a directory that is removed after it."""
    train = {"batch_size": 16, **table["train"]}
    tables = {"policy": {"model": start}, "sft": None, "curation": {}, **table, "train": train}
    of_loop = (TO_THE_END, *(one for one in overrides if not one.startswith("sft.")))
    with tempfile.TemporaryDirectory() as directory:
        settings = settings_of(seed, directory, tables, of_loop)
        with Store(f"{directory}/store.db") as store:
            yield Run(settings, store, progress or Progress())


def loop(seed: int, table: JSONObject, start: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """The figures of a loop."""
    with a_run(seed, table, start, overrides, spent := Clock()) as run:
        run_loop(run)
        cpu, wall = spent.seconds
        return {**figures_of(run), "cpu_s": cpu, "wall_s": wall}


def loop_with_curve(
    seed: int, table: JSONObject, start: str, overrides: Sequence[str] = ()
) -> tuple[dict[str, float], list[Point]]:
    """The figures of a loop, and how it came there: each iteration's policy is evaluated once the loop is over."""
    with a_run(seed, table, start, overrides, spent := Clock()) as run:
        run_loop(run)
        cpu, wall = spent.seconds
        figures = {**figures_of(run), "cpu_s": cpu, "wall_s": wall}
        with opened(run):
            return figures, curve_of(run, spent.after, run.checkpoint_before)


def curve_of(run: Run, after: Sequence[float], checkpoint: Callable[[int], str]) -> list[Point]:
    """Success by time, from the start policy on; `checkpoint` gives the id after so many iterations."""
    evaluated = [evaluate_stage(run, BEFORE, checkpoint(0))]
    evaluated += [evaluate_stage(run, i, checkpoint(i)) for i in range(1, len(after) + 1)]
    success = [detail["sampled"]["success"]["value"] for detail in evaluated]
    return list(zip([0.0, *after], success, strict=True))


def success_at(curve: Sequence[Point], seconds: float) -> float:
    """Success of the last policy that was done by then."""
    return [success for at, success in curve if at <= seconds][-1]


def best_of_n(seed: int, start: str, num: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    """What search alone gains: the start policy's attempt that the judge likes best, of `num` at each held-out task.

    Its KL is the bound log n - (n - 1) / n.
    """
    more = (*overrides, "evaluation.greedy=false", f"evaluation.best_of={num}")
    with a_run(seed, {"train": UNUSED}, start, more) as run, opened(run):
        start_policy(run)
        clock = Clock()
        found = evaluate_stage(run, BEFORE, run.checkpoint_before(0))
        cpu, wall = clock.seconds
        calls = len(run.store.judgements(rater_id=run.judge.rater.id))
    return {
        "success_start": found["sampled"]["success"]["value"],
        "success": found["best_of"]["success"]["value"],
        "kl": found["best_of"]["kl_bound"],
        "num_samples": calls,
        "num_judge_calls": calls,
        "cpu_s": cpu,
        "wall_s": wall,
    }


def evaluated_beside(seed: int, start: str, other: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Success of the policy of another directory on a loop's held-out tasks, and its KL to the start policy."""
    with a_run(seed, {"train": UNUSED}, start, overrides) as run, opened(run):
        evaluate_stage(run, BEFORE, start_policy(run))
        checkpoint = Checkpoint("imitating more", other, "", "sft", run_id=run.id)
        run.store.add_checkpoint(checkpoint)
        evaluate_stage(run, run.settings.iterations, checkpoint.id)
        return evaluations_of(run)


def evaluations_of(run: Run) -> dict[str, float]:
    """Success on the held-out tasks before and after, sampled and greedy, and KL."""
    start, end = (run.require(i, "evaluate") for i in (BEFORE, run.settings.iterations))
    found = {
        "success_start": start["sampled"]["success"]["value"],
        "success": end["sampled"]["success"]["value"],
        "kl": end["sampled"]["kl_per_trajectory"],
    }
    if end["greedy"] is not None:
        found["greedy_start"] = start["greedy"]["success"]["value"]
        found["greedy"] = end["greedy"]["success"]["value"]
    return found


def figures_of(run: Run) -> dict[str, float]:
    """What the store holds of a finished run."""
    by_kind: defaultdict[str, list[JSONObject]] = defaultdict(list)
    for event in run.store.events(run.id):
        by_kind[event["kind"]].append(event["detail"])
    guards = [guard["sampled"]["success"]["value"] for guard in by_kind["guard"]]
    return {
        **evaluations_of(run),
        "worst_drop": worst_drop(guards),
        "num_samples": sum(rollout["num"] for rollout in by_kind["rollout"]),
        "num_judge_calls": len(run.store.judgements(rater_id=run.judge.rater.id)),
        "num_retries": sum(max(0, len(update["attempts"]) - 1) for update in by_kind["train"]),
        "num_rolled_back": sum(update["rolled_back"] for update in by_kind["train"]),
    }


def worst_drop(success: Sequence[float]) -> float:
    """The largest loss from one policy to the next."""
    return max(before - after for before, after in itertools.pairwise(success))


def figures_by_name(name: str, seed: int, found: Mapping[str, float]) -> dict[str, float]:
    """Figures of one seed as `--json` has them."""
    return {f"{name}_{figure}_seed_{seed}": value for figure, value in found.items()}
