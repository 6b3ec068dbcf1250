"""What a forward keeps and what a head needs at its peak, counted by byte: the budgets are budgets of memory."""

import numpy as np
import pytest
import torch

from packed_examples import VOCAB, path, tiny_model
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import forest_layout
from prefloop.batch.packed import pack
from prefloop.models import forward as forward_module
from prefloop.models.attention import sharing
from prefloop.models.forward import hidden_states


def tree(num_paths, prompt, completion):
    rng = np.random.default_rng(0)
    root = rng.integers(3, VOCAB, prompt).tolist()
    return pack(
        [Demonstration((path([*root, i, *rng.integers(3, VOCAB, completion)], prompt),)) for i in range(num_paths)]
    )


def kept_per_token(model, batch):
    """Float32 numbers that the forward keeps for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sharing(model):
        hidden_states(model, forest_layout(batch))
    sizes = [tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights]
    return sum(sizes) / 4 / batch.num_tokens


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(("hidden", "feed_forward", "heads"), [(32, 48, 4), (64, 256, 8)])
def test_memory_grows_with_computed_tokens_whatever_the_shape_of_the_tree(kind, hidden, feed_forward, heads):
    """As `prefloop.batch.packing` says; queries are `heads` times 16 wide, keys and values 2 times 16."""
    shape = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_attention_heads": heads}
    model = tiny_model(kind, **shape).train()
    found = [kept_per_token(model, tree(*numbers)) for numbers in ((4, 20, 40), (4, 40, 80), (16, 20, 10), (2, 60, 1))]
    assert max(found) < 1.02 * min(found)
    estimate = 2 * (8 * hidden + 4 * 16 * heads + 3 * 32 + 4 * feed_forward)
    assert 0.75 * estimate < found[0] < 1.25 * estimate
    model.gradient_checkpointing_enable()
    assert kept_per_token(model, tree(4, 20, 40)) < 1.1 * (2 + 2) * hidden


def peak_bytes(run):
    """The most that was allocated at a time while it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))


WIDTH, WORDS, CHUNK = 16, 4000, 64


def peak_of_head(head, num_tokens, logit_budget=0):
    hidden, token = torch.randn(num_tokens, WIDTH, requires_grad=True), torch.randint(WORDS, (num_tokens,))

    def run():
        logprob, _ = forward_module._scored(hidden, forward_module._Head(head, 1.0, False), token, logit_budget)
        logprob.sum().backward()

    return peak_bytes(run)


def capped(linear):
    return lambda hidden: 30 * torch.tanh(linear(hidden) / 30)


@pytest.mark.parametrize(("wrap", "chunks"), [(lambda linear: linear, 4), (capped, 8)], ids=["linear", "own"])
def test_the_peak_of_the_head_grows_with_the_chunk_and_not_with_the_tokens(wrap, chunks, monkeypatch):
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", CHUNK)
    head = wrap(torch.nn.Linear(WIDTH, WORDS, bias=False))
    peak_of_head(head, CHUNK)  # buffers that are allocated once
    logits_of_a_chunk = CHUNK * WORDS * 4
    few, many = peak_of_head(head, 2 * CHUNK), peak_of_head(head, 16 * CHUNK)
    assert many < chunks * logits_of_a_chunk
    assert many - few < 0.25 * logits_of_a_chunk  # hidden states and their gradient
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", 4 * CHUNK)
    assert peak_of_head(head, 16 * CHUNK) > 2.5 * many


def test_logits_within_the_budget_are_kept_and_no_others(monkeypatch):
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", CHUNK)
    head = torch.nn.Linear(WIDTH, WORDS, bias=False)
    all_logits = 16 * CHUNK * WORDS * 4
    assert peak_of_head(head, 16 * CHUNK, all_logits) > all_logits
    assert peak_of_head(head, 16 * CHUNK, all_logits - 1) < 0.5 * all_logits
