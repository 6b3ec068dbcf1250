"""Schedules, the order of examples, and training that goes on bit for bit where it was stopped."""

from __future__ import annotations

import copy
import json
import math
import os

import numpy as np
import pytest
import torch

from packed_examples import random_demonstrations, random_pairs, tiny_model
from prefloop.records import PrefloopError
from prefloop.training import trainer
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import with_reference
from prefloop.training.settings import TrainingSettings, count_steps
from prefloop.training.state import CARRIED, Carried
from prefloop.training.step import TrainingStep
from prefloop.training.trainer import batch_at, learning_rate_at, train

SETTINGS = TrainingSettings(
    learning_rate=3e-3, batch_size=4, num_epochs=3, schedule="cosine", warmup_steps=2, weight_decay=0.1,
    checkpoint_every=2,
)  # fmt: skip


class StoppedError(BaseException):
    """As a kill: nothing between it and the test handles it."""


def small_model():
    return tiny_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def examples():
    """Ten pairs make three steps an epoch, the last of them of two pairs."""
    pairs = random_pairs(10)
    return {
        "sft": (make_algorithm("sft"), random_demonstrations(10)),
        "dpo": (make_algorithm("dpo", nll_coef=0.2), with_reference(tiny_model(), pairs)),
    }


def trained(
    directory, algorithm, rows, settings=SETTINGS, *, seed=1, identity="a on b", stop_at=None, model=None, carried=None
):
    """(weights, metrics, steps done in this go) of a training, which may be stopped after a step."""
    done = []

    def on_step(step, num_steps, metrics):
        done.append(step)
        if step == stop_at:
            raise StoppedError

    model = model or small_model()
    try:
        result = train(
            model, None, algorithm, rows, settings,
            seed=seed, identity=identity, state_directory=directory, carried=carried, on_step=on_step,
        )  # fmt: skip
        history = result.history
    except StoppedError:
        history = None
    return {name: p.detach().clone() for name, p in model.named_parameters()}, history, done


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_stopped_after_each_step_it_ends_with_the_same_bits(tmp_path, examples, kind):
    algorithm, rows = examples[kind]
    weights, history, done = trained(tmp_path / "whole", algorithm, rows)
    assert done == list(range(1, 10))
    for stop in range(1, 9):
        _, stopped, before = trained(tmp_path / str(stop), algorithm, rows, stop_at=stop)
        assert stopped is None and before == list(range(1, stop + 1))
        again, history_again, after = trained(tmp_path / str(stop), algorithm, rows)
        # A state is saved after the steps 2, 4, … have been told of: what was stopped at one has not saved it.
        first = (stop - 1) // 2 * 2 + 1
        assert after == list(range(first, 10))
        assert history_again == history
        assert same_bits(again, weights)


def test_stopped_again_while_going_on(tmp_path, examples):
    algorithm, rows = examples["dpo"]
    weights, history, _ = trained(tmp_path / "whole", algorithm, rows)
    steps = [trained(tmp_path / "often", algorithm, rows, stop_at=stop)[2] for stop in (3, 3, 5, 6, 8)]
    assert steps == [[1, 2, 3], [3], [3, 4, 5], [5, 6], [5, 6, 7, 8]]
    again, history_again, _ = trained(tmp_path / "often", algorithm, rows)
    assert history_again == history
    assert same_bits(again, weights)


def test_the_moments_of_one_training_are_those_that_the_next_begins_with(tmp_path, examples):
    """Two trainings are one AdamW over all of their steps, whether or not the second is stopped on its way."""
    algorithm, rows = examples["sft"]
    settings = SETTINGS.model_copy(update={"schedule": "constant", "warmup_steps": 0, "num_epochs": 1})
    parts = rows[:5], rows[5:]

    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    step = TrainingStep(model, None, algorithm, optimizer)
    for part in parts:
        for index in range(2):
            step([part[i] for i in batch_at(index, 5, 4, 1)])
    expected = dict(model.named_parameters())

    first = small_model()
    trained(tmp_path / "one", algorithm, parts[0], settings, model=first, carried=Carried(None, tmp_path / "left"))
    for stop_at in (None, 1):
        second, saving = copy.deepcopy(first), settings.model_copy(update={"checkpoint_every": 1})
        options = {"identity": f"stopped at {stop_at}", "carried": Carried(tmp_path / "left", None)}
        if stop_at is not None:
            trained(tmp_path / "two", algorithm, parts[1], saving, model=copy.deepcopy(first), stop_at=2, **options)
        weights, _, done = trained(tmp_path / "two", algorithm, parts[1], saving, model=second, **options)
        assert done == ([1, 2] if stop_at is None else [2]) and same_bits(weights, expected)
    fresh, *_ = trained(tmp_path / "three", algorithm, parts[1], settings, model=copy.deepcopy(first))
    assert not same_bits(fresh, expected)


def test_damaged_moments_are_not_begun_with(tmp_path, examples):
    algorithm, rows = examples["sft"]
    trained(tmp_path / "one", algorithm, rows, carried=Carried(None, tmp_path / "left"))
    damaged = tmp_path / "left" / CARRIED
    damaged.write_bytes(damaged.read_bytes()[:-10])
    options = {"seed": 1, "identity": "", "state_directory": tmp_path / "two"}
    model = small_model()
    result = train(model, None, algorithm, rows, SETTINGS, carried=Carried(tmp_path / "left", None), **options)
    assert (
        f"the optimizer begins anew, without the moments of the training before: {tmp_path / 'left'}: file "
        in (result.warnings[0])
    )
    fresh, history, _ = trained(tmp_path / "three", algorithm, rows, SETTINGS)
    assert same_bits(dict(model.named_parameters()), fresh) and result.history == history


def test_a_damaged_state_is_left_for_the_one_before(tmp_path, examples, caplog):
    algorithm, rows = examples["sft"]
    weights, _, _ = trained(tmp_path / "whole", algorithm, rows)
    trained(tmp_path / "states", algorithm, rows, stop_at=7)
    (newest,) = (tmp_path / "states").glob("*/step-00000006")
    os.truncate(newest / "state.safetensors", 1000)
    again, _, done = trained(tmp_path / "states", algorithm, rows)
    assert done == [5, 6, 7, 8, 9]
    assert "state.safetensors is damaged; it is set aside as bad-step-00000006" in caplog.text
    assert same_bits(again, weights)


def test_only_the_last_two_states_are_kept(tmp_path, examples):
    algorithm, rows = examples["sft"]
    trained(tmp_path, algorithm, rows)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["step-00000006", "step-00000008"]


CHANGES = {
    "learning-rate": {"settings": SETTINGS.model_copy(update={"learning_rate": 1e-3})},
    "beta": {"settings": SETTINGS.model_copy(update={"adam_beta2": 0.9})},
    "batch-size": {"settings": SETTINGS.model_copy(update={"batch_size": 5})},
    "seed": {"seed": 2},
    "identity": {"identity": "a on c"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_state_of_another_training_is_not_used(tmp_path, examples, change):
    algorithm, rows = examples["sft"]
    trained(tmp_path / "states", algorithm, rows, stop_at=7)
    expected, _, _ = trained(tmp_path / "fresh", algorithm, rows, **change)
    weights, _, done = trained(tmp_path / "states", algorithm, rows, **change)
    assert done[0] == 1
    assert same_bits(weights, expected)
    _, _, done = trained(tmp_path / "states", algorithm, rows)
    assert done == [7, 8, 9]  # and its own is still there


def test_the_state_of_another_algorithm_is_not_used(tmp_path, examples):
    algorithm, rows = examples["dpo"]
    trained(tmp_path, algorithm, rows, stop_at=7)
    assert trained(tmp_path, make_algorithm("dpo", beta=0.3), rows, stop_at=1)[2] == [1]
    assert trained(tmp_path, algorithm, rows)[2][0] == 7


def test_the_state_of_another_thread_count_or_version_is_not_used(tmp_path, examples, monkeypatch):
    algorithm, rows = examples["sft"]
    trained(tmp_path, algorithm, rows, stop_at=7)
    for name in ("num_threads", "torch", "capability"):
        found = trainer.environment_fingerprint()
        monkeypatch.setattr(trainer, "environment_fingerprint", lambda f=found, n=name: {**f, n: "another"})
        assert trained(tmp_path, algorithm, rows, stop_at=1)[2] == [1]
        monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert trained(tmp_path, algorithm, rows, stop_at=1)[2] == [1]
    finally:
        torch.set_num_threads(threads)
    assert trained(tmp_path, algorithm, rows, stop_at=7)[2] == [7]


def test_a_frozen_parameter_is_neither_trained_nor_saved(tmp_path, examples):
    algorithm, rows = examples["sft"]

    def frozen():
        model = small_model()
        model.model.embed_tokens.requires_grad_(False)
        return model

    before = frozen().model.embed_tokens.weight
    whole, _, _ = trained(tmp_path / "whole", algorithm, rows, model=frozen())
    trained(tmp_path / "states", algorithm, rows, model=frozen(), stop_at=7)
    again, _, done = trained(tmp_path / "states", algorithm, rows, model=frozen())
    assert done == [7, 8, 9]
    assert torch.equal(again["model.embed_tokens.weight"], before)
    assert same_bits(again, whole)


# --- steps that are not finite ------------------------------------------------------------------------------------


def broken(steps):
    """A model whose loss is not finite in some of its forward passes with a gradient."""
    model, count = small_model(), iter(range(100))

    def break_some(module, args, output):
        return output * math.nan if torch.is_grad_enabled() and next(count) in steps else output

    model.model.layers[0].mlp.up_proj.register_forward_hook(break_some)
    return model


def test_a_skipped_step_is_in_the_history_and_changes_no_weight(tmp_path, examples):
    algorithm, rows = examples["sft"]
    weights, history, _ = trained(tmp_path, algorithm, rows, model=broken({2, 5}))
    assert [metrics["skipped"] for metrics in history] == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert history[2].keys() == {"skipped", "learning_rate"}  # a loss that is none is no number
    assert all(value.isfinite().all() for value in weights.values())


def test_state_saved_when_no_step_was_taken_yet_can_be_gone_on_from(tmp_path, examples):
    algorithm, rows = examples["sft"]
    expected, history, _ = trained(tmp_path / "whole", algorithm, rows, model=broken({0, 1}))
    trained(tmp_path / "states", algorithm, rows, model=broken({0, 1}), stop_at=3)
    (saved,) = tmp_path.glob("states/*/step-00000002/state.json")
    state = json.loads(saved.read_text())
    assert [metrics["skipped"] for metrics in state["history"]] == [1.0, 1.0]
    assert [skipped["step"] for skipped in state["skipped"]] == [1, 2]
    weights, history_again, done = trained(tmp_path / "states", algorithm, rows)
    assert done[0] == 3
    assert history_again == history
    assert same_bits(weights, expected)


def test_a_loss_that_stays_not_finite_ends_the_training(tmp_path, examples):
    algorithm, rows = examples["sft"]
    with pytest.raises(trainer.TrainingDivergedError, match=r"4 steps in a row .* lower the learning rate") as caught:
        trained(tmp_path, algorithm, rows, model=broken(range(1, 100)))
    for saved in tmp_path.glob("*/*/state.json"):
        assert not any("loss" in metrics for metrics in json.loads(saved.read_text())["history"][1:])
    (dumped,) = tmp_path.glob("*/skipped.jsonl")
    lines = [json.loads(line) for line in dumped.read_text().splitlines()]
    for index, (line, kept) in enumerate(zip(lines, caught.value.result.skipped, strict=True), start=1):
        named = [rows[i].name for i in batch_at(index, 10, 4, seed=1)]
        assert line == {"step": index + 1, "loss": "nan", "grad_norm": "nan", "rows": named}
        assert (kept.step, list(kept.rows)) == (index + 1, named)
    assert len(lines) == 4
    assert str(dumped) in str(caught.value)
    assert len(caught.value.result.history) == 4  # one good step and the first three that were skipped


def test_no_examples(tmp_path):
    with pytest.raises(PrefloopError, match="sft: there are no examples to train on"):
        trained(tmp_path, make_algorithm("sft"), [])


# --- schedules and order ------------------------------------------------------------------------------------------


def rates(schedule, num_steps, warmup_steps=0):
    settings = TrainingSettings(learning_rate=8.0, schedule=schedule, warmup_steps=warmup_steps)
    return [learning_rate_at(settings, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("schedule", "num_steps", "warmup_steps", "expected"),
    [
        ("constant", 3, 0, [8, 8, 8]),
        ("constant", 4, 2, [4, 8, 8, 8]),
        ("linear", 4, 0, [8, 6, 4, 2]),
        ("linear", 6, 2, [4, 8, 8, 6, 4, 2]),
        ("cosine", 4, 0, [8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]),
        ("cosine", 3, 1, [8, 8, 4]),
        ("linear", 2, 4, [2, 4]),
        ("cosine", 1, 0, [8]),
        ("linear", 1, 1, [8]),
    ],
)
def test_learning_rates_by_hand(schedule, num_steps, warmup_steps, expected):
    assert rates(schedule, num_steps, warmup_steps) == pytest.approx(expected)


def test_the_optimizer_is_given_the_rate_of_the_schedule(tmp_path, examples):
    algorithm, rows = examples["sft"]
    settings = TrainingSettings(learning_rate=1.0, schedule="linear", batch_size=5, num_epochs=2, adam_beta1=0.0,
                                adam_beta2=0.0, max_grad_norm=1e9)  # fmt: skip
    weights, moved = None, []

    def on_step(step, num_steps, metrics):
        nonlocal weights
        now = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        moved.append(float((now - weights).abs().median()))
        weights = now

    model = small_model()
    weights = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    train(model, None, algorithm, rows, settings, seed=0, identity="", state_directory=tmp_path, on_step=on_step)
    # Without momentum Adam moves each weight by the learning rate.
    assert moved == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-3)


def test_the_number_of_steps():
    assert count_steps(TrainingSettings(learning_rate=1, batch_size=4, num_epochs=3), 10) == 9
    assert count_steps(TrainingSettings(learning_rate=1, batch_size=4, num_epochs=3), 12) == 9
    assert count_steps(TrainingSettings(learning_rate=1, batch_size=400), 1) == 1
    assert count_steps(TrainingSettings(learning_rate=1, batch_size=4, num_epochs=3, num_steps=7), 10) == 7


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 4), (12, 4), (1, 8), (7, 7), (5, 1)])
def test_each_epoch_has_each_example_once(num_examples, batch_size):
    per_epoch = math.ceil(num_examples / batch_size)
    orders = []
    for epoch in range(4):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        order = np.concatenate([batch_at(step, num_examples, batch_size, seed=5) for step in steps])
        assert sorted(order) == list(range(num_examples))
        orders.append(tuple(order))
    if num_examples > 4:
        assert len(set(orders)) == 4  # each in another order
        other = [batch_at(step, num_examples, batch_size, seed=6) for step in range(per_epoch)]
        assert tuple(np.concatenate(other)) != orders[0]
    assert batch_at(3, num_examples, batch_size, 5).tolist() == batch_at(3, num_examples, batch_size, 5).tolist()
