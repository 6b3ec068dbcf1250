"""Objectives of rollouts in the loop: what rollouts are worth, how it is frozen, and what of it reaches the tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_runs import tiny_settings

from prefloop.config import parse_settings
from prefloop.credit.settings import RewardSettings
from prefloop.evaluation.guard import Decision
from prefloop.loop import run_loop
from prefloop.losses.registry import objective
from prefloop.records import AuthorKind, Ended, Judgement, Message, PrefloopError, Role, Status, Trajectory, Valued
from prefloop.stages.context import Run, opened
from prefloop.stages.curating import curate_stage, dataset_of
from prefloop.stages.evaluating import BEST
from prefloop.stages.judging import judge_stage
from prefloop.stages.rewarding import credit_groups, rewards_of
from prefloop.stages.rollouts import iteration_rollouts, rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.update_data import (
    MIN_EFFECTIVE_SHARE,
    _credit_before,
    mismatch_warnings,
    online_knobs,
    rows_to_learn,
    update_data,
)
from prefloop.stages.updating import train_stage
from prefloop.stats.intervals import cluster_bootstrap
from prefloop.store import Store
from prefloop.store.metrics import read_metrics
from prefloop.training.state import CARRIED


def settings_of(**changes):
    rules = {"lowest": -2.0, "noise_sd": 0.3}
    given = {
        "iterations": 2,
        "train__algorithm": "grpo",
        "train__beta": None,
        "rollout__num_tasks": 4,
        "judge__rules": rules,
        **changes,
    }
    return parse_settings(RunSettings, tiny_settings(**given), "t")


@pytest.fixture
def curated(tmp_path, monkeypatch):
    """A run whose first iteration is curated."""
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store, opened(Run(settings_of(), store)) as run:
        start_policy(run)
        rollout_stage(run, 0)
        judge_stage(run, 0)
        yield run


def test_a_rollout_is_worth_its_judge_s_value_and_one_whose_judge_failed_is_left_out_and_counted(curated):
    run, rater_id = curated, curated.judge.rater.id
    rollouts = iteration_rollouts(run, 0)
    failed = Judgement(rollouts[0].id, rater_id, Status.TIMEOUT, replicate=1)
    run.store.add_judgements([failed])  # a replicate that failed says nothing
    curate_stage(run, 0)
    event = run.found(0, "curate")
    dataset = run.store.dataset(event["valued_dataset_id"])
    judged = {j.trajectory_id: j for j in run.store.judgements(rater_id=rater_id) if j.status is Status.OK}
    assert {v.trajectory_id: v.value for v in dataset.valued} == {i: j.value for i, j in judged.items()}
    assert all(v.evidence == (judged[v.trajectory_id].id,) for v in dataset.valued)
    assert event["num_without_reward"] == len(rollouts) - dataset.num_members == 0


def test_advantages_are_rewards_less_kl_against_their_group_s_mean(curated):
    run = curated
    curate_stage(run, 0)
    settings = run.settings.train
    dataset = run.store.dataset(run.found(0, "curate")["valued_dataset_id"])
    rows = rows_to_learn(run, dataset, settings)
    before = run.checkpoint_before(0)
    data = update_data(run, run.policies.take(before), 0, before, rows, settings)
    value, task = {v.trajectory_id: v.value for v in dataset.valued}, {}
    for rollout in iteration_rollouts(run, 0):
        task.setdefault(rollout.task_id, []).append(rollout.id)
    assert [group.name for group in data.examples] == list(task)
    for group in data.examples:  # the policy is its own reference still: no KL
        values = np.array([value[i] for i in task[group.name]])
        counts = [len(sample) for sample in group.samples]
        paths = [path for sample in group.samples for path in sample]
        said = [array[path.loss_mask] for array, path in zip(group.advantage, paths, strict=True)]
        for advantage, own in zip(np.repeat(values - values.mean(), counts), said, strict=True):
            np.testing.assert_allclose(own, advantage, atol=1e-4)
    assert data.detail["num_groups"] == len(task) and data.detail["kl_of_rollouts"] == pytest.approx(0.0, abs=1e-4)
    gap = data.detail["sampling_mismatch"]  # sampler and trainer compute the same by different code
    assert gap["mean"] < 1e-4 and gap["effective_share"] == pytest.approx(1.0, abs=1e-4)
    assert data.detail["reward"] == pytest.approx(np.mean(list(value.values())))
    over_tasks = cluster_bootstrap([value[i] for ids in task.values() for i in ids], np.repeat([*task], 4).tolist())
    assert data.detail["reward_interval"] == pytest.approx(over_tasks.to_dict())


def test_the_price_of_kl_follows_its_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = {"train__kl_target": 1e-6, "train__kl_coef": 0.1, "guard__max_kl": 50.0}
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(**knobs), store)
        run_loop(run)
        first, second = (run.found(number, "train")["credit"] for number in range(2))
    # Before the first update there is no KL, so that it gets cheaper by a fifth: all attempts are one horizon.
    assert abs(first["kl_of_rollouts"]) < 1e-4 and first["kl_coef"] == 0.1
    assert second["kl_coef"] == first["next_kl_coef"]
    change = np.clip(second["kl_of_rollouts"] / 1e-6 - 1, -0.2, 0.2)
    assert second["next_kl_coef"] == pytest.approx(second["kl_coef"] * (1 + change))


def test_an_iteration_with_nothing_to_learn_resets_neither_the_price_of_kl_nor_baselines(curated):
    run, settings = curated, curated.settings.train
    noted = {"next_kl_coef": 0.08, "baselines": [{"total": 8.0, "num": 16.0}]}
    run.store.add_event(run.id, 0, "train", {"credit": noted})
    run.store.add_event(run.id, 1, "train", {"reason": "nothing to train on: no rollout has a reward"})
    assert [online_knobs(run, iteration, settings)["kl_coef"] for iteration in range(3)] == [0.05, 0.08, 0.08]
    assert _credit_before(run, 2) == noted


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo"])
def test_two_iterations_of_the_loop(algorithm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(train__algorithm=algorithm, guard__max_kl=50.0, train__num_epochs=2), store)
        finished = run_loop(run)
        first, second = (run.found(number, "train") for number in range(2))
    assert finished["end_checkpoint"] == second["checkpoint_id"]
    assert first["steps"] == 2 * math.ceil(first["credit"]["num_groups"] / run.settings.train.batch_size)
    if algorithm == "reinforce":  # what came before is the baseline of what comes
        (before,), (after,) = (found["credit"]["baselines"] for found in (first, second))
        assert after["num"] == pytest.approx(0.9 * before["num"] + second["credit"]["num"])
    assert second["credit"]["kl_of_rollouts"] != 0.0


@pytest.mark.parametrize("algorithm", ["online_dpo", "rejection_sampling"])
def test_the_best_attempt_of_each_task_and_for_pairs_the_worst(algorithm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(iterations=1, train__algorithm=algorithm, guard__max_kl=50.0, curation={}), store)
        run_loop(run)
        scores = {j.trajectory_id: j.score for j in store.judgements(rater_id=run.judge.rater.id)}
        by_task = {}
        for rollout in iteration_rollouts(run, 0):
            by_task.setdefault(rollout.task_id, []).append(scores[rollout.id])
        dataset = store.dataset(run.found(0, "train")["dataset_id"])
        if algorithm == "rejection_sampling":
            best = {t.task_id: scores[t.id] for t in store.trajectories(dataset.trajectory_ids)}
            assert best == {task: max(found) for task, found in by_task.items()}
        else:
            pairs = {p.task_id: (scores[p.chosen_id], scores[p.rejected_id]) for p in dataset.pairs}
            assert pairs == {task: (max(f), min(f)) for task, f in by_task.items() if max(f) > min(f)}
            assert len(dataset.pairs) == len(pairs) > 0


def test_the_best_of_several_attempts_is_the_judge_s_pick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(iterations=0, evaluation__best_of=3), store)
        run_loop(run)
        found = run.found(0, "evaluate")
        attempts = [t for t in store.trajectories(run_id=run.id, iteration=0) if t.extra["stage"] == BEST]
        scores = {j.trajectory_id: j.score for j in store.judgements(rater_id=run.judge.rater.id)}
        verdicts = run.verdicts([t.id for t in attempts])
    by_task = {}
    for one in attempts:
        by_task.setdefault(one.task_id, []).append(one)
    assert {len(group) for group in by_task.values()} == {3} and len(by_task) == found["num_tasks"]
    picks = [max(group, key=lambda one: scores[one.id]) for group in by_task.values()]
    successes = [bool(verdicts[one.id].criteria["success"]) for one in picks]
    assert found["best_of"]["success"]["value"] == pytest.approx(np.mean(successes))
    assert found["best_of"]["kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert found["best_of"]["mean_judge_score"] == pytest.approx(np.mean([scores[one.id] for one in picks]))


def test_self_play_prefers_demonstrations_to_the_policy_s_own_attempts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(train__algorithm="spin", guard__max_kl=50.0), store)
        run_loop(run)
        for iteration in range(2):
            trained = run.found(iteration, "train")
            pairs = store.dataset(trained["dataset_id"]).pairs
            rollouts = {t.id: t for t in iteration_rollouts(run, iteration)}
            shown = {t.id: t for t in store.trajectories([pair.chosen_id for pair in pairs])}
            assert {t.author_kind for t in shown.values()} == {AuthorKind.DEMONSTRATOR}
            assert all(shown[p.chosen_id].task_id == rollouts[p.rejected_id].task_id for p in pairs)
            same = [t for t in rollouts.values() if t.id not in {p.rejected_id for p in pairs}]
            demonstrated = {t.task_id: t.completion for t in shown.values()}
            assert all(demonstrated.get(t.task_id, t.completion) == t.completion for t in same)
            # The reference is the policy before the update, so that nothing is learned yet at the first step.
            first = read_metrics(store, run.id, iteration=iteration)[0].metrics
            assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
        for_pairs = {key: value for key, value in run.found(0, "curate").items() if key != "self_play_dataset_id"}
        monkeypatch.setattr(Run, "require", lambda *_: for_pairs)
        with pytest.raises(PrefloopError, match="was curated without demonstrations"):
            dataset_of(run, 0, "spin")


def trajectory(name, ended=Ended.DONE):
    messages = (Message(Role.USER, "q"), Message(Role.ASSISTANT, "a"))
    return Trajectory(name, "task", messages, 1, ended, AuthorKind.CHECKPOINT, "c")


def test_sources_are_summed_clipped_and_stops_are_priced():
    rows = [trajectory("a"), trajectory("b", Ended.LENGTH), trajectory("c")]
    values = {"judge": [1.0, 5.0, math.nan], "verified": [0.5, 1.0, 1.0]}
    settings = RewardSettings(judge=1.0, verified=2.0, clip=(0.0, 4.0), missing_stop_penalty=0.25)
    np.testing.assert_allclose(rewards_of(rows, values, settings), [2.0, 3.75, math.nan])
    only_verified = RewardSettings(judge=0.0, verified=1.0)
    np.testing.assert_allclose(rewards_of(rows, values, only_verified), [0.5, 1.0, 1.0])  # its judge failed: no matter
    white = rewards_of(rows[:2], {"judge": [1.0, 3.0], "verified": [0, 0]}, RewardSettings(whiten=True))
    assert np.std(white, ddof=1) == pytest.approx(1.0) and white.mean() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__sampling": {"top_p": 0.9}}, "grpo needs the probability of every token"),
        ({"rollout__sampling": {"temperature": 0.0}}, "grpo needs the probability of every token"),
        ({"gateway": {"sampling": "request"}}, "grpo learns from tokens .*set gateway.sampling to 'run'"),
        ({"rollout__samples_per_task": 1}, "compares attempts at one task"),
        ({"train__held_out": 0.2}, "held_out, evaluate_every and sync_reference_every should be left out"),
        ({"train__ratio": "sequence"}, "denominator should be 'samples'"),
        ({"train__beta": 0.1}, "beta: objective 'grpo' has no such knob"),
        ({"train__algorithm": "online_dpo", "rollout__samples_per_task": 0}, "samples_per_task should be"),
        ({"train__algorithm": "online_dpo", "rollout__samples_per_task": "8"}, "samples_per_task should be"),
        ({"train__algorithm": "online_dpo", "rollout": "many"}, "rollout should be"),
        ({"train__algorithm": "online_dpo", "curation": []}, "curation should be"),
        ({"reward__judge": 0.0}, "judge and verified are both 0"),
        ({"train__warmup_steps": 9, "train__batch_size": 1}, "train.warmup_steps is 9, and the training has 8 steps"),
        ({"sft__warmup_steps": 50, "sft__num_steps": None}, "sft.warmup_steps is 50, and the training has"),
        ({"reward": {"judge": 0.0, "verified": 1.0}, "train__kl_target": 1.0}, "kl_target needs train.kl_coef"),
        ({"curation__confirm": 2}, "curation.confirm should be 0: .* grpo learns from none of them"),
        ({"curation__confirm": 2, "train__algorithm": "spin"}, "curation.confirm should be 0"),
        ({"reward__clip": [1.0, 0.0]}, "low below high"),
    ],
)
def test_what_cannot_be_learned_from_is_said_before_the_run(changes, message):
    with pytest.raises(PrefloopError, match=message):
        settings_of(**changes)


def test_kl_costs_nothing_where_the_whole_reward_is_verified(tmp_path):
    verified = {"judge": 0.0, "verified": 1.0}
    for reward, given, expected in (({}, None, 0.05), (verified, None, 0.0), (verified, 0.3, 0.3)):
        settings = settings_of(reward=reward, train__kl_coef=given)
        with Store(str(tmp_path / "s.db")) as store:
            assert online_knobs(Run(settings, store), 0, settings.train)["kl_coef"] == expected


def test_rendered_messages_are_not_what_was_sampled(curated):
    run = curated
    curate_stage(run, 0)
    dataset = run.store.dataset(run.found(0, "curate")["valued_dataset_id"])
    first = run.store.trajectories([dataset.valued[0].trajectory_id], with_paths=True)[0]
    imported = replace(first, id="imported", token_paths=())
    run.store.add_trajectories([imported])
    other = replace(dataset, valued=(Valued("imported", 1.0),))
    run.store.add_dataset(other)
    rows, before = rows_to_learn(run, other, run.settings.train), run.checkpoint_before(0)
    with pytest.raises(PrefloopError, match="trajectory imported: its tokens are not those that this policy sampled"):
        update_data(run, run.policies.take(before), 0, before, rows, run.settings.train)


def test_groups_whose_rewards_differ_by_noise_teach_nothing(curated):
    run = curated
    curate_stage(run, 0)
    train_stage(run, 0)
    assert run.found(0, "train")["credit"]["num_groups_without_spread"] < 4
    quiet = {**objective("rloo").knobs, "min_spread": 100.0, "kl_coef": 0.0}
    data = run.store.dataset(run.found(0, "curate")["valued_dataset_id"])
    before, settings = run.checkpoint_before(0), run.settings.train
    groups = update_data(run, run.policies.take(before), 0, before, rows_to_learn(run, data, settings), settings)
    found = credit_groups(groups.examples, np.array([v.value for v in data.valued]), quiet)
    assert found.detail["num_groups_without_spread"] == found.detail["num_groups"] == 4
    assert all(not array.any() for group in found.groups for array in group.advantage)
    noisy = settings.model_copy(update={"min_spread": 100.0})
    told = update_data(run, run.policies.take(before), 0, before, rows_to_learn(run, data, noisy), noisy).warnings
    assert [text.split(":")[0] for text in told] == ["no rollout has an advantage"] and not groups.warnings


def test_the_judge_s_noise_is_measured_from_its_replicates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rules = {"lowest": -2.0, "noise_sd": 2.0}
    settings = settings_of(
        judge__rules=rules, judge__num_replicates=3, reward={"judge": 0.5, "verified": 1.0}, train__min_spread="noise"
    )
    with Store("runs/prefloop.db") as store, opened(Run(settings, store)) as run:
        start_policy(run)
        rollout_stage(run, 0)
        judge_stage(run, 0)
        curate_stage(run, 0)
        judged = {}
        for one in store.judgements(rater_id=run.judge.rater.id):
            judged.setdefault(one.trajectory_id, []).append(one.value)
        sd = np.sqrt(np.mean([np.var(values, ddof=1) for values in judged.values()]))
        noise = run.found(0, "curate")["judge_noise"]
        assert noise == pytest.approx(0.5 * sd / np.sqrt(3)) and noise > 0.2
        assert online_knobs(run, 0, settings.train)["min_spread"] == noise
        train_stage(run, 0)
        rewards = {}
        for one in store.dataset(run.found(0, "train")["dataset_id"]).valued:
            (rollout,) = store.trajectories([one.trajectory_id])
            rewards.setdefault(rollout.task_id, []).append(one.value)
        flat = [task for task, values in rewards.items() if np.std(values, ddof=1) < noise]
        assert run.found(0, "train")["credit"]["num_groups_without_spread"] == len(flat)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "needs judge.num_replicates of at least 2"),
        ({"judge__num_replicates": 2, "reward": {"judge": 0.0, "verified": 1.0}}, "reward.judge above 0"),
        ({"judge__num_replicates": 2, "reward": {"whiten": True}}, "give a number where rewards are whitened"),
    ],
)
def test_noise_that_cannot_be_measured_is_refused(changes, says):
    with pytest.raises(PrefloopError, match=says):
        settings_of(train__min_spread="noise", **changes)


def test_a_sampler_that_drew_from_another_policy_is_told_of(curated):
    run = curated
    curate_stage(run, 0)
    sampling = run.settings.rollout.sampling.model_copy(update={"temperature": 3.0})  # they were drawn at 1
    rollout = run.settings.rollout.model_copy(update={"sampling": sampling})
    run.settings = run.settings.model_copy(update={"rollout": rollout})
    train_stage(run, 0)
    found = run.found(0, "train")
    share = found["credit"]["sampling_mismatch"]["effective_share"]
    assert share < MIN_EFFECTIVE_SHARE
    (told,) = [text for text in found["warnings"] if "disagree" in text]
    assert f"count for {share:.0%} of their number (effective_share below 90%)" in told
    assert not mismatch_warnings({"sampling_mismatch": {"mean": 0.02, "effective_share": 0.9}})


def test_an_iteration_that_leaves_less_to_learn_from_is_warmed_up_in_fewer_steps(curated, monkeypatch):
    run = curated
    update = run.settings.train.model_copy(update={"warmup_steps": 4, "batch_size": 1, "num_epochs": 1})
    run.settings = run.settings.model_copy(update={"train": update})
    rollouts = iteration_rollouts(run, 0)
    left = [rollout for rollout in rollouts if rollout.task_id == rollouts[0].task_id]
    monkeypatch.setattr("prefloop.stages.curating.iteration_rollouts", lambda *_: left)
    curate_stage(run, 0)
    train_stage(run, 0)
    found = run.found(0, "train")
    assert found["steps"] == 1
    assert "the update has 1 step, and train.warmup_steps is 4: its warm-up is as short" in found["warnings"]


def test_one_step_without_kl_in_the_reward_makes_no_pass_of_its_own(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("log-probs before the update were computed")

    monkeypatch.chdir(tmp_path)
    knobs = {"iterations": 1, "train__kl_coef": 0.0, "train__num_steps": 1, "train__batch_size": 4}
    monkeypatch.setattr("prefloop.training.logprobs.logprobs_of", refuse)
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(**knobs), store)
        run_loop(run)
        gap = run.found(0, "train")["credit"]["sampling_mismatch"]
    assert gap["mean"] < gap["largest"] < 1e-3 and gap["effective_share"] == pytest.approx(1.0, abs=1e-4)


def test_the_optimizer_of_the_last_update_that_was_kept_goes_on(tmp_path, monkeypatch):
    """Its steps are counted over iterations; those of an update that was taken back are not."""
    monkeypatch.chdir(tmp_path)
    verdicts = iter([True, False, True])
    monkeypatch.setattr(
        "prefloop.stages.updating.kl_guard", lambda *_: Decision(next(verdicts), "as the test wants it")
    )
    with Store("runs/prefloop.db") as store:
        run = Run(
            settings_of(iterations=3, train__learning_rate=1e-4, guard__max_retries=0, guard__max_drop=1.0), store
        )
        run_loop(run)
        updates = [run.found(number, "train") for number in range(3)]
        (left,) = (run.directory / "moments").iterdir()  # of the newest policy alone
    assert [one["rolled_back"] for one in updates] == [False, True, False]
    assert left.name == updates[2]["checkpoint_id"][:12]
    moments = load_file(left / CARRIED)
    counts = {float(value) for name, value in moments.items() if name.startswith("step.")}
    assert counts == {updates[0]["steps"] + updates[2]["steps"]}
