"""Every objective of policies updates the policy of a run, on what curation made of one iteration's rollouts."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from tiny_runs import curate_first_iteration, tiny_settings

from prefloop import cli
from prefloop.config import parse_settings
from prefloop.loop import run_loop
from prefloop.losses.registry import OBJECTIVES
from prefloop.records import PrefloopError
from prefloop.stages.context import Run, opened
from prefloop.stages.curating import DATASETS, adopt_dataset
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.update_data import rows_to_learn, update_data
from prefloop.stages.updating import train_stage
from prefloop.store import Store
from prefloop.store.metrics import Training, read_metrics

OF_POLICIES = [name for name, found in OBJECTIVES.items() if found.of_policy and not found.self_play]
QUICK = ("dpo", "simpo", "kto", "grpo")


def run_settings(**changes):
    settings = tiny_settings(
        iterations=1, rollout__num_tasks=8, judge__rules={"lowest": -2.0, "noise_sd": 0.3}, **changes
    )
    return parse_settings(RunSettings, settings, "test")


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A folder with a run whose first iteration is curated."""
    folder = tmp_path_factory.mktemp("curated")
    curate_first_iteration(folder, run_settings())
    return folder


@pytest.fixture
def update(curated, tmp_path, monkeypatch):
    """Train the curated iteration under changed settings; gives the run."""
    shutil.copytree(curated / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store:

        def go(**changes):
            run = Run(run_settings(**changes), store)
            train_stage(run, 0)
            return run

        yield go


def kept_metrics(run, attempt=0):
    found = read_metrics(run.store, run.id, iteration=0)
    return [one.metrics for one in found if one.training == Training(run.id, 0, "train", attempt)]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OF_POLICIES]
)
def test_each_objective_updates_the_policy(update, name):
    run = update(train__algorithm=name)
    trained, curation = run.found(0, "train"), run.found(0, "curate")
    records = OBJECTIVES[name].records
    assert trained["dataset_id"] == curation[DATASETS[records]]
    assert trained["attempts"][-1]["accepted"]
    checkpoint = run.store.checkpoint(trained["checkpoint_id"])
    assert checkpoint.algorithm == name and checkpoint.parent_id == run.checkpoint_before(0)
    steps = kept_metrics(run, len(trained["attempts"]) - 1)
    assert [metrics["loss"] for metrics in steps] == trained["loss"]
    dataset = run.store.dataset(trained["dataset_id"])
    num_rows = trained["credit"]["num_groups"] if records == "rollouts" else dataset.num_members
    assert len(steps) == trained["steps"] == 2 * math.ceil(num_rows / 4) > 2
    assert all(0 < metrics["num_tokens"] <= metrics["num_visits"] for metrics in steps)
    assert (run.store.counts()["logprob"] > 0) == OBJECTIVES[name].reference
    assert trained["warnings"] == [] or name == "kto"


def test_kto_learns_from_labels_and_takes_its_reference_point_from_the_iterations_rollouts(update):
    run = update(train__algorithm="kto", train__learning_rate=1e-3, train__batch_size=6)
    curation = run.found(0, "curate")
    labels = run.store.dataset(curation["labelled_dataset_id"]).labelled
    scores = {j.trajectory_id: j.score for j in run.store.judgements(rater_id=run.judge.rater.id)}
    sides = [[scores[one.trajectory_id] for one in labels if one.desirable is side] for side in (True, False)]
    assert [len(side) for side in sides] == [curation["num_desirable"], curation["num_undesirable"]]
    assert np.mean(sides[0]) > np.mean(sides[1])
    steps = kept_metrics(run)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-4)  # the policy is the reference still
    assert max(metrics["kl"] for metrics in steps) > 1e-3


def test_completions_of_many_turns_are_dealt_to_no_other_prompt(update):
    with pytest.raises(PrefloopError, match=r'a trajectory of several turns .*; set kl to "samples"'):
        update(train__algorithm="kto", train__kl="derangement")
    assert update(train__algorithm="kto", train__kl="none").found(0, "train")["steps"] > 0


def test_kto_says_when_its_weights_are_not_as_its_paper_advises(update):
    run = update(train__algorithm="kto", train__desirable_weight=5.0)
    (warning,) = run.found(0, "train")["warnings"]
    assert "outside the advised 1 to 4/3" in warning


@pytest.mark.parametrize("name", ["kto", "sft", "dpo"])
def test_an_adopted_dataset_of_pairs_serves_each_kind(update, name):
    settings = run_settings(train__algorithm=name)
    with Store("runs/prefloop.db") as store:
        pairs = store.dataset(Run(settings, store).found(0, "curate")["dataset_id"])
        run = Run(settings, store)
        rows = rows_to_learn(run, pairs, settings.train)
        assert len(rows.members) == len(pairs.pairs) * (2 if name == "kto" else 1)
        adopt_dataset(run, 1, pairs.id)
        assert run.found(1, "curate")["labelled_dataset_id"] == pairs.id


def test_labels_cannot_be_turned_into_pairs(update):
    run = update(train__algorithm="kto")
    labelled = run.store.dataset(run.found(0, "train")["dataset_id"])
    with pytest.raises(PrefloopError, match=r"dpo cannot learn from dataset .*holds a labelled trajectory"):
        rows_to_learn(run, labelled, run_settings(train__algorithm="dpo").train)


def prompt_of(pair):
    (path, *_) = pair.chosen
    return tuple(path.token[: int(np.argmax(path.loss_mask))].tolist())


def test_a_share_of_the_prompts_is_held_out_and_evaluated(update):
    run = update(train__held_out=0.4, train__evaluate_every=1, train__batch_size=2, train__patience=2)
    trained, steps = run.found(0, "train"), kept_metrics(run)
    evaluated = {one["step"]: one["metrics"]["loss"] for one in trained["evaluations"]}
    assert {at: m["eval/loss"] for at, m in enumerate(steps, 1) if "eval/loss" in m} == evaluated
    assert evaluated.keys() == set(range(1, len(steps) + 1))
    assert evaluated[trained["best_step"]] == min(evaluated.values())
    rows = rows_to_learn(run, run.store.dataset(trained["dataset_id"]), run.settings.train)
    policy = run.policies.take(run.checkpoint_before(0))
    data = update_data(run, policy, 0, run.checkpoint_before(0), rows, run.settings.train)
    assert data.held_out and len(data.examples) + len(data.held_out) == len(rows.members)
    prompts = [{prompt_of(example) for example in part} for part in (data.examples, data.held_out)]
    assert prompts[0].isdisjoint(prompts[1])


def test_too_few_rows_are_not_held_out_and_it_says_so(update):
    run = update(train__held_out=0.999, train__evaluate_every=1)
    trained = run.found(0, "train")
    assert trained["warnings"] == ["too few rows to hold any out: trained without evaluation"]
    assert trained["evaluations"] == [] and trained["steps"] > 0


def test_the_reference_of_the_run_stays_what_it_was_when_another_follows_the_policy(update):
    run = update(train__sync_reference_every=1, train__learning_rate=1e-2)
    assert run.store.counts()["logprob"] == 0  # its log-probs change
    reference = run.policies.reference(run.checkpoint_before(0))
    start = run.policies.take(run.checkpoint_before(0)).model
    assert all(one.equal(other) for one, other in zip(reference.parameters(), start.parameters(), strict=True))
    first = [metrics["rewards/margins"] for metrics in kept_metrics(run)][:2]
    assert first[0] == pytest.approx(0.0, abs=1e-5)


def test_each_try_keeps_its_metrics_and_a_reference_is_computed_once(update):
    run = update(train__learning_rate=4e-3, guard__max_kl=1e-6, guard__max_retries=1, guard__retry_factor=0.5)
    trained = run.found(0, "train")
    assert len(trained["attempts"]) == 2 and trained["rolled_back"]
    assert len(kept_metrics(run, 0)) == len(kept_metrics(run, 1)) == trained["steps"]
    rates = [kept_metrics(run, attempt)[0]["learning_rate"] for attempt in (0, 1)]
    assert rates == pytest.approx([4e-3, 2e-3])
    assert kept_metrics(run, 0)[0]["loss"] == kept_metrics(run, 1)[0]["loss"]


def test_rows_of_skipped_steps_are_kept_where_a_try_diverges(update):
    run = update(train__learning_rate=1e4, train__batch_size=1, guard__max_retries=0)
    (attempt,) = run.found(0, "train")["attempts"]
    assert not attempt["accepted"] and "steps in a row were not finite" in attempt["reason"]
    assert "skipped.jsonl" not in attempt["reason"]  # it is not kept after the stage
    rows = rows_to_learn(run, run.store.dataset(run.found(0, "train")["dataset_id"]), run.settings.train)
    assert len(attempt["skipped"]) == 4
    assert {name for skipped in attempt["skipped"] for name in skipped["rows"]} <= set(rows.names)


def test_demonstrations_of_held_out_prompts_are_evaluated_and_not_imitated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store:
        run = Run(run_settings(sft__held_out=0.3, sft__evaluate_every=5, sft__num_epochs=1, sft__batch_size=40), store)
        with opened(run):
            start_policy(run)
        learned = run.found(-1, "sft")
        assert [one["step"] for one in learned["evaluations"]] == [5, 10]
        assert learned["evaluations"][1]["metrics"]["loss"] < learned["evaluations"][0]["metrics"]["loss"]
        tokens = [metrics.metrics["num_loss_tokens"] for metrics in read_metrics(store, run.id, stage="sft")]
        assert len(set(tokens)) == 1  # the same rows in each step: all that are not held out
        held_out = learned["evaluations"][0]["metrics"]["num_loss_tokens"]
        with_all = run_settings(sft__batch_size=40, name="all")
        other = Run(with_all, store)
        with opened(other):
            start_policy(other)
        (of_all,) = {m.metrics["num_loss_tokens"] for m in read_metrics(store, other.id, stage="sft")}
        assert tokens[0] + held_out == of_all and held_out > 0


@pytest.mark.parametrize("name", ["reward", "process_reward"])
def test_models_that_judge_are_not_trained_by_the_loop(name):
    with pytest.raises(PrefloopError, match=f"'{name}' trains a model that judges them; `prefloop train {name}`"):
        run_settings(train__algorithm=name)


def test_evaluations_need_rows():
    for table in ("train", "sft"):
        with pytest.raises(PrefloopError, match="evaluate_every needs held_out"):
            run_settings(**{f"{table}__evaluate_every": 2})


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["derangement", "rotation"])
def test_single_answers_may_be_dealt_to_other_prompts(tmp_path, monkeypatch, kl):
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init-model", "model", "--set=hidden_size=32", "--set=num_heads=4"]) == 0
    settings = tiny_settings(iterations=1, judge__rules={"noise_sd": 0.3}, train__algorithm="kto", train__kl=kl)
    del settings["sft"]
    settings |= {"environment": {"name": "reasoning-gym", "dataset": "chain_sum"}, "policy": {"model": "./model"}}
    settings["rollout"]["sampling"] = {"max_new_tokens": 8}
    with Store("runs/prefloop.db") as store:
        run = Run(parse_settings(RunSettings, settings, "test"), store)
        run_loop(run)
        assert run.found(0, "train")["steps"] > 0
        assert max(metrics["kl"] for metrics in kept_metrics(run)) > 0


@pytest.mark.slow
def test_metrics_go_where_the_run_file_says(update, monkeypatch):
    pytest.importorskip("tensorboard")
    run = update(train__report_to=["tensorboard"])
    (file,) = (run.directory / "tensorboard" / "001-train").iterdir()
    assert file.stat().st_size > 0
    from prefloop.training import writers

    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    with pytest.raises(PrefloopError, match=r"pip install 'prefloop\[tensorboard\]'"):
        run.check()  # as the loop does before its first rollout
