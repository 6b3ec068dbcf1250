"""What holds for the losses of preference pairs: values, gradients, symmetry, order, and behaviour far out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_makers import FIELDS, PAIR_LOSSES, loss_of, pairs_of, random_numbers, tensor

from packed_examples import agent_pairs
from prefloop.batch.packed import pack
from prefloop.losses.pairs import Pairs
from prefloop.losses.registry import objective
from prefloop.training.algorithms import make_algorithm


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce(x, eps=0.0):
    """The cross-entropy of sigmoid(x) under a label of 1 - eps."""
    return (1 - eps) * np.logaddexp(0, -x) + eps * np.logaddexp(0, x)


def odds(mean_logprob):
    return np.exp(mean_logprob) / (1 - np.exp(mean_logprob))


# The equations of the papers once more, as they stand: a and b are log-ratios, c and r log-probs of chosen and
# rejected, C and R their numbers of tokens, ta and tb the tails of a and b.
EQUATIONS = {
    "dpo": lambda p, beta, label_smoothing: bce(beta * (p.a - p.b), label_smoothing),
    "robust": lambda p, beta, label_smoothing: (
        ((1 - label_smoothing) * bce(beta * (p.a - p.b)) - label_smoothing * bce(beta * (p.b - p.a)))
        / (1 - 2 * label_smoothing)
    ),
    "dpo_norm": lambda p, beta: bce(beta * p.a / p.C - beta * p.b / p.R),
    "hinge": lambda p, beta: np.maximum(0, 1 - beta * (p.a - p.b)),
    "exo": lambda p, beta, label_smoothing: sum(
        q * np.log(q / label)
        for q, label in (
            (np.exp(beta * p.a) / (np.exp(beta * p.a) + np.exp(beta * p.b)), 1 - label_smoothing),
            (np.exp(beta * p.b) / (np.exp(beta * p.a) + np.exp(beta * p.b)), label_smoothing),
        )
    ),
    "discopop": lambda p, beta, tau: (
        (1 - sigmoid(beta * (p.a - p.b) / tau)) * bce(beta * (p.a - p.b))
        + sigmoid(beta * (p.a - p.b) / tau) * np.exp(-beta * (p.a - p.b))
    ),
    "f_dpo": lambda p, beta, divergence, divergence_alpha: bce(
        beta * (slope(np.exp(p.a), divergence, divergence_alpha) - slope(np.exp(p.b), divergence, divergence_alpha))
    ),
    "ld_dpo": lambda p, beta, ld_alpha: bce(beta * ((p.a - p.ta) + ld_alpha * p.ta - (p.b - p.tb) - ld_alpha * p.tb)),
    "ipo": lambda p, beta, reduction: ((p.a / p.C - p.b / p.R if reduction == "mean" else p.a - p.b) - 0.5 / beta) ** 2,
    "sppo": lambda p, beta: (p.a - 0.5 / beta) ** 2 + (p.b + 0.5 / beta) ** 2,
    "nca": lambda p, beta: bce(beta * p.a) + bce(-beta * p.a) / 2 + bce(-beta * p.b) / 2,
    "bco": lambda p, beta: bce(beta * p.a) + bce(-beta * p.b),
    "apo_zero": lambda p, beta: 1 - sigmoid(beta * p.a) + sigmoid(beta * p.b),
    "apo_down": lambda p, beta: sigmoid(beta * p.a) + 1 - sigmoid(beta * (p.a - p.b)),
    "aot": lambda p, beta, label_smoothing: bce(
        beta * (np.sort(p.c - p.r) - np.sort(p.ref_c - p.ref_r)), label_smoothing
    ),
    "aot_unpaired": lambda p, beta, label_smoothing: bce(beta * (np.sort(p.a) - np.sort(p.b)), label_smoothing),
    "cpo": lambda p, beta, label_smoothing: bce(beta * (p.c - p.r), label_smoothing),
    "simpo": lambda p, beta, gamma, label_smoothing: bce(beta * p.c / p.C - beta * p.r / p.R - gamma, label_smoothing),
    "orpo": lambda p, beta: beta * bce(np.log(odds(p.c / p.C) / odds(p.r / p.R))),
}

KNOBS = [
    *((name, {}) for name in PAIR_LOSSES),
    ("dpo", {"beta": 0.4, "label_smoothing": 0.2}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.3}),
    ("dpo_norm", {"beta": 0.7}),
    ("hinge", {"beta": 0.02}),
    ("exo", {"beta": 0.2, "label_smoothing": 0.1}),
    ("discopop", {"beta": 0.3, "tau": 0.7}),
    *(("f_dpo", {"divergence": name}) for name in ("reverse_kl", "forward_kl", "js")),
    ("f_dpo", {"divergence": "alpha", "divergence_alpha": 0.2}),
    ("ld_dpo", {"ld_alpha": 0.0}),
    ("ipo", {"beta": 0.3, "reduction": "mean"}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.1}),
    ("simpo", {"beta": 1.5, "gamma": 0.3, "label_smoothing": 0.1}),
    ("orpo", {"beta": 0.6}),
]
with_knobs = pytest.mark.parametrize(("name", "knobs"), KNOBS, ids=lambda value: str(value))


def slope(u, divergence, alpha):
    """f'(u) of the f-divergences, by their table."""
    by_name = {"reverse_kl": np.log(u) + 1, "forward_kl": -1 / u, "js": np.log(2 * u / (1 + u))}
    return by_name[divergence] if divergence != "alpha" else (1 - u**-alpha) / alpha


class Numbers:
    def __init__(self, numbers):
        self.c, self.r, self.ref_c, self.ref_r, self.C, self.R, self.ta, self.tb = (numbers[key] for key in FIELDS)
        self.a, self.b = self.c - self.ref_c, self.r - self.ref_r


def as_pairs(numbers):
    return Pairs(*(tensor(numbers[key]) for key in FIELDS))


def test_every_loss_of_pairs_has_its_equation_here():
    assert set(EQUATIONS) == set(PAIR_LOSSES)


@with_knobs
def test_values_are_those_of_the_equation(name, knobs):
    numbers = random_numbers(40)
    arguments = loss_of(name, **knobs).keywords
    expected = EQUATIONS[name](Numbers(numbers), **arguments)
    np.testing.assert_allclose(loss_of(name, **knobs)(as_pairs(numbers)).numpy(), expected, rtol=1e-9, atol=1e-12)


@with_knobs
def test_gradients_are_those_of_finite_differences(name, knobs):
    numbers = random_numbers(6, seed=3)
    moving = ("chosen", "rejected", "chosen_tail", "rejected_tail")
    given = [tensor(numbers[key]).requires_grad_() for key in moving]

    def loss(*values):
        rest = {key: tensor(value) for key, value in numbers.items()} | dict(zip(moving, values, strict=True))
        return loss_of(name, **knobs)(Pairs(*(rest[key] for key in FIELDS)))

    assert torch.autograd.gradcheck(loss, given)


def algorithm_values(name, examples, seed, **knobs):
    """The values of the first term of an objective, for log-probs that depend on the tokens alone."""
    batch = pack(examples)
    table_V2 = torch.rand(2, 61, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprob_V, ref_logprob_V = -3 * table_V2[:, batch.token_T[batch.visit_token_V]]
    return make_algorithm(name, **knobs).loss(replace(batch, ref_logprob_V=ref_logprob_V), logprob_V).terms[0].value_U


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if not objective(name).couples])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 50), probability=st.floats(0, 1))
def test_a_swapped_pair_with_one_minus_its_probability_has_the_same_loss(name, seed, probability):
    pairs = [replace(pair, probability=probability) for pair in agent_pairs(3, seed)]
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen, probability=1 - probability) for p in pairs]
    there, back = (algorithm_values(name, rows, seed) for rows in (pairs, swapped))
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if not objective(name).couples])
def test_a_probability_mixes_the_losses_of_both_orders(name):
    pairs = [replace(pair, probability=1.0) for pair in agent_pairs(3)]
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs]
    there, back = (algorithm_values(name, rows, 1) for rows in (pairs, swapped))
    mixed = algorithm_values(name, [replace(p, probability=0.3) for p in pairs], 1)
    torch.testing.assert_close(mixed, 0.3 * there + 0.7 * back)


far = st.floats(-1e4, -1e-6)


@with_knobs
@settings(deadline=None, max_examples=30)
@given(logprobs=st.tuples(far, far, far, far), counts=st.tuples(st.integers(1, 100), st.integers(1, 100)))
def test_losses_and_gradients_are_finite_far_out(name, knobs, logprobs, counts):
    chosen, rejected = (tensor(x).requires_grad_() for x in logprobs[:2])
    value = loss_of(name, **knobs)(pairs_of(chosen, rejected, *logprobs[2:], *counts))
    for found in (value, *torch.autograd.grad(value.sum(), (chosen, rejected))):
        assert torch.isfinite(found.float()).all()


FALLS_WITH_CHOSEN = set(PAIR_LOSSES) - {"exo", "discopop", "ipo", "sppo", "nca", "apo_down"}
RISES_WITH_REJECTED = FALLS_WITH_CHOSEN | {"nca", "apo_down"}
some = st.floats(-60, -0.01)


@pytest.mark.parametrize("name", sorted(RISES_WITH_REJECTED))
@settings(deadline=None, max_examples=20)
@given(logprobs=st.tuples(some, some, some, some), counts=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_more_chosen_and_less_rejected_never_cost_more(name, logprobs, counts):
    chosen, rejected = (tensor(x).requires_grad_() for x in logprobs[:2])
    loss_of(name)(pairs_of(chosen, rejected, *logprobs[2:], *counts)).sum().backward()
    assert float(rejected.grad) >= 0
    if name in FALLS_WITH_CHOSEN:
        assert float(chosen.grad) <= 0


@pytest.mark.parametrize(
    ("name", "pair", "where"),
    [  # a point at which a higher log-prob of the chosen costs more, for each loss outside the sets above
        ("exo", (-1.0, -200.0, -1.0, -1.0), "chosen"),
        ("discopop", (-1.0, -1.0, -1.0, -0.5), "chosen"),
        ("ipo", (-1.0, -10.0), "chosen"),
        ("sppo", (-1.0, -1.0, -9.0), "chosen"),
        ("nca", (-1.0, -1.0, -200.0), "chosen"),
        ("apo_down", (-1.0, -30.0), "chosen"),
    ],
)
def test_the_other_losses_do_turn(name, pair, where):
    chosen = tensor(pair[0]).requires_grad_()
    loss_of(name)(pairs_of(chosen, *pair[1:])).sum().backward()
    assert float(chosen.grad) > 0
