from dataclasses import replace

import numpy as np
import pytest
import torch

from packed_examples import path
from prefloop.batch.examples import PreferencePair
from prefloop.models.reward import new_reward_model
from prefloop.models.settings import LoraSettings
from prefloop.training.algorithms import make_algorithm
from prefloop.training.ensemble import bootstrap_weights, parts, score_pairs, train_reward_model
from prefloop.training.settings import TrainingSettings
from prefloop.training.step import TrainingStep
from reward_examples import saved_policy

LORA = LoraSettings(rank=2, alpha=4)
SETTINGS = TrainingSettings(learning_rate=5e-3, batch_size=8, num_epochs=6)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return saved_policy(tmp_path_factory.mktemp("policy") / "sft")


def made_pairs(num=24, seed=0):
    """Of two per prompt; the better side has more of the token 30."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(num):
        prompt = [1, 10 + i // 2]
        worse = rng.integers(40, 60, 6)
        better = worse.copy()
        better[rng.choice(6, 2, replace=False)] = 30
        chosen, rejected = (path([*prompt, *side.tolist(), 2], 2) for side in (better, worse))
        pairs.append(PreferencePair((chosen,), (rejected,), name=f"pair-{i}"))
    return pairs


def test_a_single_model_learns_from_the_pairs_as_they_are(policy):
    (part,) = parts(new_reward_model(policy), made_pairs(4), seed=7)
    assert (part.seed, [p.name for p in part.examples]) == (7, [f"pair-{i}" for i in range(4)])
    assert {(p.weight, p.head_weight) for p in part.examples} == {(1.0, ())}


def test_only_the_last_context_of_a_side_is_computed(policy):
    pair = replace(made_pairs(1)[0], chosen=(path([1, 5, 6], 1), path([1, 5, 7, 8], 2)))
    (part,) = parts(new_reward_model(policy), [pair], seed=0)
    assert [p.token.tolist() for p in part.examples[0].chosen] == [[1, 5, 7, 8]]


def test_bootstrap_weights_are_exponential_and_those_of_a_prompt():
    pairs = made_pairs(400)
    weights = bootstrap_weights(pairs, 3, seed=1)
    assert (weights[::2] == weights[1::2]).all()
    assert weights.mean() == pytest.approx(1, abs=0.1)
    assert weights.std() == pytest.approx(1, abs=0.15)
    assert abs(np.corrcoef(weights[::2].T)[np.triu_indices(3, 1)]).max() < 0.2
    assert (bootstrap_weights(pairs, 3, seed=1) == weights).all()
    assert (bootstrap_weights(pairs, 3, seed=2) != weights).any()


def test_heads_see_their_own_bootstrap_samples_in_one_training(policy):
    pairs = made_pairs(6)
    (part,) = parts(new_reward_model(policy, num_heads=3), pairs, seed=1)
    assert [p.head_weight for p in part.examples] == list(map(tuple, bootstrap_weights(pairs, 3, seed=1).tolist()))


def test_a_head_without_weight_learns_nothing(policy):
    """The weights reach the heads they are for."""
    model = new_reward_model(policy, num_heads=2)
    pairs = [replace(pair, head_weight=(2.0, 0.0)) for pair in made_pairs(6)]
    step = TrainingStep(model.model, None, make_algorithm("reward"), torch.optim.SGD(model.model.parameters(), lr=0.0))
    step.gradient(pairs)
    grad = model.model.score.weight.grad
    assert float(grad[0].norm()) > 0
    assert float(grad[1].norm()) == 0


@pytest.mark.slow
def test_adapters_are_trained_one_after_another_each_alone(policy, tmp_path):
    model = new_reward_model(policy, lora=LORA, num_adapters=2, seed=1)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    pairs = made_pairs(8)
    weights = bootstrap_weights(pairs, 2, seed=1)
    seeds = []
    for i, part in enumerate(parts(model, pairs, seed=1)):
        assert part.name == f"member_{i}"
        assert [p.weight for p in part.examples] == weights[:, i].tolist()
        trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
        assert trained and all(part.name in name for name in trained)
        seeds.append(part.seed)
    assert len(set(seeds)) == 2
    results = train_reward_model(
        model, make_algorithm("reward"), pairs, SETTINGS, seed=1, identity="x", state_directory=tmp_path
    )
    assert list(results) == ["member_0", "member_1"]
    after = dict(model.model.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert any("member_0" in name for name in moved) and any("member_1" in name for name in moved)
    assert all("member_" in name for name in moved)
    scores = score_pairs(model, pairs)
    assert ((scores[:, 0] - scores[:, 1]).mean(0) > 0.5).all()


def test_heads_learn_and_are_centred_on_what_they_learnt_from(policy, tmp_path):
    model, pairs = new_reward_model(policy, num_heads=3), made_pairs()
    results = train_reward_model(
        model, make_algorithm("reward"), pairs, SETTINGS, seed=1, identity="x", state_directory=tmp_path
    )
    assert results["all"].history[-1]["accuracy"] == 1
    scores = score_pairs(model, pairs)
    assert scores.shape == (24, 2, 3)
    assert model.centres == pytest.approx(tuple(scores.reshape(-1, 3).mean(0)))
    assert model.scale == pytest.approx(scores.reshape(-1, 3).mean(1).std())


@pytest.mark.slow
def test_the_bootstrap_makes_heads_differ_more_than_their_first_weights_do(policy, tmp_path, monkeypatch):
    """On pairs they have not seen; heads on one trunk otherwise agree nearly everywhere."""
    held_out, spreads = made_pairs(60, seed=5), []
    for name in ("bootstrap", "same pairs"):
        if name == "same pairs":
            monkeypatch.setattr(
                "prefloop.training.ensemble.bootstrap_weights", lambda pairs, number, _: np.ones((len(pairs), number))
            )
        model = new_reward_model(policy, num_heads=5, seed=1)
        train_reward_model(
            model, make_algorithm("reward"), noisy(made_pairs(40)), SETTINGS, seed=1, identity=name,
            state_directory=tmp_path / name,
        )  # fmt: skip
        scores = score_pairs(model, held_out)
        gap = scores[:, 0] - scores[:, 1]
        spreads.append((gap.std(1, ddof=1) / gap.std()).mean())
    assert spreads[0] > 1.3 * spreads[1]


def noisy(pairs):
    """A third of the preferences turned."""
    return [replace(p, chosen=p.rejected, rejected=p.chosen) if i % 3 == 0 else p for i, p in enumerate(pairs)]
