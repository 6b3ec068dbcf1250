"""Held-out rows: evaluated without learning from them, early stopping, and a reference that follows the policy."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from packed_examples import random_demonstrations, random_pairs, tiny_model
from prefloop.config import parse_settings
from prefloop.records import PrefloopError
from prefloop.training import trainer
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import with_reference
from prefloop.training.metrics import BETTER, is_better
from prefloop.training.reference import following
from prefloop.training.settings import TrainingSettings
from prefloop.training.step import StepSettings, TrainingStep
from prefloop.training.trainer import TrainingDivergedError, train

PLAIN = {"learning_rate": 3e-3, "batch_size": 4, "num_epochs": 3, "checkpoint_every": 2, "evaluate_every": 2}


class StoppedError(BaseException):
    """As a kill: nothing between it and the test handles it."""


def small_model():
    return tiny_model(num_hidden_layers=1)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def rows():
    pairs = with_reference(tiny_model(), random_pairs(16))
    return pairs[:10], pairs[10:]


def trained(directory, rows, algorithm=None, *, stop_at=None, model=None, reference=None, watch=(), **knobs):
    """(weights, result) of a training on pairs, which may be stopped after a step."""
    model = model or small_model()
    examples, held_out = rows

    def on_step(step, num_steps, metrics):
        for look in watch:
            look(step, model)
        if step == stop_at:
            raise StoppedError

    options = {"seed": 1, "identity": "a on b", "state_directory": directory, "held_out": held_out, "on_step": on_step}
    settings = TrainingSettings(**{**PLAIN, **knobs})
    try:
        result = train(model, reference, algorithm or make_algorithm("dpo"), examples, settings, **options)
    except StoppedError:
        return None, None
    return weights_of(model), result


# --- evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo", "aot"])
@pytest.mark.parametrize("max_tokens", [60, 16384])
def test_an_evaluation_is_the_loss_of_a_step_and_changes_nothing(name, max_tokens, rows):
    examples = random_demonstrations(9) if name == "sft" else rows[0]
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = TrainingStep(model, None, make_algorithm(name), optimizer, StepSettings(max_tokens=max_tokens))
    before = weights_of(model)
    found = step.evaluate(examples)
    assert same_bits(weights_of(model), before)
    assert all(p.grad is None for p in model.parameters())
    taken = step(examples)
    assert found == pytest.approx({key: taken[key] for key in found}, rel=1e-5, abs=1e-7)
    assert set(taken) - set(found) == {"grad_norm", "skipped"}


def test_evaluations_are_made_when_due_and_at_the_end(tmp_path, rows):
    _, result = trained(tmp_path / "plain", rows, evaluate_every=4)
    assert [one.step for one in result.evaluations] == [4, 8, 9]
    _, end = trained(tmp_path / "end", rows, evaluate_every=None)
    assert [one.step for one in end.evaluations] == [9]
    assert end.evaluations[0] == result.evaluations[-1]
    _, none = trained(tmp_path / "none", (rows[0], []), evaluate_every=None)
    assert (none.evaluations, none.best_step) == ([], None)
    assert none.history == end.history == result.history  # to look changes nothing


def test_an_evaluation_in_training_is_that_of_the_weights_then(tmp_path, rows):
    seen = {}

    def look(number, model):
        fresh = copy.deepcopy(model)
        step = TrainingStep(fresh, None, make_algorithm("dpo"), torch.optim.AdamW(fresh.parameters()), StepSettings())
        seen[number] = step.evaluate(rows[1])

    _, result = trained(tmp_path, rows, watch=[look])
    assert [one.step for one in result.evaluations] == [2, 4, 6, 8, 9]
    for one in result.evaluations:
        assert one.metrics == seen[one.step]
    losses = [one.metrics["loss"] for one in result.evaluations]
    assert result.best_step == result.evaluations[losses.index(min(losses))].step


def test_writers_are_given_steps_and_evaluations_together_and_all_again_after_a_kill(tmp_path, rows):
    class Recorder:
        def __init__(self):
            self.seen = []

        def write(self, step, metrics):
            self.seen.append((step, metrics))

    def run(directory, stop_at=None):
        recorder, model = Recorder(), small_model()

        def on_step(step, num_steps, metrics):
            if step == stop_at:
                raise StoppedError

        try:
            result = train(
                model, None, make_algorithm("dpo"), rows[0], TrainingSettings(**PLAIN), seed=1, identity="",
                state_directory=directory, held_out=rows[1], writers=[recorder], on_step=on_step,
            )  # fmt: skip
        except StoppedError:
            result = None
        return recorder.seen, result

    seen, result = run(tmp_path / "whole")
    assert [step for step, _ in seen] == list(range(1, 10))
    evaluated = {one.step: one.metrics for one in result.evaluations}
    for (step, metrics), history in zip(seen, result.history, strict=True):
        assert metrics == {**history, **{f"eval/{name}": value for name, value in evaluated.get(step, {}).items()}}
    assert [step for step, _ in run(tmp_path / "killed", stop_at=6)[0]] == [1, 2, 3, 4, 5]
    assert run(tmp_path / "killed")[0] == seen


# --- early stopping -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoiled(rows):
    """Pairs to learn from whose preferences are those of the held-out rows turned round: learning makes them worse."""
    turned = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen, ref_logprob=pair.ref_logprob[::-1])
        for pair in rows[1]
    ]
    return turned, rows[1]


def test_patience_ends_a_training_that_gets_worse_with_the_best_weights(tmp_path, spoiled):
    kept = {}
    watch = [lambda step, model: kept.setdefault(step, weights_of(model))]
    weights, result = trained(tmp_path, spoiled, num_steps=40, patience=3, evaluate_every=1, watch=watch)
    losses = [one.metrics["loss"] for one in result.evaluations]
    assert result.stopped_early and len(result.history) == result.best_step + 3 < 40
    assert result.best_step == 1 + losses.index(min(losses))
    assert same_bits(weights, kept[result.best_step])
    assert not same_bits(weights, kept[len(result.history)])


def test_without_patience_the_last_weights_stay(tmp_path, spoiled):
    kept = {}
    watch = [lambda step, model: kept.update({step: weights_of(model)})]
    weights, result = trained(tmp_path, spoiled, num_steps=6, evaluate_every=1, watch=watch)
    assert result.best_step < 6 and not result.stopped_early
    assert same_bits(weights, kept[6])


def test_the_best_weights_are_taken_when_patience_does_not_end(tmp_path, spoiled):
    kept = {}
    watch = [lambda step, model: kept.update({step: weights_of(model)})]
    weights, result = trained(tmp_path, spoiled, num_steps=6, patience=50, evaluate_every=1, watch=watch)
    assert not result.stopped_early and len(result.history) == 6
    assert same_bits(weights, kept[result.best_step])


def test_another_metric_tells_the_best_weights(tmp_path, spoiled):
    _, result = trained(tmp_path, spoiled, num_steps=8, early_stopping_metric="rewards/margins", evaluate_every=1)
    margins = [one.metrics["rewards/margins"] for one in result.evaluations]
    assert result.best_step == 1 + margins.index(max(margins))


@pytest.mark.parametrize("kind", ["patience", "sync"])
def test_stopped_after_each_step_it_ends_with_the_same_bits(tmp_path, spoiled, kind):
    rows = spoiled
    knobs = {"num_steps": 9, "evaluate_every": 1, "patience": 3}
    if kind == "sync":
        rows = tuple([replace(pair, ref_logprob=()) for pair in part] for part in spoiled)
        knobs = {"num_steps": 7, "sync_reference_every": 3, "sync_reference_mixup": 0.5}

    def reference():
        return following(small_model()) if kind == "sync" else None

    weights, result = trained(tmp_path / "whole", rows, reference=reference(), **knobs)
    for stop in (1, len(result.history) - 1):
        assert trained(tmp_path / str(stop), rows, stop_at=stop, reference=reference(), **knobs) == (None, None)
        again, result_again = trained(tmp_path / str(stop), rows, reference=reference(), **knobs)
        assert result_again == result
        assert same_bits(again, weights)


def test_how_metrics_compare():
    assert is_better("loss", 1.0, None) and is_better("loss", 1.0, 2.0)
    assert not is_better("loss", 2.0, 2.0) and not is_better("loss", math.nan, None)
    assert is_better("rewards/accuracies", 0.6, 0.5) and not is_better("rewards/accuracies", 0.5, 0.6)
    assert set(BETTER.values()) == {"lower", "higher"}


def test_what_cannot_be_evaluated_is_said(tmp_path, rows):
    with pytest.raises(PrefloopError, match="evaluate_every: no rows are held out; set held_out"):
        trained(tmp_path, (rows[0], []))
    with pytest.raises(
        PrefloopError, match=r"early_stopping_metric: dpo has no 'accuracy'; it has .*rewards/accuracies"
    ):
        trained(tmp_path, rows, early_stopping_metric="accuracy")
    with pytest.raises(PrefloopError, match=r"early_stopping_metric.*, not 'los'"):
        parse_settings(TrainingSettings, {"learning_rate": 1.0, "early_stopping_metric": "los"}, "test")
    with pytest.raises(
        PrefloopError, match=r"^test: patience needs evaluate_every: how many steps lie between two evaluations$"
    ):
        parse_settings(TrainingSettings, {"learning_rate": 1.0, "patience": 2}, "test")


def test_an_evaluation_that_is_not_finite_is_never_the_best(tmp_path, rows, monkeypatch):
    original, count = TrainingStep.evaluate, iter(range(100))

    def sometimes(self, examples, seed):
        found = original(self, examples, seed=seed)
        return {**found, "loss": math.nan} if next(count) in (0, 2) else found

    monkeypatch.setattr(TrainingStep, "evaluate", sometimes)
    _, result = trained(tmp_path, rows, num_steps=6)
    assert ["loss" in one.metrics for one in result.evaluations] == [False, True, False]
    assert result.best_step == 4


def broken(*, at):
    """A look that breaks a weight after a step."""

    def look(number, model):
        if number == at:
            model.get_input_embeddings().weight.data.fill_(math.inf)

    return look


def test_a_held_out_metric_that_is_not_finite_is_told_of_at_once(tmp_path, rows, caplog):
    knobs = {"num_steps": 4, "max_skipped": 9, "early_stopping_metric": "rewards/margins", "watch": [broken(at=3)]}
    _, result = trained(tmp_path / "plain", rows, **knobs)
    told = [f"step 4: {name} of the held-out rows is nan" for name in ("loss", "rewards/margins", "update_kl")]
    assert result.warnings == told
    assert "step 4: loss of the held-out rows is nan" in [record.getMessage() for record in caplog.records]
    assert "loss" in result.evaluations[0].metrics and "loss" not in result.evaluations[1].metrics


def test_early_stopping_by_a_metric_that_is_not_finite_is_an_error(tmp_path, rows):
    for name in ("loss", "rewards/accuracies"):
        knobs = {"num_steps": 9, "max_skipped": 9, "patience": 3, "early_stopping_metric": name}
        with pytest.raises(TrainingDivergedError, match=f"^step 4: {name} of the held-out rows is nan, and early stop"):
            trained(tmp_path / name, rows, watch=[broken(at=3)], **knobs)


# --- a reference that follows -------------------------------------------------------------------------------------


def test_the_reference_follows_when_due(tmp_path, rows):
    plain = [replace(pair, ref_logprob=()) for pair in rows[0]]
    reference, seen = following(small_model()), {}
    start = weights_of(reference)

    def look(step, model):
        seen[step] = (weights_of(model), weights_of(reference))

    knobs = {"evaluate_every": None, "sync_reference_every": 3, "sync_reference_mixup": 0.25, "num_steps": 7}
    trained(tmp_path, (plain, []), reference=reference, watch=[look], **knobs)
    assert same_bits(seen[3][1], start)  # told before it follows
    expected = {name: 0.25 * seen[3][0][name] + 0.75 * start[name] for name in start}
    for step in (4, 5, 6):
        for name, weight in seen[step][1].items():
            torch.testing.assert_close(weight, expected[name])
    assert not same_bits(seen[7][1], seen[6][1])


def test_a_reference_that_cannot_follow_is_refused(tmp_path, rows):
    plain = [replace(pair, ref_logprob=()) for pair in rows[0]]
    knobs = {"sync_reference_every": 1, "evaluate_every": None}
    must_be_there = "must be there itself, its log-probs cannot be computed before"
    with pytest.raises(PrefloopError, match=must_be_there):
        trained(tmp_path, (plain, []), **knobs)
    with pytest.raises(PrefloopError, match=must_be_there):
        trained(tmp_path, (rows[0], []), reference=small_model(), **knobs)
    with pytest.raises(PrefloopError, match="simpo has no reference that could follow the policy"):
        trained(tmp_path, (plain, []), make_algorithm("simpo"), reference=small_model(), **knobs)


# --- precision and memory -----------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_weights_and_is_switched_off_again(tmp_path, rows):
    weights, plain = trained(tmp_path / "plain", rows, num_steps=3)
    model, seen = small_model(), []
    watch = [lambda step, now: seen.append(now.is_gradient_checkpointing)]
    other, result = trained(tmp_path / "less", rows, model=model, num_steps=3, gradient_checkpointing=True, watch=watch)
    assert seen == [True] * 3 and not model.is_gradient_checkpointing
    assert [one["loss"] for one in result.history] == pytest.approx([one["loss"] for one in plain.history], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_of_the_arithmetic_and_not_of_the_weights(tmp_path, rows):
    _, plain = trained(tmp_path / "plain", rows, num_steps=3)
    other, result = trained(tmp_path / "bfloat16", rows, num_steps=3, precision="bfloat16")
    assert all(weight.dtype == torch.float32 for weight in other.values())
    losses = [[one["loss"] for one in some.history] for some in (plain, result)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_the_bound_on_skipped_steps_is_the_settings(tmp_path, rows):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight *= math.nan
    with pytest.raises(trainer.TrainingDivergedError, match="1 steps in a row were not finite"):
        trained(tmp_path, rows, model=model, max_skipped=0)
