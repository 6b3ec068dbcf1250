"""How losses of pairs get their arguments from a batch, and what is added to them; log-probs by hand."""

import math
from dataclasses import replace

import pytest
import torch

from packed_examples import of_sources, path
from prefloop.batch.examples import PreferencePair
from prefloop.batch.packed import pack
from prefloop.records import Source
from prefloop.training.algorithms import make_algorithm

P, S, T = Source.PROMPT, Source.SAMPLED, Source.TOOL
LOGPROB = dict(enumerate([0.0, 0.0, -1.0, -2.0, -3.0, -0.5, -0.25]))
REFERENCE = dict(enumerate([0.0, 0.0, -0.5, -2.5, -2.0, -0.5, -1.0]))


def scored(*pairs, of=LOGPROB):
    """A batch of pairs and log-probs by token id."""
    batch = pack(pairs)
    tokens = batch.token_T[batch.visit_token_V].tolist()
    by_visit = [torch.tensor([table[t] for t in tokens], dtype=torch.float64) for table in (of, REFERENCE)]
    return replace(batch, ref_logprob_V=by_visit[1]), by_visit[0].requires_grad_()


# chosen: own tokens 2, 3, 4 of two contexts, with a tool's 6 between; rejected: own token 5
CHOSEN = (of_sources([1, 2, 6, 3], [P, S, T, S]), path([1, 4], 1))
PAIR = PreferencePair(CHOSEN, (path([1, 5], 1),))


def loss_of(name, *pairs, **knobs):
    batch, logprob_V = scored(*(pairs or (PAIR,)))
    return make_algorithm(name, **knobs).loss(batch, logprob_V)


def test_rewards_of_losses_of_sums_are_sums_and_of_losses_of_means_means():
    def rewards(name, **knobs):
        metrics = loss_of(name, **knobs).metric_U
        return [float(metrics[f"rewards/{side}"]) for side in ("chosen", "rejected")]

    a, b = (-1.0 + 0.5) + (-2.0 + 2.5) + (-3.0 + 2.0), 0.0
    assert rewards("dpo", beta=0.2) == rewards("ipo", beta=0.2) == pytest.approx([0.2 * a, b])
    for name, knobs in (("dpo_norm", {}), ("ipo", {"reduction": "mean"})):
        assert rewards(name, beta=0.2, **knobs) == pytest.approx([0.2 * a / 3, b])
    assert rewards("cpo", beta=0.2) == pytest.approx([-0.2 * 6, -0.2 * 0.5])
    assert rewards("simpo", beta=0.2) == rewards("orpo", beta=0.2) == pytest.approx([-0.2 * 2, -0.2 * 0.5])


def test_the_tail_counts_own_tokens_across_contexts():
    """The rejected has one own token: of the chosen's three the second and third weigh ld_alpha."""
    a = (-1.0 + 0.5) + 0.3 * ((-2.0 + 2.5) + (-3.0 + 2.0))
    (value,) = loss_of("ld_dpo", beta=1.0, ld_alpha=0.3).terms[0].value_U.tolist()
    assert value == pytest.approx(math.log(1 + math.exp(-a)))
    swapped = replace(PAIR, chosen=PAIR.rejected, rejected=PAIR.chosen)
    (value,) = loss_of("ld_dpo", swapped, beta=1.0, ld_alpha=0.3).terms[0].value_U.tolist()
    assert value == pytest.approx(math.log(1 + math.exp(a)))


@pytest.mark.parametrize(
    ("reduction", "scope", "unit", "values"),
    [
        ("pair", "completion", "pair", [6 / 3, 0.5]),
        ("token", "completion", "chosen token", [1.0, 2.0, 3.0, 0.5]),
        ("pair", "sequence", "pair", [6.25 / 4, 0.5]),
        ("token", "sequence", "chosen sequence token", [1.0, 0.25, 2.0, 3.0, 0.5]),
    ],
)
def test_the_likelihood_is_the_chosen_s_over_pairs_or_tokens_of_completion_or_sequence(reduction, scope, unit, values):
    other = PreferencePair((path([1, 5], 1),), (path([1, 3, 4], 1),))
    term = loss_of("dpo", PAIR, other, nll_coef=0.7, nll_reduction=reduction, nll_scope=scope).terms[1]
    assert (term.unit, term.coef, term.value_U.tolist()) == (unit, 0.7, pytest.approx(values))


def test_a_mixture_is_the_weighted_sum_of_its_losses():
    def value(name, **knobs):
        return loss_of(name, beta=0.3, **knobs).terms[0].value_U.item()

    mixed = value("dpo", mixture={"ipo": 0.2, "simpo": 0.5}, gamma=0.1)
    assert mixed == pytest.approx(value("dpo") + 0.2 * value("ipo") + 0.5 * value("simpo", gamma=0.1))
    own = value("dpo", mixture={"dpo": 0.8, "bco": 0.2})
    assert own == pytest.approx(0.8 * value("dpo") + 0.2 * value("bco"))


def test_a_soft_label_is_best_met_where_the_implied_probability_is_its_own():
    pair = replace(PAIR, probability=0.7)
    d = math.log(0.7 / 0.3) / 0.5
    moved = {**LOGPROB, 5: REFERENCE[5] - 1.0 - d}  # a is -1, so b = -1 - d
    batch, logprob_V = scored(pair, of=moved)
    make_algorithm("dpo", beta=0.5).loss(batch, logprob_V).terms[0].value_U.sum().backward()
    assert logprob_V.grad.abs().max() < 1e-12
