import math
from dataclasses import replace

import pytest
import torch

from packed_examples import agent_labels, agent_steps, path, random_demonstrations, random_pairs
from prefloop.batch.examples import PreferencePair
from prefloop.batch.packed import pack
from prefloop.records import PrefloopError
from prefloop.training.algorithms import make_algorithm, sum_by_sample


def scored_pair():
    """A pair whose sides share one sampled token; log-probs by token id, the reference's all 0."""
    pair = PreferencePair((path([1, 2, 3, 4], 1),), (path([1, 2, 5], 1), path([1, 6], 1)))
    batch = pack([pair])
    table = torch.tensor([0.0, 0.0, -1.0, -2.0, -3.0, -0.5, -0.25])
    logprob_T = table[batch.token_T].requires_grad_()
    object.__setattr__(batch, "ref_logprob_V", torch.zeros(len(batch.visit_token_V)))
    return batch, logprob_T


def test_sums_are_over_the_loss_tokens_of_all_paths_of_a_sample():
    batch, logprob_T = scored_pair()
    visit_U = batch.loss_visits
    assert sum_by_sample(batch, visit_U, logprob_T[batch.visit_token_V][visit_U]).tolist() == [-6.0, -1.75]


def test_dpo_values_metrics_and_the_credit_of_a_shared_token():
    batch, logprob_T = scored_pair()
    loss = make_algorithm("dpo", beta=0.2).loss(batch, logprob_T[batch.visit_token_V])
    assert float(loss.terms[0].value_U) == pytest.approx(math.log(1 + math.exp(0.2 * 4.25)))
    metrics = {name: float(value) for name, value in loss.metric_U.items()}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": -1.2,
            "rewards/rejected": -0.35,
            "rewards/margins": -0.85,
            "rewards/accuracies": 0.0,
            "logps/chosen": -6.0,
            "logps/rejected": -1.75,
        }
    )
    loss.terms[0].value_U.sum().backward()
    slope = 0.2 / (1 + math.exp(-0.2 * 4.25))
    by_token = dict(zip(batch.token_T.tolist(), logprob_T.grad.tolist(), strict=True))
    assert by_token == pytest.approx({1: 0.0, 2: 0.0, 3: -slope, 4: -slope, 5: slope, 6: slope})


def test_the_likelihood_term_is_the_chosen_mean_per_token():
    batch, logprob_T = scored_pair()
    plain = make_algorithm("dpo").loss(batch, logprob_T[batch.visit_token_V]).terms[0].value_U
    with_nll = make_algorithm("dpo", nll_coef=0.5).loss(batch, logprob_T[batch.visit_token_V])
    assert torch.equal(with_nll.terms[0].value_U, plain)
    assert (with_nll.terms[1].unit, with_nll.terms[1].coef, with_nll.terms[1].value_U.tolist()) == ("pair", 0.5, [2.0])
    assert float(with_nll.metric_U["nll_loss"]) == 2.0


@pytest.mark.parametrize("scope", ["completion", "sequence"])
def test_nll_loss_is_the_term_that_is_added(scope):
    batch = pack(random_pairs(5))
    logprob_V = -torch.rand(len(batch.visit_token_V), generator=torch.Generator().manual_seed(0))
    found = make_algorithm("orpo", nll_scope=scope).loss(batch, logprob_V)
    torch.testing.assert_close(found.metric_U["nll_loss"], found.terms[1].value_U)


def test_labels_of_one_half_are_neither_right_nor_wrong():
    batch = pack(agent_steps(12))
    labels = torch.tensor([1.0, 0.0, 0.5]).double().repeat(len(batch.step_label_K))[: len(batch.step_label_K)]
    score_VH = torch.ones(len(batch.visit_token_V), 1)
    found = make_algorithm("process_reward").loss(replace(batch, step_label_K=labels), score_VH).metric_U["accuracy"]
    torch.testing.assert_close(found, torch.where(labels == 0.5, torch.nan, labels), equal_nan=True)


def test_kto_without_a_reference_point_logs_none():
    batch = pack(agent_labels(6))
    batch = replace(batch, ref_logprob_V=torch.zeros(len(batch.visit_token_V)))
    algorithm, logprob_V = make_algorithm("kto", kl="none"), -torch.ones(len(batch.visit_token_V))
    assert "kl" not in algorithm.loss(batch, logprob_V).metric_U
    assert "kl" in algorithm.loss(replace(batch, kl=torch.tensor(0.1)), logprob_V).metric_U


def test_sft_has_one_value_for_each_loss_token():
    batch = pack(random_demonstrations(5))
    logprob_V = torch.randn(len(batch.visit_token_V))
    assert torch.equal(make_algorithm("sft").loss(batch, logprob_V).terms[0].value_U, -logprob_V[batch.loss_mask_V])


def test_every_algorithm_gives_one_value_and_metric_for_each_of_its_units():
    for algorithm in (make_algorithm("sft"), make_algorithm("dpo")):
        examples = random_pairs(4) if algorithm.records == "pairs" else random_demonstrations(4)
        batch = pack(examples)
        object.__setattr__(batch, "ref_logprob_V", torch.zeros(len(batch.visit_token_V)))
        loss = algorithm.loss(batch, torch.randn(len(batch.visit_token_V)))
        for values in (loss.terms[0].value_U, *loss.metric_U.values()):
            assert values.shape == batch.weight(loss.terms[0].unit).shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta should be"),
        ({"beta": math.nan}, "beta should be"),
        ({"label_smoothing": 0.5}, "label_smoothing should be"),
        ({"nll_coef": -1.0}, "nll_coef should be"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(PrefloopError, match=message):
        make_algorithm("dpo", **settings)
