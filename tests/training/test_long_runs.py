"""Runs of 32,000 tokens: memory is that of the budget, whatever the number of paths; of one path little grows."""

import numpy as np
import pytest
import torch

from packed_examples import gradient, of_sources, relative_error, tiny_model
from prefloop.batch.examples import Demonstration
from prefloop.models import forward, sparing
from prefloop.records import Source
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import StepSettings, TrainingStep

BUDGET = 4096
WORDS = 61
LAYERS, HIDDEN, FEED_FORWARD, QUERIES, KEYS = 2, 32, 256, 32, 16
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1 << 16,
}
KEPT = 4 * LAYERS * (8 * HIDDEN + 4 * QUERIES + 3 * KEYS + 4 * FEED_FORWARD)
"""Bytes that a forward keeps for the backward pass of each token, as `prefloop.batch.packing` says."""


def run_of_many_paths(num_turns, rng, reasoning=960, staying=48):
    """Each turn is a path: what stays of those before, reasoning that is dropped after it, and an answer."""
    stays, paths = rng.integers(3, WORDS, staying).tolist(), []
    for _ in range(num_turns):
        said = rng.integers(3, WORDS, reasoning).tolist()
        paths.append(of_sources([*stays, 2, *said], [Source.PROMPT] * len(stays) + [Source.SAMPLED] * (reasoning + 1)))
        stays += rng.integers(3, WORDS, staying).tolist()
    return tuple(paths)


def run_of_one_path(num_tokens, rng):
    sources = np.where(np.arange(num_tokens) % 1000 < 500, Source.PROMPT, Source.SAMPLED)
    return (of_sources(rng.integers(3, WORDS, num_tokens), sources),)


def peak_bytes(run):
    """The most that was allocated at a time while it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))


def step_on(model, paths, max_tokens):
    model.zero_grad()
    settings = StepSettings(max_tokens, logit_budget=0)
    step = TrainingStep(model, None, make_algorithm("sft"), torch.optim.SGD(model.parameters(), 0.1), settings)
    found = {}
    peak = peak_bytes(lambda: found.update(step.gradient([Demonstration(paths)])))
    return peak, found


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(forward, "SEGMENT_FLOPS", -1.0)  # tiny models would choose rows
    return tiny_model(**SHAPE)


@pytest.mark.slow
def test_a_run_of_many_paths_needs_the_memory_of_the_budget(model):
    rng = np.random.default_rng(0)
    run = run_of_many_paths(32, rng)
    short, _ = step_on(model, run[:8], BUDGET)
    long, metrics = step_on(model, run, BUDGET)
    assert metrics["num_loss_tokens"] == 32 * 961
    distinct = 32 * (961 + 48)
    assert distinct > 32_000
    assert long < 1.1 * short
    assert long < 1.3 * BUDGET * KEPT
    whole, expected = step_on(model, run, 1 << 20)
    assert whole > 0.75 * distinct * KEPT
    assert whole > 4 * long
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_of_one_path_needs_little_more_for_each_token(model):
    """The input of each layer, and about one layer's attention."""
    rng = np.random.default_rng(0)
    short, long = (step_on(model, run_of_one_path(n, rng), BUDGET)[0] for n in (6_000, 16_000))
    assert (long - short) / 10_000 < 1.1 * 4 * (LAYERS * HIDDEN + 5 * HIDDEN + 3 * QUERIES + 3 * KEYS + 85)
    assert long < 0.3 * 16_000 * KEPT


def test_little_memory_changes_no_gradient(model, monkeypatch):
    """In float32, over several chunks; `tests/parity` has it exactly, for every objective."""
    monkeypatch.setattr(sparing, "CHUNK_TOKENS", 500)
    run = run_of_one_path(3000, np.random.default_rng(0))
    (spared, _), ours = step_on(model, run, 2999), gradient(model)
    (whole, _), expected = step_on(model, run, 3000), gradient(model)
    assert spared < 0.5 * whole
    assert relative_error(ours, expected) < 1e-5
