"""What a run shows while it goes: a table of iterations and a bar for the stage at work.

On a terminal the table is live; elsewhere each finished stage is one line.
"""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prefloop.records import JSONObject
from prefloop.stages.context import BEFORE
from prefloop.stages.context import Progress as Quiet

_STAGES = {
    "demonstrations": "demonstrate",
    "sft": "imitate",
    "evaluate": "evaluate",
    "rollout": "roll out",
    "judge": "judge",
    "curate": "curate",
    "train": "train",
}


# Of the rollouts, of the pairs made of them, and of the policy after the update (on the guard tasks).
_COLUMNS = (
    "iteration", "success", "judge's score", "true score", "pairs", "precision", "KL after", "success after", "seconds",
)  # fmt: skip


class LiveProgress(Quiet):
    """Shows a run's progress; use as a context manager around it."""

    def __init__(self, console: Console, num_iterations: int) -> None:
        self._console = console
        self._num_iterations = num_iterations
        self._rows: dict[int, JSONObject] = {}
        self._evaluations: list[str] = []
        self._started = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=None, note="")
        self._live = Live(self._view(), console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.update(self._task, visible=False)
        if self._console.is_terminal:
            self._live.update(self._view(), refresh=True)
            self._live.stop()

    def begin(self, iteration: int, stage: str, total: int) -> None:
        """Show the bar of a stage."""
        where = "before the loop" if iteration == BEFORE else f"iteration {iteration + 1}/{self._num_iterations}"
        if iteration == self._num_iterations:
            where = "after the loop"
        self._bar.reset(self._task, total=total, description=f"{where}: {_STAGES.get(stage, stage)}", note="")

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, note=note)

    def end(self, iteration: int, stage: str, detail: JSONObject) -> None:
        """Add what the stage found to the table."""
        if stage == "evaluate":
            self._evaluations.append(_evaluation(detail, "start" if iteration == BEFORE else "end"))
        elif iteration != BEFORE:
            self._rows.setdefault(iteration, {})[stage] = detail
        if self._console.is_terminal:
            self._live.update(self._view())
        else:
            spent = time.perf_counter() - self._started
            self._console.print(f"{spent:7.1f} s  {_line(iteration, stage, detail)}", highlight=False, soft_wrap=True)

    def _view(self) -> RenderableType:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in _COLUMNS:
            table.add_column(column, justify="right")
        for iteration, stages in sorted(self._rows.items()):
            table.add_row(str(iteration + 1), *_cells(stages))
        return Group(*self._evaluations, table, self._bar)


def _cells(stages: JSONObject) -> list[str]:
    judged, curated, trained = (stages.get(name, {}) for name in ("judge", "curate", "train"))
    attempts = trained.get("attempts") or [{}]
    guard = {} if trained.get("rolled_back") else attempts[-1].get("success") or {}
    rolled_back = " rolled back" if trained.get("rolled_back") else ""
    return [
        _percent((judged.get("success") or {}).get("value")),
        _number(judged.get("mean_score")),
        _number(judged.get("mean_verified_score")),
        str(curated.get("num_pairs", "")),
        _percent((curated.get("pair_precision") or {}).get("value")),
        _number(attempts[-1].get("kl")),
        _percent(guard.get("value")) + rolled_back,
        _number(sum(detail.get("seconds", 0.0) for detail in stages.values()), 1),
    ]


def _line(iteration: int, stage: str, detail: JSONObject) -> str:
    where = "" if iteration == BEFORE else f"iteration {iteration + 1}: "
    if stage == "evaluate":
        return _evaluation(detail, "start policy" if iteration == BEFORE else "end policy")
    return f"{where}{_STAGES.get(stage, stage)}: {_found(stage, detail)}"


def _found(stage: str, detail: JSONObject) -> str:
    match stage:
        case "demonstrations":
            return f"{detail['num']} demonstrations, {_percent(detail['success'])} succeed"
        case "sft":
            return f"{detail['steps']} steps, loss {_number(detail['loss'][-1], 3)}"
        case "rollout":
            return f"{detail['num']} trajectories of {detail['mean_turns']:.1f} turns"
        case "judge":
            return f"mean score {_number(detail['mean_score'])}, statuses {detail['statuses']}"
        case "curate":
            return f"{detail['num_pairs']} pairs of {detail['num_scored']} scored"
        case "train":
            reasons = [attempt["reason"] for attempt in detail["attempts"]] or [detail.get("reason", "")]
            return "; rolled back; ".join(reasons) + ("; rolled back" if detail["rolled_back"] else "")
        case _:
            return "done"


def _evaluation(detail: JSONObject, which: str) -> str:
    sampled, greedy = detail["sampled"], detail.get("greedy") or {}
    if not sampled.get("success"):
        return f"{which}: judge's mean score {_number(sampled.get('mean_judge_score'))} on {detail['num_tasks']} tasks"
    success = sampled["success"]
    interval = f"[{_percent(success['low'])}, {_percent(success['high'])}]"
    greedily = f", {_percent(greedy['success']['value'])} greedily" if greedy.get("success") else ""
    return f"{which}: {_percent(success['value'])} {interval} of {success['n']} held-out tasks succeed{greedily}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
