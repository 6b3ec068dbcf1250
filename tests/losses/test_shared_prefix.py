"""Where chosen and rejected begin alike, which losses leave those tokens alone.

A token that both sides sampled is one token of the forest, and its log-prob one number. A loss of the difference of
summed log-probs holds it once with a plus and once with a minus: its gradient there is exactly 0, not nearly.
"""

from dataclasses import replace

import pytest
import torch
from loss_makers import PAIR_LOSSES

from packed_examples import of_sources
from prefloop.batch.examples import Demonstration, LabelledSample, PreferencePair
from prefloop.batch.packed import pack
from prefloop.losses.registry import OBJECTIVES
from prefloop.records import Source
from prefloop.training.algorithms import make_algorithm

OF_THE_DIFFERENCE = {
    "dpo": {},
    "dpo with smoothing": {"label_smoothing": 0.2},
    "robust": {},
    "hinge": {},
    "exo": {},
    "discopop": {},
    "f_dpo under the reverse kl": {"divergence": "reverse_kl"},
    "ld_dpo": {},
    "ipo": {},
    "aot": {},
    "cpo without the likelihood": {"nll_coef": 0.0},
    "dpo mixed with ipo": {"mixture": {"ipo": 0.01}},
}
OF_MORE = {
    "dpo_norm": {},
    "f_dpo": {},
    "ipo with means": {"reduction": "mean"},
    "sppo": {},
    "nca": {},
    "bco": {},
    "apo_zero": {},
    "apo_down": {},
    "aot_unpaired": {},
    "cpo": {},
    "simpo": {},
    "orpo": {},
    "dpo with the likelihood": {"nll_coef": 0.1},
    "dpo mixed with apo_zero": {"mixture": {"apo_zero": 0.1}},
}
SEED = 5  # of log-probs in whose order no pair has one rank on both sides: there aot_unpaired would be dpo

P, S, T = Source.PROMPT, Source.SAMPLED, Source.TOOL


def sides(begin, num_shared, *ends):
    """Runs that share a prompt, a turn of `num_shared` sampled tokens and the tool's answer to it, then part."""
    shared = [begin, 3, *range(10, 10 + num_shared), 50]
    sources = [P, P, *[S] * num_shared, T]
    return [(of_sources([*shared, *end], [*sources, *[S] * len(end)]),) for end in ends]


def run_pairs():
    """Pairs of runs of one or two tasks, their ends of unequal lengths."""
    first = sides(1, 4, [20, 21], [30], [20, 22, 23, 24], [31, 32])
    second = sides(2, 2, [40, 41, 42], [43])
    return [PreferencePair(*pair) for pair in (first[:2], first[2:], second)]


def gradients(name, examples, **knobs):
    """The gradient with respect to own tokens' log-probs: of those that both sides of a row share, and of others."""
    batch = pack(examples)
    generator = torch.Generator().manual_seed(SEED)
    logprob_T, ref_logprob_T = -3 * torch.rand(2, batch.num_tokens, generator=generator)
    logprob_T.requires_grad_()
    batch = replace(batch, ref_logprob_V=ref_logprob_T[batch.visit_token_V])
    loss = make_algorithm(name, **knobs).loss(batch, logprob_T[batch.visit_token_V])
    (gradient_T,) = torch.autograd.grad(sum(term.coef * term.value_U.sum() for term in loss.terms), logprob_T)
    own = [
        {int(token) for token in batch.visit_token_V[batch.loss_mask_V & (batch.visit_sample_V == sample)]}
        for sample in range(batch.num_samples)
    ]
    shared = set().union(*(own[chosen] & own[rejected] for chosen, rejected in batch.pair_P2.tolist() or [(0, 1)]))
    return gradient_T[sorted(shared)], gradient_T[sorted(set().union(*own) - shared)]


def test_the_forest_holds_once_what_both_sides_sampled():
    shared, others = gradients("dpo", run_pairs())
    assert (len(shared), len(others)) == (4 + 2, 2 + 1 + 3 + 2 + 3 + 1)  # token 20 begins two chosen ends


@pytest.mark.parametrize("label", OF_THE_DIFFERENCE)
def test_losses_of_the_difference_leave_shared_tokens_alone(label):
    shared, others = gradients(label.split()[0], run_pairs(), **OF_THE_DIFFERENCE[label])
    assert shared.tolist() == [0.0] * 6
    assert others.abs().max() > 1e-3


@pytest.mark.parametrize("name", [label for label in OF_THE_DIFFERENCE if label in PAIR_LOSSES and label != "aot"])
def test_they_do_so_for_pairs_that_are_not_sure(name):
    rows = [replace(pair, probability=p) for pair, p in zip(run_pairs(), (0.7, 0.2, 0.5), strict=True)]
    shared, others = gradients(name, rows)
    assert shared.tolist() == [0.0] * 6
    assert others.abs().max() > 1e-3


@pytest.mark.parametrize("label", OF_MORE)
def test_other_losses_move_shared_tokens(label):
    shared, _ = gradients(label.split()[0], run_pairs(), **OF_MORE[label])
    assert shared.abs().min() > 1e-6


@pytest.mark.parametrize("label", [label for label in OF_MORE if label.split()[0] in ("dpo_norm", "ipo", "simpo")])
def test_means_move_them_only_where_lengths_differ(label):
    same = [PreferencePair(*sides(1, 4, [20, 21], [30, 31]))]
    shared, others = gradients(label.split()[0], same, **OF_MORE[label])
    assert shared.tolist() == [0.0] * 4
    assert others.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_so_do_losses_of_single_samples(name):
    good, bad = sides(1, 4, [20, 21], [30])
    rows = [Demonstration(good), Demonstration(bad)]
    if name == "kto":
        rows = [LabelledSample(good, True), LabelledSample(bad, False)]
    shared, _ = gradients(name, rows)
    assert len(shared) == 4 and shared.abs().min() > 1e-6


def test_every_objective_that_reads_log_probs_is_in_one_class_or_the_other():
    """Its default form, that is; a label of several words is another form."""
    of_difference = {label for label in OF_THE_DIFFERENCE if label in OBJECTIVES}
    of_more = {label for label in OF_MORE if label in OBJECTIVES} | {"sft", "kto"}
    assert not of_difference & of_more
    of_rows = {name for name, found in OBJECTIVES.items() if not found.fresh}
    assert of_difference | of_more == of_rows - {"reward", "process_reward"}
