"""The loop where the environment breaks in every way now and then."""

from __future__ import annotations

import itertools
import threading

import pytest
from tiny_runs import tiny_run

from prefloop.environments.base import Step
from prefloop.environments.booking import Booking, BookingEpisode
from prefloop.loop import run_loop
from prefloop.planning.workload import lengths_of
from prefloop.records import Ended, Message, PrefloopError, Role
from prefloop.stages.context import opened
from prefloop.stages.rollouts import iteration_rollouts
from prefloop.stages.start import start_policy

WAYS = ("sound", "raises", "hangs", "malformed")


@pytest.fixture
def breaking(monkeypatch, tmp_path):
    """Booking that breaks in one way after another once the returned event is set."""
    monkeypatch.chdir(tmp_path)
    gate, armed, step, ways = threading.Event(), threading.Event(), BookingEpisode.step, itertools.cycle(WAYS)

    def breaks(episode, message):
        way = next(ways) if armed.is_set() else "sound"
        if way == "raises":
            raise ConnectionError("the airline is closed")
        if way == "hangs":
            gate.wait()
        if way == "malformed":
            return Step((Message(Role.TOOL, "17", tool_call_id="call_of_nobody"),))
        return step(episode, message)

    monkeypatch.setattr(BookingEpisode, "step", breaks)
    monkeypatch.setattr(Booking, "step_deadline_s", 0.1)
    yield armed
    gate.set()


def no_city(*_, **__):
    raise KeyError("city")


@pytest.mark.parametrize("broken", ["tasks", "demonstrate"])
def test_without_tasks_or_demonstrations_run_and_plan_end_in_one_line(broken, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Booking, broken, no_city)
    told = rf"^environment booking: {broken}.* raised KeyError: 'city' \(/.*\)$"
    with tiny_run() as run, opened(run):
        for function in (start_policy, lambda run: lengths_of(run, None)):
            with pytest.raises(PrefloopError, match=told):
                function(run)


@pytest.mark.slow
def test_a_run_goes_on_and_counts_what_broke(breaking):
    with tiny_run(iterations=1, rollout__num_tasks=8, guard__num_tasks=8) as run:
        with opened(run):
            start_policy(run)
        breaking.set()
        run_loop(run)
        rollouts = iteration_rollouts(run, 0)
        broken = [trajectory for trajectory in rollouts if trajectory.ended in (Ended.ERROR, Ended.DEADLINE)]
        reasons = {trajectory.extra["error"].split(":")[0] for trajectory in broken}
        assert reasons == {
            "environment raised ConnectionError",
            "environment gave no answer within 0.1 s (its step_deadline_s)",
            "environment gave a malformed answer",
        }
        judged = run.found(0, "judge")
        assert judged["num_left_out"] == len(broken) > 0
        assert judged["left_out"] == {
            reason.value: sum(t.ended is reason for t in broken) for reason in (Ended.DEADLINE, Ended.ERROR)
        }
        assert judged["num"] == len(rollouts) - len(broken) > 0
        assert not run.verdicts([trajectory.id for trajectory in broken])  # a failure is no number
        assert run.found(1, "evaluate")["sampled"]["num_unverified"] > 0
