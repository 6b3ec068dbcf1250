"""Objectives reach their optima, which are known in closed form where every completion can be listed."""

import pytest
import torch
from enumerable import BANDIT, TREE, all_pairs, bradley_terry, converge, kl, policy, probabilities, total_variation

BETA = 0.5
COMPLETIONS = {"bandit": BANDIT, "tree": TREE}


def rewards_of(completions, seed):
    return torch.randn(len(completions), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.7


@pytest.mark.parametrize("task", COMPLETIONS)
@pytest.mark.parametrize(
    ("objective", "knobs", "beta"),
    [
        ("dpo", {}, BETA),
        ("f_dpo", {"divergence": "reverse_kl"}, BETA),
        ("ld_dpo", {"ld_alpha": 0.5}, BETA),
        ("dpo_norm", {}, None),
        ("cpo", {"nll_coef": 0.0}, BETA),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dpo_and_its_siblings_reach_the_regularised_optimum(task, objective, knobs, beta):
    """π* = π_ref exp(r / β) / Z; with lengths normalised β is divided by them; CPO's reference is uniform."""
    completions = COMPLETIONS[task]
    rewards = rewards_of(completions, 1)
    model = policy()
    pairs = all_pairs(completions, bradley_terry(rewards))
    reference = converge(model, objective, pairs, steps=240, learning_rate=0.015, beta=BETA, **knobs)
    beta = beta or BETA / len(completions[0])
    start = probabilities(reference, completions)
    base = torch.ones_like(start) if objective == "cpo" else start
    optimum = base * (rewards / beta).exp()
    optimum /= optimum.sum()
    assert total_variation(start, optimum) > 0.2
    assert total_variation(probabilities(model, completions), optimum) <= 0.02


def test_robust_dpo_sees_through_flipped_labels():
    """Labels flipped with the probability that it assumes lead to the optimum of the true ones."""
    rewards, flipped = rewards_of(BANDIT, 2), 0.2
    true = bradley_terry(rewards)
    model = policy()
    pairs = all_pairs(BANDIT, true * (1 - flipped) + (1 - true) * flipped)
    reference = converge(model, "robust", pairs, steps=250, learning_rate=0.03, beta=BETA, label_smoothing=flipped)
    optimum = probabilities(reference, BANDIT) * (rewards / BETA).exp()
    assert total_variation(probabilities(model, BANDIT), optimum / optimum.sum()) <= 0.02


def ipo_optimum(start, preference, weight, beta):
    """π ∝ π_ref exp(P(y beats μ) / β), Azar et al. 2023 (arXiv:2310.12036), with ties of a completion with itself."""
    wins = (preference * weight[None, :] / weight.sum()).sum(1)
    optimum = start * (wins / beta).exp()
    return optimum / optimum.sum()


@pytest.mark.parametrize("task", COMPLETIONS)
def test_ipo_reaches_its_own_optimum(task):
    completions = COMPLETIONS[task]
    model = policy()
    weight = probabilities(model, completions)
    preference = bradley_terry(3 * rewards_of(completions, 3))
    pairs = all_pairs(completions, preference, weight)
    reference = converge(model, "ipo", pairs, steps=200, learning_rate=0.015, beta=0.25)
    optimum = ipo_optimum(probabilities(reference, completions), preference, weight, 0.25)
    assert total_variation(probabilities(reference, completions), optimum) > 0.2
    assert total_variation(probabilities(model, completions), optimum) <= 0.01


def test_with_deterministic_preferences_dpo_runs_away_and_ipo_stays():
    """DPO ends as far from the reference as it can, whatever β; IPO ends at its optimum."""
    order = torch.arange(len(BANDIT), dtype=torch.float64)
    sure = (order[:, None] < order[None, :]).double().T + 0.5 * torch.eye(len(BANDIT), dtype=torch.float64)
    end = {}
    for objective in ("dpo", "ipo"):
        model = policy()
        weight = probabilities(model, BANDIT)
        pairs = all_pairs(BANDIT, sure, weight)
        reference = converge(model, objective, pairs, steps=250, learning_rate=0.02, beta=1.0)
        start = probabilities(reference, BANDIT)
        end[objective] = kl(probabilities(model, BANDIT), start)
    farthest = -float(start[-1].log())
    bound = kl(ipo_optimum(start, sure, weight, 1.0), start)
    assert end["ipo"] == pytest.approx(bound, rel=0.02)
    assert end["dpo"] > 0.95 * farthest > 5 * bound
