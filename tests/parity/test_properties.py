"""What must hold of every objective whatever its rows: hypothesis draws them, and how they are cut and laid out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity_cases import CASES

from packed_examples import gradient, path, random_tokens, relative_error
from prefloop.batch import packing
from prefloop.batch.examples import PreferencePair
from prefloop.batch.packed import pack
from prefloop.losses.registry import objective
from prefloop.training.step import StepSettings, TrainingStep

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
TOLERANCE = 1e-9

few = settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 10_000)


def by_case(keep=lambda case: True):
    return pytest.mark.parametrize("case", [case for case in CASES if keep(case)], ids=lambda case: case.id)


@pytest.fixture
def measure(exact_model, use_layout, monkeypatch):
    """A function that gives loss and gradient of a case over rows, cut into micro-batches and laid out as it says."""
    models = {}

    def run(case, examples, layout="forest", max_tokens=10_000):
        if case.head not in models:
            models[case.head] = exact_model(head=case.head, **TINY)
        model, reference = models[case.head]
        use_layout("rows" if layout == "rows" else "forest")
        monkeypatch.setattr(packing, "MIN_SHARING", math.inf if layout == "separate" else 1.0)
        model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters())
        step = TrainingStep(model, reference, case.algorithm, optimizer, StepSettings(max_tokens=max_tokens))
        loss = step.gradient(examples)["loss"]
        return loss, gradient(model)

    return run


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert relative_error(found[1], expected[1]) < TOLERANCE


@by_case()
@few
@given(
    seed=seeds,
    num=st.integers(2, 6),
    layout=st.sampled_from(["forest", "rows", "separate"]),
    max_tokens=st.integers(1, 120),
    random=st.randoms(use_true_random=False),
)
def test_order_micro_batches_and_packing_change_nothing(case, seed, num, layout, max_tokens, random, measure):
    examples = case.examples(num, seed)
    shuffled = examples if case.of_order else random.sample(examples, num)
    assert_same(measure(case, shuffled, layout, max_tokens), measure(case, examples))


@by_case(lambda case: not case.of_count)
@few
@given(seed=seeds, counts=st.lists(st.integers(1, 3), min_size=3, max_size=5), max_tokens=st.integers(1, 120))
def test_a_row_several_times_is_a_row_of_more_weight(case, seed, counts, max_tokens, measure):
    examples = case.examples(len(counts), seed)
    weighted = [replace(e, weight=e.weight * n) for e, n in zip(examples, counts, strict=True)]
    repeated = [e for e, n in zip(examples, counts, strict=True) for _ in range(n)]
    assert_same(measure(case, repeated, max_tokens=max_tokens), measure(case, weighted))


@by_case(lambda case: case.objective in ("aot", "aot_unpaired"))
@few
@given(seed=seeds, times=st.integers(2, 3))
def test_all_rows_several_times_are_the_same_distributions(case, seed, times, measure):
    examples = case.examples(4, seed)
    assert_same(measure(case, examples * times, max_tokens=50), measure(case, examples))


def mirrors(case):
    """Losses of pairs that add nothing to one side alone, and that single pairs may turn."""
    found = objective(case.objective)
    likelihood = {**found.knobs, **case.knobs}.get("nll_coef", 0.0)
    return found.records == "pairs" and not likelihood and not found.couples


@by_case(mirrors)
@few
@given(seed=seeds, num=st.integers(1, 4))
def test_swapping_chosen_and_rejected_mirrors_the_loss(case, seed, num, measure):
    examples = case.examples(num, seed)
    swapped = [
        replace(e, chosen=e.rejected, rejected=e.chosen, probability=1 - e.probability, margin=-e.margin)
        for e in examples
    ]
    assert_same(measure(case, swapped), measure(case, examples))


@by_case(lambda case: case.objective == "kto")
@few
@given(seed=seeds, num=st.integers(2, 5))
def test_calling_good_bad_turns_kto_around(case, seed, num, measure):
    """L_D + L_U = λ for a sample under one label and the other."""
    examples = case.examples(num, seed)
    good, bad = (case.knobs.get(f"{side}_weight", 1.0) for side in ("desirable", "undesirable"))
    turned = replace(case, knobs={**case.knobs, "desirable_weight": bad, "undesirable_weight": good})
    opposite = [replace(e, desirable=not e.desirable) for e in examples]
    loss, gradients = measure(case, examples)
    other_loss, other_gradients = measure(turned, opposite)
    total = sum(e.weight * (good if e.desirable else bad) for e in examples) / sum(e.weight for e in examples)
    assert loss + other_loss == pytest.approx(total, rel=TOLERANCE)
    assert relative_error(-other_gradients, gradients) < 1e-8


def pairs_that_begin_alike(seed):
    """Two pairs, each with a prompt of its own, whose sides sample the same first tokens and differ in length."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in (0, 1):
        prompt = [3 + i, *random_tokens(rng, 0, 4)]
        begun = prompt + random_tokens(rng, 1, 4)
        chosen, rejected = [*begun, 10, *random_tokens(rng, 0, 3)], [*begun, 11, *random_tokens(rng, 4, 6)]
        pairs.append(PreferencePair((path(chosen, len(prompt)),), (path(rejected, len(prompt)),)))
    return pairs


@by_case(lambda case: objective(case.objective).records == "pairs" and case.head == "logits")
@few
@given(seed=seeds)
def test_tokens_of_both_sides_have_no_gradient_where_the_loss_is_of_a_difference_of_sums(case, seed):
    """The gradient with respect to tokens' own log-probs; of other losses it must not vanish."""
    batch = pack(pairs_that_begin_alike(seed))
    logprob_T, ref_T = -3 * torch.rand(2, batch.num_tokens, generator=torch.Generator().manual_seed(seed)).double()
    logprob_T.requires_grad_()
    batch = replace(batch, ref_logprob_V=ref_T[batch.visit_token_V])
    terms = case.algorithm.loss(batch, logprob_T[batch.visit_token_V]).terms
    sum(term.coef * (batch.weight(term.unit) * term.value_U).sum() for term in terms).backward()
    shared_T = torch.bincount(batch.visit_token_V[batch.loss_visits], minlength=batch.num_tokens) == 2
    assert shared_T.any()
    vanishes = bool((logprob_T.grad[shared_T] == 0).all())
    assert vanishes == case.of_difference or case.objective == "aot_unpaired"  # whose ranks may pair the pairs' sides
