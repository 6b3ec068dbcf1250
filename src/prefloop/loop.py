"""The loop on one screen: rollout → judge → curate → train → evaluate, and again.

Each stage is a durable, idempotent step over the store: what is finished is not done again, so that a run that was
killed goes on where it was and ends the same.
"""

from __future__ import annotations

import shutil

from prefloop.records import JSONObject
from prefloop.stages.context import BEFORE, Run, opened
from prefloop.stages.curating import curate_stage
from prefloop.stages.evaluating import compare_start_and_end, evaluate_stage
from prefloop.stages.judging import judge_stage
from prefloop.stages.redrawing import redraw_stage
from prefloop.stages.rollouts import awaits_episodes, rollout_stage
from prefloop.stages.start import start_policy
from prefloop.stages.updating import check_progress, train_stage


def run_loop(run: Run) -> JSONObject:
    """Run, or go on with, a run until it is finished; returns what it came to (the event "finish").

    Where agents that run elsewhere must have their next episodes first, it ends before it is finished: nothing.

    Raises:
        PrefloopError: another process holds the run, its settings changed, or a stage cannot be done.
        DivergedError: updates were taken back in too many iterations in a row.
    """
    with opened(run):
        run.check()  # a judge without a key should not fail after an hour of rollouts
        start = start_policy(run)
        evaluate_stage(run, BEFORE, start)
        for iteration in range(run.settings.iterations):
            if iteration and awaits_episodes(run, iteration):
                return {}
            if run.found(iteration, "train") is None:
                check_progress(run, iteration)  # before its rollouts are made for nothing
            rollout_stage(run, iteration)
            judge_stage(run, iteration)
            redraw_stage(run, iteration)
            curate_stage(run, iteration)
            train_stage(run, iteration)
        return finish(run)


def finish(run: Run) -> JSONObject:
    """Evaluate the end policy and compare it with the start.

    Raises:
        DivergedError: the last updates were all taken back.
    """
    shutil.rmtree(run.directory / "training", ignore_errors=True)  # what a kill right after an update left
    last = run.settings.iterations
    found = run.found(last, "finish")
    if found is not None:
        return found
    check_progress(run, last)
    start, end = run.checkpoint_before(0), run.checkpoint_before(last)
    evaluate_stage(run, last, end)
    seconds: dict[str, float] = {}
    for event in run.store.events(run.id):
        spent = event["detail"].get("seconds", 0.0)
        seconds[event["kind"]] = seconds.get(event["kind"], 0.0) + spent
    detail: JSONObject = {
        "start_checkpoint": start,
        "end_checkpoint": end,
        "paired": compare_start_and_end(run, (BEFORE, start), (last, end)),
        "seconds_by_stage": {stage: spent for stage, spent in seconds.items() if spent},
        "wall_s": sum(seconds.values()),
    }
    run.store.add_event(run.id, last, "finish", detail)
    return detail
