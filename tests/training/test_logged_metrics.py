"""What a step logs is what docs/metrics.md says, name by name, both ways."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from packed_examples import random_demonstrations, random_pairs, tiny_model
from prefloop.batch.examples import LabelledSample, RolloutGroup, Step, SteppedSample
from prefloop.losses.registry import OBJECTIVES
from prefloop.losses.settings import LossSettings
from prefloop.training.algorithms import make_algorithm
from prefloop.training.metrics import BETTER, HELD_OUT, telling_metrics
from prefloop.training.settings import TrainingSettings
from prefloop.training.trainer import train
from prefloop.training.value import Value

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented():
    """The metrics of the page's tables, and what logs each."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| `([\w/]+)` \| (.*?) \| (.+) \| (.+?) \|", line)
        if row:
            assert row[1] not in found, f"{row[1]} is documented twice"
            found[row[1]] = [by.strip().strip("`") for by in row[4].split(",")]
    return found


def logs(name, by):
    found = OBJECTIVES[name]
    match by:
        case "all":
            return True
        case "policies":
            return found.of_policy
        case "pairs":
            return found.records == "pairs" and found.of_policy
        case "nll_coef":
            return bool(found.knobs.get("nll_coef"))
        case "rollouts":
            return found.records == "rollouts"
        case "entropy_coef" | "critic":  # no objective's default, and no objective
            return False
    assert by in OBJECTIVES
    return name == by


def rows(name):
    """A step's rows with every kind of metric, both labels among them."""
    demonstrations = random_demonstrations(4)
    match OBJECTIVES[name].records:
        case "pairs":
            return random_pairs(4)
        case "labelled samples":
            return [LabelledSample(one.paths, i % 2 == 0, name=one.name) for i, one in enumerate(demonstrations)]
        case "steps":
            return [SteppedSample(one.paths, (Step(0, len(one.paths[0].token) - 1, 1.0),)) for one in demonstrations]
        case "rollouts":
            return [RolloutGroup((one.paths,), one_for_each_token(one), name=one.name) for one in demonstrations]
    return demonstrations


def one_for_each_token(example):
    return tuple(np.ones(len(path.token)) for path in example.paths)


def scored_model():
    import transformers

    model = tiny_model(num_hidden_layers=1)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    return transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def logged(name, directory, **knobs):
    """The names that a step and its evaluation log."""
    seen = {}

    class Recorder:
        def write(self, step, metrics):
            seen.update(metrics)

    of_policy = name != "critic" and OBJECTIVES[name].of_policy
    model = tiny_model(num_hidden_layers=1) if of_policy else scored_model()
    reference = copy.deepcopy(model) if of_policy and OBJECTIVES[name].reference else None
    examples = rows(name) if name != "critic" else [replace(one, ret=one.advantage) for one in rows("ppo")]
    algorithm = make_algorithm(name, **knobs) if name != "critic" else Value(0.2, variance=1.0)
    settings = TrainingSettings(learning_rate=1e-3, num_steps=1)
    train(
        model, reference, algorithm, examples, settings, seed=0, identity="",
        state_directory=directory, held_out=examples, writers=[Recorder()],
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_logs_what_the_page_says_and_nothing_else(tmp_path, name):
    expected = {metric for metric, by in documented().items() if any(logs(name, one) for one in by)}
    seen = logged(name, tmp_path)
    assert {metric for metric in seen if not metric.startswith(HELD_OUT)} == expected
    held_out = {metric.removeprefix(HELD_OUT) for metric in seen if metric.startswith(HELD_OUT)}
    assert held_out == expected - {"grad_norm", "learning_rate", "skipped"}
    assert set(telling_metrics(name, LossSettings())) == held_out & BETTER.keys()


def test_the_page_knows_nothing_that_nobody_logs():
    by_whom = {by for logged_by in documented().values() for by in logged_by}
    of_preferences = {"pairs", "kto", "reward", "process_reward", "nll_coef"}
    assert by_whom == {"all", "policies", "rollouts", "rloo", "grpo", "ppo", "entropy_coef", "critic"} | of_preferences
    assert BETTER.keys() <= documented().keys()
    text = PAGE.read_text(encoding="utf-8")
    for way in ("lower", "higher"):
        listed = re.search(rf"((?:`[\w/]+`,?\s)+)\(the {way} the better\)", text)[1]
        assert set(re.findall(r"`([\w/]+)`", listed)) == {name for name, better in BETTER.items() if better == way}


def test_a_critic_logs_what_the_page_says(tmp_path):
    expected = {metric for metric, by in documented().items() if {"all", "critic"} & set(by)}
    assert {metric for metric in logged("critic", tmp_path) if not metric.startswith(HELD_OUT)} == expected


def test_the_entropy_is_logged_where_there_is_a_bonus_for_it(tmp_path):
    assert "entropy" in logged("grpo", tmp_path, entropy_coef=0.1)


def test_the_likelihood_is_logged_where_it_is_added(tmp_path):
    assert "nll_loss" in logged("dpo", tmp_path, nll_coef=0.2)


def test_labels_have_the_margins_of_their_means(tmp_path):
    found = logged("kto", tmp_path)
    assert found["rewards/margins"] == found["rewards/chosen"] - found["rewards/rejected"]
    alone = [replace(one, desirable=True) for one in rows("kto")]
    model = tiny_model(num_hidden_layers=1)
    from prefloop.training.step import TrainingStep

    step = TrainingStep(model, copy.deepcopy(model), make_algorithm("kto"), torch.optim.SGD(model.parameters(), lr=0.0))
    assert {"rewards/rejected", "logps/rejected", "rewards/margins"}.isdisjoint(step(alone))
