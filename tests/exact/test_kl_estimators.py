"""What k1, k2 and k3 estimate, which gradients they have, and where each leads as a pull to the reference.

All expectations are exact: sums over every completion with its probability.
"""

import pytest
import torch
from enumerable import kl, total_variation
from softmax_tables import (
    BANDIT,
    TREE,
    descend,
    forward_improvement,
    local_optimum,
    regularised_optimum,
    reverse_improvement,
)

from prefloop.losses.kl import corrected_k3, k2, k3
from prefloop.losses.policy_gradient import reinforce

BETA = 0.5
ESTIMATORS = {
    "k1": lambda logprob, ref: logprob - ref,
    "k2": lambda logprob, ref: k2(logprob, ref),
    "k3": lambda logprob, ref: k3(logprob, ref),
    "corrected k3": lambda logprob, ref: corrected_k3(logprob, logprob.detach(), ref),
}


def two_policies(task, distance=1.0):
    table = task.table(1)
    return table, table + distance * task.table(2)


@pytest.mark.parametrize("task", [BANDIT, TREE], ids=["bandit", "tree"])
def test_k1_and_k3_are_unbiased(task):
    """At each token given what came before; summed over a completion they are the KL of completions."""
    own, ref = two_policies(task)
    probability_C = task.probabilities(own)
    exact = kl(probability_C, task.probabilities(ref))
    assert exact > 0.1
    for name in ("k1", "k3", "corrected k3"):
        estimate_CD = ESTIMATORS[name](task.logprobs(own), task.logprobs(ref))
        assert (probability_C[:, None] * estimate_CD).sum().item() == pytest.approx(exact), name
    assert (ESTIMATORS["k3"](task.logprobs(own), task.logprobs(ref)) >= 0).all()


def test_on_samples_of_an_older_policy_the_corrected_k3_is_that_of_the_new_one():
    old, ref = two_policies(BANDIT)
    own = old + 0.3 * BANDIT.table(5)
    old_C, own_C, ref_C = (BANDIT.logprobs(table)[:, 0] for table in (old, own, ref))
    corrected = (old_C.exp() * corrected_k3(own_C, old_C, ref_C)).sum().item()
    assert corrected == pytest.approx(kl(own_C.exp(), ref_C.exp()))
    assert (old_C.exp() * k3(own_C, ref_C)).sum().item() != pytest.approx(corrected, rel=0.01)


def test_k2_is_biased_by_little_near_the_reference():
    for distance, error in ((1.0, 0.35), (0.1, 0.05), (0.01, 0.005)):
        own, ref = two_policies(BANDIT, distance)
        own_C, ref_C = BANDIT.logprobs(own)[:, 0], BANDIT.logprobs(ref)[:, 0]
        estimate, exact = (own_C.exp() * k2(own_C, ref_C)).sum().item(), kl(own_C.exp(), ref_C.exp())
        assert estimate == pytest.approx(exact, rel=error)
        assert estimate != pytest.approx(exact, rel=error / 100)


def gradient(table, loss_of):
    table = table.clone().requires_grad_()
    loss_of(table).backward()
    return table.grad


def test_gradients_of_the_estimators_in_expectation():
    own, ref = two_policies(BANDIT)
    ref_C, probability_C = BANDIT.logprobs(ref)[:, 0], BANDIT.probabilities(own)

    def logprob_C(table):
        return BANDIT.logprobs(table)[:, 0]

    found = {
        name: gradient(own, lambda table, e=estimate: (probability_C * e(logprob_C(table), ref_C)).sum())
        for name, estimate in ESTIMATORS.items()
    }
    reverse = gradient(own, lambda table: (logprob_C(table).exp() * (logprob_C(table) - ref_C)).sum())
    forward = gradient(own, lambda table: (ref_C.exp() * (ref_C - logprob_C(table))).sum())
    torch.testing.assert_close(found["k2"], reverse)
    torch.testing.assert_close(found["corrected k3"], reverse)
    torch.testing.assert_close(found["k3"], forward)
    torch.testing.assert_close(found["k1"], torch.zeros_like(own))
    assert float((reverse - forward).norm()) > 0.1 * float(reverse.norm())


def pulled(task, estimator, *, steps=500):
    """Where REINFORCE of the reward alone and a KL as a loss lead, in expectation: probabilities [C]."""
    ref, reward_C = task.table(0), task.rewards(0)
    table, ref_CD = ref.clone(), task.logprobs(ref)

    def loss(_):
        logprob_CD = task.logprobs(table)
        value_CD = reinforce(logprob_CD, reward_C[:, None]) + BETA * ESTIMATORS[estimator](logprob_CD, ref_CD)
        return (task.probabilities(table)[:, None] * value_CD).sum()

    return task.probabilities(descend(table, loss, steps=steps, learning_rate=0.1))


@pytest.fixture(scope="module", params=[BANDIT, TREE], ids=["bandit", "tree"])
def found(request):
    """Where each estimator leads as a loss, the fixed points, and the optimum of the objective itself."""
    task = request.param
    ref, reward_C = task.table(0), task.rewards(0)
    return {
        "task": task,
        "ends": {name: pulled(task, name) for name in ESTIMATORS},
        "reverse": local_optimum(task, ref, reward_C, reverse_improvement(BETA)),
        "forward": local_optimum(task, ref, reward_C, forward_improvement(BETA)),
        "optimum": regularised_optimum(task, ref, reward_C, BETA),
    }


def test_kl_as_a_loss_leads_to_its_own_fixed_point(found):
    ends = found["ends"]
    assert total_variation(ends["k2"], found["reverse"]) <= 0.002
    assert total_variation(ends["corrected k3"], found["reverse"]) <= 0.002
    assert total_variation(ends["k3"], found["forward"]) <= 0.002
    assert total_variation(ends["k3"], found["reverse"]) > 0.03
    assert ends["k1"].max() > 0.98  # nothing holds it


def test_that_fixed_point_is_the_optimum_for_one_token_and_not_for_sequences(found):
    """On the tree, a token does not answer for the KL of those after it."""
    distance = total_variation(found["reverse"], found["optimum"])
    if found["task"] is BANDIT:
        assert distance < 1e-9
    else:
        assert distance == pytest.approx(0.142, abs=5e-4)  # as docs/algorithms.md says
        assert total_variation(found["ends"]["k2"], found["optimum"]) == pytest.approx(0.142, abs=2e-3)


def test_the_local_fixed_point_is_worth_less(found):
    """E[r] - β KL of completions, the objective itself, is lower there than at its optimum; equal on the bandit."""
    task, reward_C = found["task"], found["task"].rewards(0)
    ref_C = task.probabilities(task.table(0))

    def objective(probability_C):
        return float((probability_C * reward_C).sum()) - BETA * kl(probability_C, ref_C)

    best = objective(found["optimum"])
    assert best == pytest.approx(BETA * float((ref_C * (reward_C / BETA).exp()).sum().log()))
    there = objective(found["reverse"])
    if task is BANDIT:
        assert there == pytest.approx(best, abs=1e-9)
    else:
        assert (there, best) == pytest.approx((0.096, 0.120), abs=5e-4)  # as docs/algorithms.md says
