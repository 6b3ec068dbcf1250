"""The warning that chosen completions fall: when, what it says, and in a real training."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from packed_examples import path, random_tokens, tiny_model
from prefloop.batch.examples import PreferencePair
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import with_reference
from prefloop.training.metrics import LAST_STEPS
from prefloop.training.settings import TrainingSettings
from prefloop.training.trainer import train
from prefloop.training.watch import MAX_FALL, falling_chosen


def history(chosen, rejected, logps=None):
    """Steps with these rewards and log-probs of chosen."""
    logps = chosen if logps is None else logps
    return [
        {"rewards/chosen": c, "rewards/rejected": r, "logps/chosen": p, "loss": 1.0}
        for c, r, p in zip(chosen, rejected, logps, strict=True)
    ]


def line(end, num=3 * LAST_STEPS, start=0.0):
    return np.linspace(start, end, num).tolist()


def fall_of(warning):
    return float(re.search(r"become ([\d.]+) nats less likely", warning)[1])


def test_the_fall_is_that_of_the_log_ratio_over_the_last_steps():
    dpo = make_algorithm("dpo", beta=0.1)
    rewards = line(-1.0)  # log-ratios to -10
    warning = falling_chosen(history(rewards, line(-3.0)), dpo)
    assert fall_of(warning) == pytest.approx(-10 * np.mean(rewards[-LAST_STEPS:]), abs=0.05)
    assert "nll_coef" in warning and "learning_rate" in warning
    assert falling_chosen(history(rewards, line(-3.0)), make_algorithm("dpo", beta=1.0)) is None
    at_the_edge = [-0.1 * MAX_FALL] * 3 * LAST_STEPS
    growing = line(-9.0, start=-1.0)
    assert falling_chosen(history(at_the_edge, growing), dpo) is None
    assert falling_chosen(history([r - 1e-6 for r in at_the_edge], growing), dpo) is not None


def test_margins_must_grow_and_there_must_be_steps_enough():
    dpo = make_algorithm("dpo", beta=0.1)
    assert falling_chosen(history(line(-3.0), line(-1.0)), dpo) is None  # worse than rejected: another trouble
    few = 2 * LAST_STEPS - 1
    assert falling_chosen(history(line(-9.0, few), line(-20.0, few)), dpo) is None
    assert falling_chosen(history(line(-9.0, few + 1), line(-20.0, few + 1)), dpo) is not None
    with_skipped = history(line(-9.0, few + 1), line(-20.0, few + 1))
    with_skipped[3:3] = [{"skipped": 1.0}] * 5
    assert falling_chosen(with_skipped, dpo) is not None
    assert falling_chosen([{"loss": 1.0}] * 40, make_algorithm("sft")) is None


@pytest.mark.parametrize("name", ["simpo", "dpo_norm"])
def test_where_rewards_are_no_log_ratios_log_probs_are_held_against_their_start(name):
    algorithm = make_algorithm(name)
    rewards = line(-0.1), line(-0.4)
    quiet = [-40.0] * LAST_STEPS + [-46.0] * LAST_STEPS
    assert fall_of(falling_chosen(history(*(r[: 2 * LAST_STEPS] for r in rewards), quiet), algorithm)) == 6.0
    little = [-40.0] * LAST_STEPS + [-44.9] * LAST_STEPS
    assert falling_chosen(history(*(r[: 2 * LAST_STEPS] for r in rewards), little), algorithm) is None
    noisy = (np.array(quiet) + np.tile([20.0, -20.0], LAST_STEPS)).tolist()  # 6 nats are then nothing
    assert falling_chosen(history(*(r[: 2 * LAST_STEPS] for r in rewards), noisy), algorithm) is None


def test_objectives_without_that_knob_are_not_told_of_it():
    kto = make_algorithm("kto", beta=0.1)
    warning = falling_chosen(history(line(-1.0), line(-3.0)), kto)
    assert "nll_coef" not in warning and "take smaller steps (learning_rate)" in warning


@torch.no_grad()
def likeliest(model, tokens, num):
    for _ in range(num):
        tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens


def nearly_equal_pairs(num):
    """Sides that differ in their last token; what both say is what the policy likes best, so it can only fall."""
    rng, pairs = np.random.default_rng(0), []
    for i in range(num):
        prompt = random_tokens(rng, 3, 8)
        chosen = likeliest(small_model(), prompt, 8)
        rejected = [*chosen[:-1], (chosen[-1] + 1) % 61]
        sides = ((path(tokens, len(prompt)),) for tokens in (chosen, rejected))
        pairs.append(PreferencePair(*sides, name=f"pair-{i}"))
    return with_reference(small_model(), pairs)


def small_model():
    return tiny_model(num_hidden_layers=1)


def test_a_real_training_warns_once_and_what_it_advises_helps(tmp_path, caplog):
    pairs = nearly_equal_pairs(12)
    settings = TrainingSettings(learning_rate=5e-3, batch_size=4, num_steps=40)

    def trained(**knobs):
        algorithm = make_algorithm("dpo", beta=0.1, **knobs)
        return train(small_model(), None, algorithm, pairs, settings, seed=0, identity="", state_directory=tmp_path)

    result = trained()
    (warning,) = result.warnings
    step = int(re.match(r"step (\d+): chosen completions have become", warning)[1])
    assert step % LAST_STEPS == 0 and step < 40
    assert caplog.text.count("chosen completions have become") == 1
    mean = np.mean([metrics["rewards/chosen"] for metrics in result.history[step - LAST_STEPS : step]]) / 0.1
    assert fall_of(warning) == pytest.approx(-mean, abs=0.05)
    assert falling_chosen(result.history[: step - LAST_STEPS], make_algorithm("dpo", beta=0.1)) is None
    assert result.summary()["warnings"] == [warning]
    with_likelihood = trained(nll_coef=1.0)
    assert with_likelihood.warnings == []
    assert with_likelihood.history[-1]["rewards/chosen"] > 0 > result.history[-1]["rewards/chosen"]
