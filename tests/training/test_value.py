"""A critic over the forest against the same written out on plain padded sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from packed_examples import agent_paths, gradient, padded, path, perturbed, relative_error, tiny_model
from prefloop.batch.examples import RolloutGroup
from prefloop.batch.packed import pack
from prefloop.models.forward import forward
from prefloop.training.logprobs import values_of
from prefloop.training.step import StepSettings, TrainingStep
from prefloop.training.value import Value


def critic(dtype=torch.float64):
    return tiny_model(dtype=dtype, head="scores", num_labels=1)


def groups_of(seed=0):
    """Replies to one prompt, and agents' runs of one and of several contexts, with random returns."""
    rng, runs = np.random.default_rng(seed), agent_paths(6, seed)
    tokens = rng.integers(3, 61, 9).tolist()
    replies = [path(tokens + rng.integers(3, 61, n).tolist(), 9) for n in (1, 4, 6)]
    samples = [[(one,) for one in replies], [(runs[0], runs[1]), (runs[2],)], [(runs[3],), (runs[4], runs[5])]]
    return [
        RolloutGroup(
            tuple(group),
            (),
            ret=tuple(rng.normal(size=len(one.token)) * one.loss_mask for sample in group for one in sample),
            weight=weight,
            name=f"task {weight}",
        )
        for group, weight in zip(samples, (1.0, 2.0, 0.5), strict=True)
    ]


def plain_values(model, paths):
    """What the head says at each token of each path, from plain padded rows."""
    ids, mask = padded(paths)
    scores = model(input_ids=ids, attention_mask=mask).logits[..., 0]
    return [scores[i, : len(one.token)] for i, one in enumerate(paths)]


def paths_of(groups):
    return [one for group in groups for sample in group.samples for one in sample]


@pytest.mark.parametrize("max_tokens", [10_000, 14])
def test_values_stand_before_and_after_each_own_token(max_tokens):
    model, groups = critic(), groups_of()
    found = values_of(model, groups, max_tokens=max_tokens)
    paths, plain = paths_of(groups), plain_values(model, paths_of(groups))
    both = [pair for one in found for pair in zip(one.before, one.after, strict=True)]
    for one, expected, (before, after) in zip(paths, plain, both, strict=True):
        own, value = np.flatnonzero(one.loss_mask), expected.detach().numpy()
        np.testing.assert_allclose(before[own], value[own - 1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(after[own], value[own], rtol=1e-9, atol=1e-12)
        assert not before[~one.loss_mask].any() and not after[~one.loss_mask].any()


@pytest.mark.parametrize("clip", [0.05, math.inf])
@pytest.mark.parametrize("max_tokens", [10_000, 14])
def test_loss_and_gradient_are_those_of_padded_rows_however_they_are_cut(clip, max_tokens):
    model, groups = critic(), groups_of()
    old = values_of(perturbed(model), groups)
    groups = [replace(group, old_value=one.before) for group, one in zip(groups, old, strict=True)]
    step = TrainingStep(
        model, None, Value(clip, 2.0), torch.optim.SGD(model.parameters(), lr=0.1), StepSettings(max_tokens=max_tokens)
    )
    metrics, ours = step.gradient(groups), gradient(model)
    model.zero_grad()
    losses, weights, errors, clipped = [], [], [], []
    arrays = zip(
        paths_of(groups),
        plain_values(model, paths_of(groups)),
        (array for group in groups for array in group.ret),
        (array for group in groups for array in group.old_value),
        strict=True,
    )
    weight = iter([group.weight for group in groups for sample in group.samples for _ in sample])
    for one, values, ret, old_value in arrays:
        own = torch.from_numpy(np.flatnonzero(one.loss_mask))
        value, target, before = values[own - 1], torch.from_numpy(ret)[own], torch.from_numpy(old_value)[own]
        free, held = (value - target) ** 2, (before + (value - before).clamp(-clip, clip) - target) ** 2
        losses.append(torch.maximum(free, held) / 2)
        weights.append(torch.full_like(target, next(weight)))
        errors.append(free)
        clipped.append((held > free).double())
    loss, weight, error, hit = (torch.cat(each) for each in (losses, weights, errors, clipped))
    weight = weight / weight.sum()
    expected = (loss * weight).sum()
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(ours, gradient(model)) < 1e-6
    assert metrics["value_loss"] == pytest.approx((error * weight).sum().item() / 2)
    assert metrics["explained_variance"] == pytest.approx(1 - (error * weight).sum().item() / 2.0)
    assert metrics["value_clip_ratio"] == pytest.approx((hit * weight).sum().item())
    assert (metrics["value_clip_ratio"] > 0) == (clip < 1)


def test_shared_prefixes_are_computed_once():
    batch = pack(groups_of())
    outputs = forward(critic(), batch, {"value", "score"})
    assert outputs.value_T.shape == (batch.num_tokens,) and batch.num_tokens < len(batch.visit_token_V)
    assert outputs.score_TH.shape == (batch.num_tokens, 1) and outputs.logprob_T is None
    alone = forward(critic(), batch, {"value"})
    torch.testing.assert_close(alone.value_T, outputs.value_T)
    assert alone.score_TH is None
