"""What a run shows while it goes: a table of iterations and a bar for the stage at work; of a training, its bar.

On a terminal it is live; elsewhere each finished stage, and now and then a step, is one line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from prefloop.records import JSONObject, counted
from prefloop.report.words import not_graded
from prefloop.stages.context import BEFORE
from prefloop.stages.context import Progress as Quiet
from prefloop.stages.fit_settings import WHOLE, FitProgress
from prefloop.stages.fitting import Fitted
from prefloop.training.model_card import CARD, COUNTED, interval_text

_STAGES = {
    "demonstrations": "demonstrate",
    "sft": "imitate",
    "evaluate": "evaluate",
    "rollout": "roll out",
    "judge": "judge",
    "redraw": "draw again",
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
            return f"{counted(detail['num'], 'demonstration')}, {_percent(detail['success'])} succeed"
        case "sft":
            return f"{counted(detail['steps'], 'step')}, loss {_number(detail['loss'][-1], 3)}"
        case "rollout":
            return _rollouts(detail)
        case "judge" if "skipped" in detail:
            return str(detail["skipped"])
        case "judge":
            return f"mean score {_number(detail['mean_score'])}, statuses {detail['statuses']}{_left_out(detail)}"
        case "redraw":
            return _redrawn(detail)
        case "curate":
            words = {"num_duplicates": "equal to another", "num_without_turns": "in which nothing was said"}
            left_out = ", ".join(f"{detail[key]:,} {why}" for key, why in words.items() if detail.get(key))
            found = f"{counted(detail['num_pairs'], 'pair')} of {counted(detail['num_scored'], 'scored attempt')}"
            return f"{found}; left out: {left_out}" if left_out else found
        case "train":
            reasons = [attempt["reason"] for attempt in detail["attempts"]] or [detail.get("reason", "")]
            tried = "; rolled back; ".join(reasons) + ("; rolled back" if detail["rolled_back"] else "")
            return "; ".join([tried, *detail.get("warnings", [])])
        case _:
            return "done"


def _rollouts(detail: JSONObject) -> str:
    found = f"{detail['num']} trajectories of {detail['mean_turns']:.1f} turns"
    if detail["errors"]:
        found += f"; {counted(detail['errors'], 'error')}"
    if "num_tasks_asked" in detail:
        there_are = counted(detail["num_tasks"], "training task")
        found += f"; there are {there_are} beside the guard's, rollout.num_tasks asks for {detail['num_tasks_asked']:,}"
    return found


def _redrawn(detail: JSONObject) -> str:
    drawn = sum(one["num_tasks"] for one in detail["rounds"])
    found = f"{counted(drawn, 'other task')} in {counted(len(detail['rounds']), 'round')}"
    return f"{found}; {detail['num_missing']:,} too few" if detail.get("num_missing") else found


def _left_out(detail: JSONObject) -> str:
    if not detail.get("num_left_out"):
        return ""
    reasons = ", ".join(f"{number} {reason}" for reason, number in detail["left_out"].items())
    return f"; not judged: {reasons}"


def _evaluation(detail: JSONObject, which: str) -> str:
    if "skipped" in detail:
        return f"{which}: not evaluated: {detail['skipped']}"
    sampled, greedy = detail["sampled"], detail.get("greedy") or {}
    if not sampled.get("success"):
        return f"{which}: judge's mean score {_number(sampled.get('mean_judge_score'))} on {detail['num_tasks']} tasks"
    success = sampled["success"]
    interval = f"[{_percent(success['low'])}, {_percent(success['high'])}]"
    greedily = f", {_percent(greedy['success']['value'])} greedily" if greedy.get("success") else ""
    ungraded = not_graded(sampled.get("num_unverified"), detail["num_tasks"])
    share = f"{_percent(success['value'])} {interval} of {success['n']} held-out tasks succeed{greedily}"
    return "; ".join(filter(None, (f"{which}: {share}", ungraded)))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


LINE_EVERY_S = 30.0  # a line of progress where there is no terminal


class LiveTraining(FitProgress):
    """Shows how a training goes, with its tokens a second and the time that is left; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, note="", visible=False)
        self._total = 0
        self._num_tokens = 0.0
        self._started: float | None = None
        self._line_due = 0.0
        self._first = 0

    def __enter__(self) -> LiveTraining:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.update(self._task, visible=False)
        if self._console.is_terminal:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def begin(self, what: str, total: int | None = None) -> None:
        """Show the bar."""
        self._total, self._started = total or 0, None
        self._bar.reset(self._task, total=total, description=what, note="", visible=True)

    def advance(self, done: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        now = time.perf_counter()
        if self._started is None:  # the first step here: others may have been done before a kill, the speed is unknown
            self._started, self._num_tokens, self._line_due, self._first = now, 0.0, now + LINE_EVERY_S, done
            self._bar.reset(self._task, total=self._total, completed=done, note=_loss(metrics))
            return
        self._num_tokens += metrics.get("num_visits", 0.0)
        speed = f"{self._num_tokens / max(now - self._started, 1e-9):,.0f} tokens/s"
        note = f"{_loss(metrics)}  {speed}"
        self._bar.update(self._task, completed=done, note=note)
        if not self._console.is_terminal and now >= self._line_due:
            self._line_due = now + LINE_EVERY_S
            left = (self._total - done) * (now - self._started) / max(done - self._first, 1)
            self.note(f"step {done} of {self._total}: {note}, {left:,.0f} s left")

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = WHOLE) -> None:
        """Print the metrics of the held-out rows."""
        shown = "  ".join(f"{n} {value:.4g}" for n, value in sorted(metrics.items()) if not n.startswith(COUNTED))
        who = "" if name == WHOLE else f"{name}: "
        self.note(f"{who}held out, after step {step}: {shown}")

    def finish(self, fitted: Fitted, output: Path) -> None:
        """Say what came of it."""
        found = fitted.train
        if fitted.done_before:
            self.note(f"{output} was trained before, on the same rows with the same settings: nothing is done again")
        losses = [loss for loss in found["loss"] if loss is not None]
        for warning in found["warnings"]:
            self.note(f"warning: {warning}")
        if losses:
            self.note(f"{counted(found['steps'], 'step')}, loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last")
        if found["stopped_early"]:
            self.note(f"stopped early: the weights are those after step {found['best_step']}, the best")
        if "reward_model" in found:
            self.note(_reward_model(found["reward_model"]))
        self.note(f"model: {output} (its data, recipe, metrics and lineage: {output / CARD})")


def _reward_model(report: JSONObject) -> str:
    cheap = ", ".join(f"{name} alone {interval_text(one['accuracy'])}" for name, one in report["shortcuts"].items())
    return (
        f"held-out pairs: accuracy {interval_text(report['accuracy'])} ({cheap}), log-loss {report['log_loss']:.3g}, "
        f"calibration error {report['reliability']['ece']:.3g}"
    )


def _loss(metrics: Mapping[str, float]) -> str:
    return f"loss {metrics['loss']:.4f}" if "loss" in metrics else "step skipped"
