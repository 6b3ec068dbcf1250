"""Episodes of agents that go on from one history in several ways train as one tree, by policy gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gateway_runs import SYSTEM, policy, served

from packed_examples import gradient, perturbed, relative_error
from prefloop.batch.examples import RolloutGroup
from prefloop.batch.packed import pack
from prefloop.losses.registry import objective
from prefloop.stages.rewarding import credit_groups
from prefloop.training.logprobs import logprobs_of
from prefloop.training.policy_gradient import PolicyGradient
from prefloop.training.step import StepSettings, TrainingStep

CLIP = {"clip_low": 0.02, "clip_high": 0.03}


def ask(client, messages):
    reply = client.chat.completions.create(model="policy", messages=messages).choices[0].message
    return [*messages, {"role": "assistant", "content": reply.content or ""}]


def says(text):
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def attempts():
    """Three attempts at one task: two hold several continuations of one history, one of them a branch of a branch."""
    begin = [{"role": "system", "content": SYSTEM}, says("I need to fly to Paris")]
    with served() as gateway:
        for episode in ("a", "b", "c"):
            client = gateway.client(episode)
            asked = ask(client, begin)
            ask(client, [*asked, says("at night")])
            if episode != "c":
                ask(client, [*asked, says("as cheap as it gets")])
                by_day = ask(client, [*asked, says("by day")])
                for text in ("go on", "no, rather by train"):
                    ask(client, [*by_day, says(text)])
        return [gateway.close(episode) for episode in ("a", "b", "c")]


def credited(model, attempts, name, **changes):
    """The attempts as one group, each own token with the advantage of its attempt."""
    group = RolloutGroup(tuple(one.token_paths for one in attempts), (), name="task")
    (old,) = logprobs_of(model, [group])
    group = RolloutGroup(group.samples, (), old_logprob=old, name="task")
    knobs = {**objective(name).knobs, "kl_coef": 0.0, **changes}
    return credit_groups([group], np.array([1.0, 0.25, -0.5]), knobs).groups[0], knobs


def test_what_the_sampler_said_of_each_branch_the_trainer_says_too(attempts):
    model, _ = policy()
    group, _ = credited(model, attempts, "grpo")
    paths = [path for one in attempts for path in one.token_paths]
    assert [len(one.threads) for one in attempts] == [4, 4, 1]
    for path, old in zip(paths, group.old_logprob, strict=True):
        np.testing.assert_allclose(old[path.loss_mask], path.logprob[path.loss_mask], atol=1e-4)


def test_they_are_one_tree_in_which_what_was_said_once_is_learned_once(attempts):
    model, _ = policy()
    group, _ = credited(model, attempts, "grpo")
    batch = pack([group])
    paths = [path for one in attempts for path in one.token_paths]
    prefixes = {tuple(path.token[: end + 1].tolist()) for path in paths for end in range(len(path.token))}
    assert len(batch.token_T) == len(prefixes) < sum(len(path.token) for path in paths) / 2
    assert int((batch.parent_T < 0).sum()) == 1
    turns = sum(one.num_turns for one in attempts)
    said = {(i, int(m)) for i, one in enumerate(attempts) for p in one.token_paths for m in p.message[p.loss_mask]}
    assert turns == len(said) == 6 + 6 + 2
    own = sum(len(path.token[path.loss_mask]) for path in paths)
    assert int(batch.loss_mask_V.sum()) == own
    of_context = [path for path in paths if (np.isnan(path.logprob) & (path.message >= 0)).any()]
    assert of_context  # branches hold turns of other branches, which are theirs to read and not to learn


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grpo", {"denominator": "tokens", "mismatch": "none", **CLIP}),
        ("rloo", {"mismatch": "none"}),
        ("reinforce", {"mismatch": "none"}),
    ],
)
def test_gradients_are_those_of_separate_padded_rows(attempts, name, changes):
    start = copy.deepcopy(policy()[0]).double()
    group, knobs = credited(start, attempts, name, **changes)
    model = perturbed(start, 0.01)
    model.zero_grad()
    step = TrainingStep(
        model, None, PolicyGradient(name, knobs), torch.optim.SGD(model.parameters(), lr=0.1), StepSettings()
    )
    metrics = step.gradient([group])
    ours = gradient(model)
    model.zero_grad()
    loss = padded_loss(model, start, attempts, knobs)
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-9)
    assert relative_error(ours, gradient(model)) < 1e-6


def padded_loss(model, start, attempts, knobs):
    """Each branch a right-padded row of its own, with the advantage of its attempt by hand."""
    rewards = [1.0, 0.25, -0.5]
    others = [(sum(rewards) - one) / 2 for one in rewards]
    mean = sum(rewards) / 3
    advantages = [
        r - mean if knobs["baseline"] == "group_mean" else r - o for r, o in zip(rewards, others, strict=True)
    ]
    samples = []
    for one in attempts:
        longest = max(len(path.token) for path in one.token_paths)
        ids, mask = torch.zeros(2, len(one.token_paths), longest, dtype=torch.long)
        own = torch.zeros(len(one.token_paths), longest, dtype=torch.bool)
        for row, path in enumerate(one.token_paths):
            size = len(path.token)
            ids[row, :size], mask[row, :size] = torch.from_numpy(path.token).long(), 1
            own[row, :size] = torch.from_numpy(path.loss_mask)
        both = []
        for policy_ in (model, start):
            rows = torch.log_softmax(policy_(input_ids=ids, attention_mask=mask).logits, -1)[:, :-1]
            both.append(rows.gather(2, ids[:, 1:, None])[..., 0][own[:, 1:]])
        samples.append((both[0], both[1].detach()))
    if knobs["ratio"] == "none":
        return torch.stack([-a * new.sum() for a, (new, _) in zip(advantages, samples, strict=True)]).mean()
    low, high = 1 - knobs["clip_low"], 1 + knobs["clip_high"]
    if knobs["ratio"] == "sequence":
        ratios = [torch.exp((new - old).sum()) for new, old in samples]
        return -torch.stack(
            [torch.minimum(r * a, r.clamp(low, high) * a) for r, a in zip(ratios, advantages, strict=True)]
        ).mean()
    ratio = torch.cat([torch.exp(new - old) for new, old in samples])
    advantage = torch.cat([torch.full_like(new, a) for a, (new, _) in zip(advantages, samples, strict=True)]).detach()
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage).mean()
