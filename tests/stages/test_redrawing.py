"""Other tasks take the place of those with nothing to choose: which ones, how often, and what is learned from."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager

import pytest
from tiny_runs import tiny_settings

from prefloop.config import parse_settings
from prefloop.judges.rules import RuleJudge
from prefloop.records import PrefloopError, Split
from prefloop.stages.context import Run, opened
from prefloop.stages.curating import curate_stage
from prefloop.stages.judging import judge_stage
from prefloop.stages.policies import Policies
from prefloop.stages.redrawing import STAGE, other_tasks, redraw_stage
from prefloop.stages.rewarding import tasks_without_choice, worth_of
from prefloop.stages.rollouts import iteration_rollouts, iteration_tasks, rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.updating import train_stage
from prefloop.store import Store

# Two sums in which a policy that was shown little is right now and then; only the environment's word counts.
VERIFIED = {
    "environment": {"name": "arithmetic", "num_steps": 1, "modulus": 3, "largest": 2},
    "sft__num_demonstrations": 100,
    "sft__num_steps": 40,
    "rollout__num_tasks": 6,
    "rollout__tasks_per_unit": 4,
    "rollout__samples_per_task": 2,
    "rollout__sampling": {"max_new_tokens": 20},
    "judge": {"rules": {}},
    "reward": {"judge": 0.0, "verified": 1.0},
    "train__algorithm": "rloo",
    "train__beta": None,
    "guard__max_kl": 50.0,
}


def settings_of(**changes):
    return parse_settings(RunSettings, tiny_settings(**{**VERIFIED, "iterations": 2, **changes}), "t")


@contextmanager
def judged(folder, monkeypatch, **changes):
    """A run whose first iteration is judged."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    with Store("runs/prefloop.db") as store, opened(Run(settings_of(**changes), store)) as run:
        start_policy(run)
        rollout_stage(run, 0)
        judge_stage(run, 0)
        yield run


def spread_tasks(run, iteration=0):
    """The tasks whose attempts differ in their verified value."""
    by_task = {}
    for one in iteration_rollouts(run, iteration):
        by_task.setdefault(one.task_id, []).append(run.verdicts([one.id])[one.id].value)
    return {task for task, values in by_task.items() if len(set(values)) > 1}, set(by_task)


def test_as_many_tasks_are_drawn_as_have_nothing_to_choose_and_only_the_others_are_learned_from(tmp_path, monkeypatch):
    with judged(tmp_path, monkeypatch, rollout__redraws=2) as run:
        own = {task.id for task in iteration_tasks(run, 0)}
        before, _ = spread_tasks(run)
        redraw_stage(run, 0)
        found = run.found(0, STAGE)
        spread, tasks = spread_tasks(run)
        assert found["rounds"][0]["num_flat"] == found["rounds"][0]["num_tasks"] == 6 - len(before) > 0
        assert len(tasks) == 6 + sum(one["num_tasks"] for one in found["rounds"])
        assert len(tasks) - len(spread) == found["num_flat"]
        assert found["num_missing"] == max(0, 6 - len(spread))
        later = {task.id for task in iteration_tasks(run, 1)}
        assert own <= tasks and not later & tasks  # no iteration's own tasks depend on what was drawn again
        curate_stage(run, 0)
        curated = run.found(0, "curate")
        dataset = run.store.dataset(curated["valued_dataset_id"])
        rollouts = {t.id: t.task_id for t in iteration_rollouts(run, 0)}
        assert {rollouts[one.trajectory_id] for one in dataset.valued} == spread
        assert curated["num_without_choice"] == 2 * found["num_flat"] and curated["num_without_reward"] == 0
        train_stage(run, 0)
        credit = run.found(0, "train")["credit"]
        assert credit["num_groups"] == len(spread) and credit["num_groups_without_spread"] == 0
        assert redraw_stage(run, 0) is None and len(iteration_rollouts(run, 0)) == len(rollouts)
        rollout_stage(run, 1)
        judge_stage(run, 1)
        redraw_stage(run, 1)
        assert not spread_tasks(run, 1)[1] & tasks


def test_where_all_groups_leave_nothing_to_choose_the_reason_says_so(tmp_path, monkeypatch):
    with judged(tmp_path, monkeypatch, rollout__redraws=1, rollout__num_tasks=1, train__min_spread=100.0) as run:
        redraw_stage(run, 0)
        curate_stage(run, 0)
        train_stage(run, 0)
        reason = run.found(0, "train")["reason"]
    assert reason.startswith("nothing to train on: 4 rollouts with a reward, and at no task do they differ by enough")


def test_without_redraws_nothing_is_drawn_and_all_is_learned_from(tmp_path, monkeypatch):
    with judged(tmp_path, monkeypatch) as run:
        redraw_stage(run, 0)
        assert run.found(0, STAGE) is None
        curate_stage(run, 0)
        curated = run.found(0, "curate")
        assert "num_without_choice" not in curated
        assert run.store.dataset(curated["valued_dataset_id"]).num_members == 12


class KilledError(Exception):
    """Stands for a kill: whatever was not committed is gone."""


def test_whatever_ends_a_round_it_is_the_same_round_and_nothing_is_done_twice(tmp_path, monkeypatch):
    with judged(tmp_path / "whole", monkeypatch, rollout__redraws=3) as run:
        redraw_stage(run, 0)
        expected, tasks = run.found(0, STAGE), spread_tasks(run)[1]
        judged_ones = sorted(j.id for j in run.store.judgements(rater_id=run.judge.rater.id))
    assert len(expected["rounds"]) > 1
    judge, roll_out = RuleJudge.judge, Policies.roll_out
    asked, played = Counter(), Counter()  # what came of it was kept

    def judging(self, items, replicate=0):
        found = judge(self, items, replicate)
        die_now("judge")
        asked.update(item.trajectory.id for item in items)
        return found

    def rolling(self, who, attempts, *rest):
        found = roll_out(self, who, attempts, *rest)
        die_now("roll out")
        played.update((attempt.task.id, attempt.sample) for attempt in attempts)
        return found

    def die_now(where):
        if deaths and deaths[0] == where:
            deaths.pop(0)
            raise KilledError

    with judged(tmp_path / "killed", monkeypatch, rollout__redraws=3) as run:
        deaths = ["judge", "roll out", "judge"]
        monkeypatch.setattr(RuleJudge, "judge", judging)
        monkeypatch.setattr(Policies, "roll_out", rolling)
        for _ in range(3):
            with pytest.raises(KilledError):
                redraw_stage(run, 0)
        redraw_stage(run, 0)
        assert {**run.found(0, STAGE), "seconds": 0} == {**expected, "seconds": 0}
        assert spread_tasks(run)[1] == tasks
        assert sorted(j.id for j in run.store.judgements(rater_id=run.judge.rater.id)) == judged_ones
    assert set(asked.values()) == set(played.values()) == {1}
    assert len(played) == 2 * sum(one["num_tasks"] for one in expected["rounds"])


def test_tasks_that_are_few_come_around_and_none_is_drawn_twice(tmp_path, monkeypatch):
    rows = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "environment": {"name": "prompts", "path": str(tmp_path / "prompts.jsonl"), "held_out": 0.01},
        "reward": {},
        "guard__num_tasks": 2,
        "rollout__num_tasks": 4,
        "rollout__redraws": 5,
        "train__min_spread": 100.0,  # nothing is ever enough
    }
    monkeypatch.chdir(tmp_path)
    settings = settings_of(**changes, judge={"kind": "reward", "reward": {"model": "rm", "centre": 0.0, "scale": 1.0}})
    assert settings.rollout.redraws == 5
    run = Run(settings, Store("s.db"))
    assert run.environment.num_tasks(Split.TRAIN) == 8
    own = iteration_tasks(run, 0)
    first, begin = other_tasks(run, 0, 1, {task.id for task in own})
    second, end = other_tasks(run, begin, 4, {task.id for task in (*own, *first)})
    drawn = [task.id for task in (*own, *first, *second)]
    assert len(first) == 1 and len(second) == 1  # two are the guard's
    assert len(set(drawn)) == len(drawn) == 6 and end > begin
    run.store.close()


def test_a_group_of_which_one_attempt_has_a_reward_leaves_nothing_to_choose(tmp_path, monkeypatch):
    with judged(tmp_path, monkeypatch, rollout__redraws=1) as run:
        found = worth_of(run, iteration_rollouts(run, 0))
        spread, tasks = spread_tasks(run)
        assert tasks_without_choice(run, found) == tasks - spread
        lonely = [one for one in found if one.task_id not in spread][:1]
        lonely += [one for one in found if one.task_id in spread][::2]
        assert tasks_without_choice(run, lonely) == {one.task_id for one in lonely}
        assert tasks_without_choice(run, []) == set()


def test_curation_waits_for_the_rounds(tmp_path, monkeypatch):
    with (
        judged(tmp_path, monkeypatch, rollout__redraws=1) as run,
        pytest.raises(PrefloopError, match=r"no other tasks are drawn yet for those of iteration 1 .*`prefloop judge`"),
    ):
        curate_stage(run, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__algorithm": "ppo"}, "rollout.redraws should be 0: ppo learns from attempts with equal rewards, too"),
        ({"train__algorithm": "reinforce"}, "rollout.redraws should be 0: reinforce learns"),
        ({"train__algorithm": "dpo", "train__beta": 0.1}, "rollout.redraws should be 0: dpo"),
        ({"rollout__redraws": -1}, "redraws should be"),
    ],
)
def test_for_whom_nothing_is_drawn_again_is_said_before_the_run(changes, message):
    with pytest.raises(PrefloopError, match=message):
        settings_of(**{"rollout__redraws": 1, **changes})
