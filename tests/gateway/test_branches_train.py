"""Episodes of agents that go on from one history in several ways train as one tree, by policy gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gateway_runs import SYSTEM, policy, served

from packed_examples import HEADS, gradient, perturbed, relative_error
from prefloop.batch.examples import RolloutGroup
from prefloop.batch.packed import pack
from prefloop.losses.registry import objective
from prefloop.records import Judgement, Status, Valued
from prefloop.stages.rewarding import credit_groups, credit_tokens
from prefloop.stages.step_credit import paid_rollouts, time_order
from prefloop.training.logprobs import logprobs_of, values_of
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


@pytest.fixture(scope="module")
def helped():
    """An attempt at a task that speaks in its main conversation, in a helper's, and in the main one again."""
    with served() as gateway:
        client = gateway.client("d")
        asked = ask(client, [{"role": "system", "content": SYSTEM}, says("I need to fly to Paris")])
        ask(client, [{"role": "system", "content": "You help."}, says("Which flight is the cheapest?")])
        ask(client, [*asked, says("at night")])
        return gateway.close("d")


def by_turn(trajectory, arrays):
    """The numbers of the own tokens of each turn, in the order in which turns were said."""
    found = {
        int(m): array[path.loss_mask & (path.message == m)]
        for path, array in zip(trajectory.token_paths, arrays, strict=True)
        for m in np.unique(path.message[path.loss_mask])
    }
    return [found[i] for i in trajectory.own_turns]


def test_a_turn_answers_for_what_came_after_it_in_any_conversation(helped):
    assert len(helped.token_paths) == 2 and list(helped.own_turns) != sorted(helped.own_turns)
    config = copy.deepcopy(policy()[0].config)
    config.num_labels = 1
    critic = HEADS["scores"].from_config(config).eval()
    group = RolloutGroup((helped.token_paths,), (), order=(time_order(helped, helped.token_paths),), name="task")
    old = tuple(np.where(path.loss_mask, -1.0, 0.0) for path in helped.token_paths)
    _, second, _ = helped.own_turns
    ref = tuple(
        np.where(path.loss_mask, -1.0 - 3.0 * (path.message == second) / max(1, (path.message == second).sum()), 0.0)
        for path in helped.token_paths
    )
    group = replace(group, old_logprob=old, ref_logprob=ref)
    (values,) = values_of(critic, [group])
    knobs = {**objective("ppo").knobs, "kl_coef": 1.0, "whiten_advantages": False}
    (found,) = credit_tokens([group], np.array([1.0]), [True], [values], knobs).groups
    ids = torch.from_numpy(helped.token_paths[0].token).long()[None]
    with torch.no_grad():
        after = critic(input_ids=ids).logits[0, -1, 0].item()  # where it was cut: the main conversation goes last
    first, helper, last = by_turn(helped, found.ret)
    np.testing.assert_allclose(first, 1.0 - 3.0 + after, atol=1e-5)
    np.testing.assert_allclose(helper, 1.0 + after - 3.0 * np.arange(len(helper), 0, -1) / len(helper), atol=1e-5)
    np.testing.assert_allclose(last, 1.0 + after, atol=1e-5)


def test_steps_are_paid_in_the_order_in_which_they_were_said(helped):
    judgement = Judgement(helped.id, "rater", Status.OK, 0.2, 0.2, criteria={"steps": [0.9, 0.5, 0.2]})
    run = SimpleNamespace(
        policies=SimpleNamespace(renderer=lambda _: policy()[1]),
        judge=SimpleNamespace(
            rater=SimpleNamespace(id="rater", specification={"scorer": {"reads": {"step": "turn", "separator": "\n"}}})
        ),
        store=SimpleNamespace(judgements=lambda **_: [judgement]),
        settings=SimpleNamespace(reward=SimpleNamespace(judge=1.0)),
    )
    member, paths = Valued(helped.id, 0.2, (judgement.id,)), {helped.id: helped.token_paths}
    paid = paid_rollouts(run, None, "difference", [member], {helped.id: helped}, paths)[helped.id]
    sizes = [len(own) for own in by_turn(helped, [path.token for path in helped.token_paths])]
    assert paid.token_K.tolist() == (np.cumsum(sizes) - 1).tolist()
    np.testing.assert_allclose(paid.reward_K, [0.9, -0.4, -0.3])
    group = RolloutGroup((helped.token_paths,), (), order=(time_order(helped, helped.token_paths),), name="task")
    knobs = {**objective("reinforce").knobs, "baseline": "none", "kl_coef": 0.0}
    (found,) = credit_groups([group], np.array([0.2]), knobs, (), [paid]).groups
    for own, expected in zip(by_turn(helped, found.advantage), (0.2, -0.7, -0.3), strict=True):
        np.testing.assert_allclose(own, expected)


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
