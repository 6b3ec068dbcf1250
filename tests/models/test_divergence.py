"""KL over the vocabulary at the tokens of a forest: against whole logits of padded rows, and listed completions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from packed_examples import VOCAB, branching_demonstrations, padded, path, paths_of, perturbed, tiny_model
from prefloop.batch.examples import Demonstration
from prefloop.batch.packed import pack
from prefloop.evaluation import full_vocabulary_kl, kl_summary, summarise_kl
from prefloop.models import forward as forward_module
from prefloop.models.divergence import divergence
from prefloop.training.logprobs import divergences_of, logprobs_of

WORDS, LENGTH = range(10, 14), 3


def divergence_of_rows(policy, reference, paths):
    """The same by NumPy, an array for each path, from plain padded logits over the whole vocabulary."""
    ids, mask = padded(paths)
    logprobs = []
    for model in (policy, reference):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
        logprobs.append(torch.log_softmax(logits, -1).detach().numpy())
    found = []
    for i, one in enumerate(paths):
        before = np.flatnonzero(one.loss_mask) - 1
        kl = np.zeros(len(one.token))
        kl[one.loss_mask] = full_vocabulary_kl(logprobs[0][i, before], logprobs[1][i, before])
        found.append(kl)
    return found


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mamba2"])  # gemma2 caps its logits, mamba2 shares no prefixes
def test_it_is_that_of_padded_rows(kind):
    settings = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8} if kind == "mamba2" else {}
    policy = tiny_model(kind, **settings).eval()
    reference, examples = perturbed(policy).eval(), branching_demonstrations()
    found = [array for one in divergences_of(policy, reference, examples, max_tokens=20) for array in one]
    expected = divergence_of_rows(policy, reference, paths_of(examples))
    assert max(array.max() for array in expected) > 0.01
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_policy_is_no_distance_from_itself():
    policy = tiny_model().eval()
    assert not divergence(policy, perturbed(policy, 0.0), pack(branching_demonstrations())).any()


def test_no_more_than_three_chunks_of_logits_are_ever_in_memory(monkeypatch):
    policy = tiny_model(vocab_size=20_000, tie_word_embeddings=True).eval()
    reference = perturbed(policy).eval()
    batch = pack([Demonstration((path(np.arange(3, 103) % VOCAB, 4),)) for _ in range(2)])
    whole = divergence(policy, reference, batch)
    monkeypatch.setattr(forward_module, "CHUNK_LOGITS", 5 * 20_000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        in_chunks = divergence(policy, reference, batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))
    torch.testing.assert_close(in_chunks, whole)
    assert peak < 3.5 * 4 * 5 * 20_000 < 0.2 * 4 * 96 * 20_000


def only_words(model, seed):
    """A head under which the words alone have a chance."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.full((VOCAB,), -200.0, dtype=torch.float64)
    bias[list(WORDS)] = torch.randn(len(WORDS), generator=generator, dtype=torch.float64)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCAB, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.2, generator=generator)
        model.lm_head.bias.copy_(bias)
    return model.eval()


def test_its_sum_over_completions_is_their_kl_and_varies_less_than_k1():
    """Every completion of three words with its probability: means and variances are exact."""
    policy, reference = (only_words(tiny_model("llama", dtype=torch.float64), seed) for seed in (1, 2))
    completions = list(itertools.product(WORDS, repeat=LENGTH))
    examples = [Demonstration((path([1, 7, *words], 2),)) for words in completions]
    own, other = (np.array([array[0].sum() for array in logprobs_of(model, examples)]) for model in (policy, reference))
    probability, k1 = np.exp(own), own - other
    assert probability.sum() == pytest.approx(1.0, abs=1e-6)
    exact = float((probability * k1).sum())
    summed = np.array([arrays[0].sum() for arrays in divergences_of(policy, reference, examples)])
    assert (probability * summed).sum() == pytest.approx(exact, rel=1e-6) and exact > 0.3

    def deviation(value):
        return float(np.sqrt((probability * (value - exact) ** 2).sum()))

    assert deviation(summed) < 0.5 * deviation(k1)

    drawn = np.random.default_rng(0).choice(len(completions), size=400, p=probability / probability.sum())
    by_vocabulary = summarise_kl([summed[[i]] for i in drawn])
    by_sample = kl_summary([own[[i]] for i in drawn], [other[[i]] for i in drawn])
    for found, value in ((by_vocabulary, summed), (by_sample, k1)):
        assert abs(found.per_trajectory - exact) < 4 * found.per_trajectory_se
        assert found.per_trajectory_se == pytest.approx(deviation(value) / 20, rel=0.2)
