"""Credit along the way: rewards of steps by hand, at the policy's own tokens, and through the stages of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny_settings

from packed_examples import of_sources
from prefloop.batch.examples import RolloutGroup
from prefloop.chat import StepFinder, steps_of
from prefloop.config import parse_settings
from prefloop.credit.groups import Baseline
from prefloop.credit.steps import Paid
from prefloop.losses.registry import objective
from prefloop.models.reward import new_reward_model
from prefloop.records import PrefloopError, Source, Status
from prefloop.stages import step_credit
from prefloop.stages.context import Run, opened
from prefloop.stages.curating import curate_stage
from prefloop.stages.judging import judge_stage
from prefloop.stages.rewarding import credit_groups, credit_tokens
from prefloop.stages.rollouts import iteration_rollouts, rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.update_data import rows_to_learn, update_data
from prefloop.stages.updating import train_stage
from prefloop.store import Store
from prefloop.training.checkpoint import save_atomically
from prefloop.training.logprobs import Values

SAID, READ = Source.SAMPLED, Source.PROMPT


# --- by hand ----------------------------------------------------------------------------------------------------


def group_of_three():
    """Attempts of two, three and one steps; the first has two contexts, and a tool answers in the second."""
    first = of_sources([1, 2, 3], [READ, SAID, SAID]), of_sources([1, 4, 5], [READ, SAID, SAID])
    second = (of_sources([1, 6, 7, 8, 9], [READ, SAID, READ, SAID, SAID]),)
    third = (of_sources([1, 9], [READ, SAID]),)
    kl = iter([1.0, 0.0, 0.5, 0.0, 0.0, 0.5, 1.0, 9.0])
    paths = [*first, *second, *third]
    old, ref = [], []
    for path in paths:
        own = path.loss_mask
        old.append(np.where(own, -1.0, 99.0))
        ref.append(np.array([-1.0 - next(kl) if said else 0.0 for said in own]))
    return RolloutGroup((first, second, third), (), old_logprob=tuple(old), ref_logprob=tuple(ref), name="task")


PAID = [
    Paid(np.array([0.75, -0.25]), np.array([1, 3])),
    Paid(np.array([0.25, 0.5, -0.25]), np.array([0, 1, 2])),
    Paid(np.array([0.5]), np.array([0])),
]
REWARD = np.array([1.0, 0.5, np.nan])  # of the first attempt half comes at its end; the judge of the third failed


def knobs_of(name, **changes):
    return {**objective(name).knobs, "kl_coef": 0.5, **changes}


def own_advantages(credited):
    """The advantage of each own token of each attempt."""
    (group,) = credited.groups
    arrays = iter(group.advantage)
    found = []
    for sample in group.samples:
        own = [(next(arrays), path.loss_mask) for path in sample]
        assert not any(array[~mask].any() for array, mask in own)
        found.append(np.concatenate([array[mask] for array, mask in own]).tolist())
    return found


# Rewards of steps less KL: .75 - .5, .25 - .25 | .25, .5 - .25, -.25 - .5; with γ = ½ returns of
# ¼, 0 | 3/16, -⅛, -¾; the first attempt has no third step: nothing more was to come.
LEAVE_ONE_OUT = [[1 / 16, 1 / 16, 1 / 8, 1 / 8], [-1 / 16, -1 / 8, -3 / 4], [0.0]]


@pytest.mark.parametrize(("name", "share"), [("rloo", 1.0), ("grpo", 0.5)])
def test_each_token_has_what_its_step_led_to_against_the_same_step_of_the_others(name, share):
    found = credit_groups([group_of_three()], REWARD, knobs_of(name, turn_discount=0.5), (), PAID)
    for advantage, expected in zip(own_advantages(found), LEAVE_ONE_OUT, strict=True):
        np.testing.assert_allclose(advantage, share * np.array(expected), atol=1e-12)
    assert found.detail["num_groups_without_spread"] == 0


def test_scaled_steps_are_divided_by_the_spread_of_whole_rewards_and_kl_keeps_its_price():
    def found(rewards=REWARD, **knobs):
        return own_advantages(credit_groups([group_of_three()], rewards, knobs_of("grpo", **knobs), (), PAID))

    spread = np.sqrt(0.125) + 1e-4  # of 1 and .5
    parts = zip(found(), found(kl_coef=0.0), found(scale="group"), strict=True)
    for whole, without, scaled in parts:
        np.testing.assert_allclose(scaled, np.array(without) / spread + np.subtract(whole, without), atol=1e-12)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_have_the_advantage_of_kl_alone_which_nothing_is_divided_by(scale):
    group, rewards = group_of_three(), np.ones(3)
    found = credit_groups([group], rewards, knobs_of("grpo", scale=scale, kl_coef=0.05))
    # KL of 1.5, 1.5 and 9 nats: less their mean, times β.
    np.testing.assert_allclose([one[0] for one in own_advantages(found)], [0.125, 0.125, -0.25])
    assert found.detail["num_groups_without_spread"] == 1
    quiet = credit_groups([group], rewards, knobs_of("grpo", scale=scale, kl_coef=0.05, min_spread=1e-9))
    assert not any(map(any, own_advantages(quiet)))


def test_a_running_baseline_knows_each_step():
    knobs = knobs_of("reinforce", kl_coef=0.0)
    before = [Baseline(6.0, 4.0), Baseline(2.0, 4.0)]
    found = credit_groups([group_of_three()], REWARD, knobs, before, PAID)
    # Returns 1, .25 | .5, .25, -.25 against 1.5, .5 and nothing.
    assert own_advantages(found) == [[-0.5, -0.5, -0.25, -0.25], [-1.0, -0.25, -0.25], [0.0]]
    after = [(one["total"], one["num"]) for one in found.detail["baselines"]]
    np.testing.assert_allclose(after, [(5.4 + 1.5, 5.6), (1.8 + 0.5, 5.6), (-0.25, 5.6)])
    whole = credit_groups([group_of_three()], REWARD, knobs, [Baseline(**one) for one in found.detail["baselines"]])
    np.testing.assert_allclose(own_advantages(whole)[0], 1.0 - 6.9 / 5.6)
    assert len(whole.detail["baselines"]) == 3  # those of steps that nobody took fade, too


def test_without_rewards_of_steps_all_of_an_attempt_is_one():
    found = credit_groups([group_of_three()], REWARD, knobs_of("rloo"))
    # 1 - .75 against .5 - .75
    assert own_advantages(found) == [[0.5] * 4, [-0.5] * 3, [0.0]]


def test_equal_rewards_of_other_steps_are_something_to_choose():
    even = [Paid(np.array([0.5, 0.0]), np.array([1, 3])), Paid(np.array([0.0, 0.5]), np.array([1, 2])), PAID[2]]
    reward, knobs = np.array([0.5, 0.5, np.nan]), knobs_of("rloo", kl_coef=0.0)
    found = credit_groups([group_of_three()], reward, knobs, (), even)
    assert own_advantages(found) == [[0.0, 0.0, -0.5, -0.5], [0.0, 0.0, 0.5], [0.0]]
    assert found.detail["num_groups_without_spread"] == 0
    for quiet in ({"min_spread": 0.1}, {"baseline": "group_mean", "scale": "group"}):
        found = credit_groups([group_of_three()], reward, {**knobs, **quiet}, (), even)
        assert not any(map(any, own_advantages(found)))
    assert credit_groups([group_of_three()], reward, knobs).detail["num_groups_without_spread"] == 1


def test_with_a_critic_each_step_is_paid_at_its_last_token():
    group = group_of_three()
    paths = [path for sample in group.samples for path in sample]
    before, after = (tuple(np.where(path.loss_mask, value, 7.0) for path in paths) for value in (0.5, 2.0))
    values = Values(before, after)
    knobs = knobs_of("ppo", whiten_advantages=False)
    found = credit_tokens([group], np.array([1.0, 0.5, 0.25]), [False, True, False], [values], knobs, PAID)
    # Rewards less KL: -.5, .75, -.25, -.25 + .5 | .25, .5 - .25, -.25 - .5 + 2 | .25 - 4.5
    returns = [[0.25, 0.75, 0.0, 0.25], [1.75, 1.5, 1.25], [-4.25]]
    for advantage, expected in zip(own_advantages(found), returns, strict=True):
        np.testing.assert_allclose(np.array(advantage) + 0.5, expected)


# --- through the stages -----------------------------------------------------------------------------------------


ARITHMETIC = {
    "environment": {"name": "arithmetic", "num_steps": 3, "modulus": 4, "largest": 2},
    "rollout__sampling": {"max_new_tokens": 48},
    "sft__num_demonstrations": 120,
    "sft__num_steps": 60,
    "train__algorithm": "grpo",
    "train__beta": None,
    "guard__max_kl": 50.0,
}


def settings_of(**changes):
    return parse_settings(RunSettings, tiny_settings(**{**ARITHMETIC, "iterations": 1, **changes}), "t")


def judged_by_steps(run, step):
    """Give a run that has a start policy a judge of steps: its own weights under a random head."""
    from prefloop.stages.scorers import process_reward_judge

    checkpoint = run.store.checkpoint(run.checkpoint_before(0))
    torch.manual_seed(1)
    model = new_reward_model(checkpoint.path, kind="token", seed=3)
    model.step = step
    save_atomically(Path("prm"), model.save)
    run.__dict__["judge"] = process_reward_judge(run.settings.judge.process, 1)


@pytest.fixture
def run(request, tmp_path, monkeypatch):
    """A run whose first iteration is judged by a process reward model of its own policy; `param` sets keys."""
    monkeypatch.chdir(tmp_path)
    judge = {"kind": "process", "process": {"model": "prm"}}
    changes = dict(getattr(request, "param", {}))
    step = changes.pop("step", "separator")
    settings = settings_of(**{"judge": judge, **changes})
    with Store("runs/prefloop.db") as store, opened(Run(settings, store)) as run:
        start_policy(run)
        judged_by_steps(run, step)
        rollout_stage(run, 0)
        judge_stage(run, 0)
        yield run


def learned(run):
    """The frozen rewards by rollout, and what the update would learn from."""
    curate_stage(run, 0)
    settings, before = run.settings.train, run.checkpoint_before(0)
    dataset = run.store.dataset(run.found(0, "curate")["valued_dataset_id"])
    rows = rows_to_learn(run, dataset, settings)
    data = update_data(run, run.policies.take(before), 0, before, rows, settings)
    return {one.trajectory_id: one.value for one in dataset.valued}, data


@pytest.mark.parametrize(
    "run", [{"reward__steps": "difference", "reward__verified": 0.5, "reward__judge": 2.0}], indirect=True
)
def test_steps_are_paid_where_the_policy_ended_them(run):
    value, data = learned(run)
    judged = {j.trajectory_id: j for j in run.store.judgements(rater_id=run.judge.rater.id)}
    verdicts = run.verdicts(value)
    probability = {i: np.array(judged[i].criteria["steps"]) for i in value}
    for i, found in value.items():
        assert found == pytest.approx(2.0 * probability[i][-1] + 0.5 * verdicts[i].value)
    rollouts = {t.id: t for t in iteration_rollouts(run, 0, with_paths=True)}
    finder = StepFinder(run.policies.renderer(run.policies.get(run.checkpoint_before(0))))
    by_task = {}
    for i in value:
        by_task.setdefault(rollouts[i].task_id, []).append(rollouts[i])
    more = 0
    for group in data.examples:
        attempts = by_task[group.name]
        returns = []  # from each step on: what is left to win of the last probability, and the verified value
        for one in attempts:
            before = np.concatenate([[0.0], probability[one.id][:-1]])
            returns.append(2.0 * (probability[one.id][-1] - before) + 0.5 * verdicts[one.id].value)
        more += len({len(each) for each in returns}) - 1
        length = max(map(len, returns))
        padded = np.array([np.pad(each, (0, length - len(each))) for each in returns])
        for row, (one, array) in enumerate(zip(attempts, group.advantage, strict=True)):
            (path,) = one.token_paths
            ends = [finder.end(one, one.token_paths, place).token for place in steps_of(one, "separator")]
            for token in np.flatnonzero(path.loss_mask):
                step = int(np.searchsorted(ends, token))
                assert array[token] == pytest.approx(padded[row, step] - padded[:, step].mean(), abs=1e-3)
    assert data.detail["num_without_steps"] == 0 and len(data.detail["baselines"]) == 0


BOOKING = {
    "step": "turn",
    "environment": {"name": "booking"},
    "sft__num_demonstrations": 100,
    "rollout__num_tasks": 3,
    "train__turn_discount": 0.5,
    "train__baseline": "none",
    "train__kl_coef": 0.0,
}


@pytest.mark.parametrize("run", [BOOKING], indirect=True)
def test_where_a_step_is_a_turn_its_tokens_have_the_return_of_the_turn(run):
    value, data = learned(run)
    judged = {j.trajectory_id: j for j in run.store.judgements(rater_id=run.judge.rater.id)}
    rollouts = [t for t in iteration_rollouts(run, 0, with_paths=True) if t.id in value]
    assert max(t.num_turns for t in rollouts) > 1
    by_task = {group.name: iter(group.advantage) for group in data.examples}
    for rollout in rollouts:
        lowest = np.minimum.accumulate(judged[rollout.id].criteria["steps"])
        assert value[rollout.id] == pytest.approx(lowest[-1])
        expected, led_to = {}, 0.0
        for turn, paid in reversed(list(zip(rollout.own_turns, np.diff(lowest, prepend=0.0), strict=True))):
            led_to = paid + 0.5 * led_to
            expected[turn] = led_to
        for path in rollout.token_paths:
            array = next(by_task[rollout.task_id])
            for token in np.flatnonzero(path.loss_mask):
                assert array[token] == pytest.approx(expected[int(path.message[token])], abs=1e-9)


def test_a_rollout_whose_steps_cannot_be_found_is_left_out_and_counted(run, monkeypatch):
    curate_stage(run, 0)
    lost = [one.id for one in iteration_rollouts(run, 0)][::3]

    class Blind(StepFinder):
        def end(self, trajectory, paths, place):
            if trajectory.id in lost:
                raise PrefloopError("its several tool calls cannot be told apart")
            return super().end(trajectory, paths, place)

    monkeypatch.setattr(step_credit, "StepFinder", Blind)
    value, data = learned(run)
    assert data.detail["num_without_steps"] == len(set(lost) & set(value)) > 0
    assert data.detail["num"] == len(value) - data.detail["num_without_steps"]
    lost += value
    with pytest.raises(
        PrefloopError, match=r"the steps of none of .* rollouts can be found .* set reward.steps to 'whole'"
    ):
        learned(run)


@pytest.mark.parametrize("run", [{"reward__steps": "whole"}], indirect=True)
def test_the_whole_value_may_come_at_the_end(run):
    value, data = learned(run)
    judged = {j.trajectory_id: j for j in run.store.judgements(rater_id=run.judge.rater.id) if j.status is Status.OK}
    assert value == {i: j.value for i, j in judged.items()}
    assert "num_without_steps" not in data.detail
    assert all(
        len(set(a[p.loss_mask])) == 1 for g in data.examples for a, (p,) in zip(g.advantage, g.samples, strict=True)
    )


@pytest.mark.parametrize("run", [{"train__algorithm": "ppo"}, {"train__algorithm": "reinforce"}], indirect=True)
def test_other_objectives_learn_from_steps_too(run):
    curate_stage(run, 0)
    train_stage(run, 0)
    found = run.found(0, "train")
    assert found["steps"] and found["credit"]["num_without_steps"] == 0
    json.dumps(found)  # as it is stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward__steps": "min"}, "reward.steps should be left out: of the judges only one of kind 'process'"),
        ({"train__turn_discount": 0.5}, "train.turn_discount is of rewards of steps"),
        ({"judge": "process", "reward__clip": [0.0, 1.0]}, "reward.clip and reward.whiten are of whole rewards"),
        ({"judge": "process", "aggregate": "last"}, "reward.steps should be set: .*'whole' pays what .*'last'"),
        ({"judge": "process", "reward__steps": "mean"}, "reward.steps should be"),
        ({"train__algorithm": "ppo", "train__turn_discount": 0.5}, "turn_discount: objective 'ppo' has no such knob"),
    ],
)
def test_what_cannot_be_paid_is_said_before_the_run(changes, message):
    given = {key: value for key, value in changes.items() if key != "aggregate"}
    if given.get("judge") == "process":
        given["judge"] = {
            "kind": "process",
            "process": {"model": "prm", "aggregate": changes.get("aggregate", "min")},
        }
    with pytest.raises(PrefloopError, match=message):
        settings_of(**given)
