"""Policy gradients over the forest against the same written out on plain padded sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from packed_examples import VOCAB, agent_paths, gradient, padded_logprobs, path, perturbed, relative_error, tiny_model
from prefloop.batch.examples import RolloutGroup
from prefloop.batch.packed import pack
from prefloop.losses.registry import objective
from prefloop.models.forward import forward
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import logprobs_of, with_reference
from prefloop.training.policy_gradient import PolicyGradient, reads_old_logprobs
from prefloop.training.step import StepSettings, TrainingStep


def algorithm_of(name, temperature=1.0, length_constant=7, **knobs):
    return PolicyGradient(name, {**objective(name).knobs, **knobs}, temperature, length_constant)


def groups_of(seed=0):
    """Groups of different sizes: branching agents' runs, replies to one prompt, and samples of several contexts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, 9).tolist()
    replies = [path(tokens + rng.integers(3, VOCAB, n).tolist(), 9) for n in (1, 4, 6)]
    runs = agent_paths(6, seed)
    samples = [
        ((replies[0],), (replies[1],), (replies[2],)),
        ((runs[0], runs[1]), (runs[2],)),
        ((runs[3],), (runs[4],), (runs[5],)),
    ]
    return [credited(RolloutGroup(tuple(group), (), name=f"task {i}"), rng) for i, group in enumerate(samples)]


def credited(group, rng):
    """Random advantages, and sampled log-probs of a sampler that is a little off."""
    samples = tuple(
        tuple(
            replace(
                one, logprob=np.where(one.loss_mask, rng.normal(-4, 0.3, len(one.token)), np.nan).astype(np.float32)
            )
            for one in sample
        )
        for sample in group.samples
    )
    advantages = [rng.normal() for _ in samples]
    streams = [value * one.loss_mask for value, sample in zip(advantages, samples, strict=True) for one in sample]
    return replace(group, samples=samples, advantage=tuple(streams))


def gradient_of(model, algorithm, groups, reference=None, **settings):
    model.zero_grad()
    step = TrainingStep(
        model, reference, algorithm, torch.optim.SGD(model.parameters(), lr=0.1), StepSettings(**settings)
    )
    metrics = step.gradient(groups)
    return metrics, gradient(model)


def padded(model, groups, algorithm, old_model, reference):
    """The loss on padded rows, from the definitions: a list of samples, each with the streams of its own tokens."""
    knobs, T = algorithm.knobs, algorithm.temperature
    losses, all_tokens = [], []
    for group in groups:
        arrays = iter(group.advantage)
        for sample in group.samples:
            logp, old, ref, sampled, adv, ent = ([] for _ in range(6))
            for one in sample:
                mask = torch.from_numpy(one.loss_mask[1:])
                token = torch.from_numpy(one.token).long()
                rows = [torch.log_softmax(m(token[None]).logits[0, :-1] / T, -1) for m in (model, old_model, reference)]
                for stream, row in zip((logp, old, ref), rows, strict=True):
                    stream.append(row.gather(1, token[1:, None])[mask, 0])
                ent.append(-(rows[0].exp() * rows[0]).sum(-1)[mask])
                sampled.append(torch.from_numpy(one.logprob[1:])[mask])
                adv.append(torch.from_numpy(next(arrays)[1:])[mask])
            logp, old, ref, sampled, adv, ent = (torch.cat(s) for s in (logp, old, ref, sampled, adv, ent))
            old, ref = old.detach(), ref.detach()
            weight = torch.exp(old - sampled)
            if knobs["mismatch"] == "truncate":
                weight = weight.clamp(max=knobs["mismatch_high"])
            elif knobs["mismatch"] == "mask":
                weight = weight * ((weight >= knobs["mismatch_low"]) & (weight <= knobs["mismatch_high"]))
            else:
                weight = torch.ones_like(weight)
            extra = -knobs["entropy_coef"] * ent
            if knobs["kl_coef"] and knobs["kl_as"] == "k2":
                extra = extra + knobs["kl_coef"] * (logp - ref) ** 2 / 2
            if knobs["kl_coef"] and knobs["kl_as"] == "k3":
                extra = extra + knobs["kl_coef"] * torch.exp(logp - old) * (torch.exp(ref - logp) - (ref - logp) - 1)
            if knobs["ratio"] == "none":
                own = -weight * adv * logp + extra
            elif knobs["ratio"] == "token":
                r = torch.exp(logp - old)
                own = (
                    -weight * torch.minimum(r * adv, r.clamp(1 - knobs["clip_low"], 1 + knobs["clip_high"]) * adv)
                    + extra
                )
            else:
                whole = (logp - old).sum() if knobs["ratio"] == "sequence" else (logp - old).mean()
                num = len(logp) if knobs["ratio"] == "sequence" else 1  # each token's share of the sample's gradient
                r = torch.exp(whole.detach() + num * (logp - logp.detach()))
                own = -weight * torch.minimum(r * adv, r.clamp(1 - knobs["clip_low"], 1 + knobs["clip_high"]) * adv)
                losses.append(own.mean() + (extra.sum() if knobs["ratio"] == "sequence" else extra.mean()))
                continue
            all_tokens.append(own)
            losses.append(
                {"sequences": own.mean(), "constant": own.sum() / algorithm.length_constant}.get(
                    knobs["denominator"], own.sum()
                )
            )
    if knobs["denominator"] == "tokens":
        return torch.cat(all_tokens).mean()
    return torch.stack(losses).mean()


CASES = {
    "reinforce": algorithm_of("reinforce"),
    "reinforce, clipped": algorithm_of("reinforce", ratio="token"),
    "reinforce of whole samples": algorithm_of("reinforce", ratio="sequence", clip_low=0.05),
    "rloo": algorithm_of("rloo", clip_high=0.05),
    "rloo, masked": algorithm_of("rloo", clip_high=0.05, mismatch="mask"),
    "grpo": algorithm_of("grpo", clip_low=0.02, clip_high=0.03),
    "dapo": algorithm_of("grpo", denominator="tokens", mismatch="mask"),
    "first grpo with k3": algorithm_of("grpo", denominator="sequences", kl_as="k3", kl_coef=0.3),
    "k2 and entropy": algorithm_of("grpo", kl_as="k2", kl_coef=0.2, entropy_coef=0.1),
    "gspo with k2": algorithm_of(
        "grpo", ratio="sequence_mean", denominator="samples", kl_as="k2", kl_coef=0.1, mismatch="none"
    ),
    "warm": algorithm_of("grpo", temperature=0.7, entropy_coef=0.05),
    "warm rloo with k3": algorithm_of("rloo", temperature=1.4, kl_as="k3", kl_coef=0.1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_tokens", [10_000, 14])
def test_loss_and_gradient_are_those_of_padded_rows_however_they_are_cut(name, max_tokens):
    algorithm, model = CASES[name], tiny_model(dtype=torch.float64)
    old_model, reference = perturbed(model), perturbed(perturbed(model))
    groups = groups_of()
    olds = logprobs_of(old_model, groups, temperature=algorithm.temperature)
    groups = [replace(group, old_logprob=old) for group, old in zip(groups, olds, strict=True)]
    if algorithm.needs_reference:
        groups = with_reference(reference, groups, temperature=algorithm.temperature)
    metrics, ours = gradient_of(model, algorithm, groups, max_tokens=max_tokens)
    model.zero_grad()
    expected = padded(model, groups, algorithm, old_model, reference)
    expected.backward()
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(ours, gradient(model)) < 1e-6
    assert 0 <= metrics.get("clip_ratio", 0.0) <= 1


@pytest.mark.parametrize("mismatch", ["truncate", "mask"])
def test_at_the_first_step_whole_samples_weigh_their_tokens_as_reinforce_does(mismatch):
    """The ratio is 1 and nothing is clipped: a token that is left out has no gradient under either."""
    model, groups, rng = tiny_model(dtype=torch.float64), groups_of(), np.random.default_rng(5)
    streams = [tuple(rng.normal(size=len(array)) * (array != 0) for array in group.advantage) for group in groups]
    groups = [replace(group, advantage=stream) for group, stream in zip(groups, streams, strict=True)]
    knobs = {"mismatch": mismatch, "mismatch_low": 0.9, "mismatch_high": 1.1, "kl_coef": 0.0}
    _, whole = gradient_of(model, algorithm_of("rloo", **knobs), groups)
    _, tokens = gradient_of(model, algorithm_of("reinforce", **knobs), groups)
    assert relative_error(whole, tokens) < 1e-9


def test_without_old_log_probs_the_step_s_own_are_the_old_ones():
    model, groups = tiny_model(dtype=torch.float64), groups_of()
    olds = logprobs_of(model, groups)
    whole = [replace(group, old_logprob=old) for group, old in zip(groups, olds, strict=True)]
    for name in ("rloo", "grpo"):
        (first, ours), (second, theirs) = (gradient_of(model, algorithm_of(name), each) for each in (groups, whole))
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-9)
        assert relative_error(ours, theirs) < 1e-9


def test_the_entropy_has_the_gradient_of_its_definition():
    model = tiny_model(dtype=torch.float64)
    batch = pack(groups_of())
    model.zero_grad()
    outputs = forward(model, batch, {"logprob", "entropy"}, temperature=0.8, logit_budget=0)
    outputs.entropy_T.sum().backward()
    ours = gradient(model)
    model.zero_grad()
    nodes = torch.unique(batch.visit_token_V[batch.loss_mask_V])
    total = 0.0
    for node in nodes.tolist():
        trail, at = [], int(batch.parent_T[node])
        while at >= 0:
            trail.append(int(batch.token_T[at]))
            at = int(batch.parent_T[at])
        logprob = torch.log_softmax(model(torch.tensor([trail[::-1]])).logits[0, -1] / 0.8, -1)
        total = total - (logprob.exp() * logprob).sum()
    total.backward()
    assert relative_error(ours, gradient(model)) < 1e-6


@pytest.mark.parametrize("max_tokens", [10_000, 14])
@pytest.mark.parametrize("denominator", ["tokens", "sequences"])
def test_metrics_say_how_far_sampler_and_policy_are_off(denominator, max_tokens):
    """Over all own tokens, whatever the loss is a mean of."""
    model, groups = tiny_model(), groups_of()
    algorithm = algorithm_of("grpo", entropy_coef=0.01, denominator=denominator)
    metrics, _ = gradient_of(model, algorithm, groups, max_tokens=max_tokens)
    sampled = np.concatenate(
        [one.logprob[one.loss_mask] for group in groups for sample in group.samples for one in sample]
    )
    own = [padded_logprobs(model, sample) for group in groups for sample in group.samples]
    masks = [torch.from_numpy(one.loss_mask[1:]) for group in groups for sample in group.samples for one in sample]
    flat = torch.cat([x[m] for x, m in zip([x for xs in own for x in xs], masks, strict=True)]).detach().numpy()
    assert metrics["sampling_mismatch"] == pytest.approx(np.abs(flat - sampled).mean(), rel=1e-4)
    assert metrics["sampling_mismatch_max"] == pytest.approx(np.abs(flat - sampled).max(), rel=1e-4)
    weight = np.exp((flat - sampled).astype(np.float64))
    share = weight.mean() ** 2 / (weight**2).mean()
    assert metrics["effective_share"] == pytest.approx(share, rel=1e-4) and share < 0.9
    assert 0 < metrics["entropy"] < np.log(VOCAB)
    assert make_algorithm("grpo").knobs["clip_high"] == 0.28


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo"])
@pytest.mark.parametrize("knobs", [{}, {"kl_as": "k3", "mismatch": "sequence"}])
def test_a_first_step_needs_no_pass_for_the_log_probs_before_it(name, knobs):
    """Its own are those: loss, gradient and metrics are as with the policy's log-probs computed before."""
    model, groups = tiny_model(dtype=torch.float64), groups_of()
    reference = perturbed(model)
    algorithm = algorithm_of(name, temperature=0.8, **knobs)
    olds = logprobs_of(model, groups, temperature=0.8)
    scored = [replace(group, old_logprob=old) for group, old in zip(groups, olds, strict=True)]
    without, ours = gradient_of(model, algorithm, groups, reference)
    with_pass, theirs = gradient_of(model, algorithm, scored, reference)
    assert without == pytest.approx(with_pass, rel=1e-9, abs=1e-9)
    assert relative_error(ours, theirs) < 1e-9


@pytest.mark.parametrize(("num_steps", "knobs", "reads"), [
    (1, {"kl_coef": 0.0, "kl_as": "reward"}, False),
    (1, {"kl_coef": 0.1, "kl_as": "k2"}, False),
    (1, {"kl_coef": 0.1, "kl_as": "reward"}, True),
    (2, {"kl_coef": 0.0, "kl_as": "reward"}, True),
])  # fmt: skip
def test_log_probs_before_an_update_are_read_by_kl_in_the_reward_and_by_later_steps(num_steps, knobs, reads):
    assert reads_old_logprobs(knobs, num_steps) is reads
