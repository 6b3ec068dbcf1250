import pytest
import torch

from packed_examples import branching_demonstrations, random_pairs, tiny_model
from prefloop.batch.layout import Segment, forest_layout, segments_of
from prefloop.batch.packed import pack
from prefloop.models.attention import sharing
from prefloop.models.forward import hidden_states
from prefloop.models.last_layer import asking_segments


def test_the_part_of_a_segment_before_its_first_read_token_asks_nothing():
    segments = (Segment(0, 5, 9), Segment(5, 7, 7), Segment(7, 9, 9))
    found = asking_segments(segments, torch.tensor([4, 7, 8]))
    assert found == (
        Segment(0, 4, 9, asks=False),
        Segment(4, 5, 9),
        Segment(5, 7, 7, asks=False),
        Segment(7, 9, 9),
    )


@pytest.mark.parametrize("examples", [branching_demonstrations(), random_pairs(9, seed=3)], ids=["branches", "pairs"])
@pytest.mark.parametrize("kind", ["qwen3", "olmo2"])
def test_read_states_and_the_gradient_are_those_of_the_whole_layer(kind, examples):
    batch = pack(examples)
    layout = forest_layout(batch)
    generator = torch.Generator().manual_seed(0)
    read_R = torch.nonzero(torch.rand(batch.num_tokens, generator=generator) < 0.3)[:, 0]
    model = tiny_model(kind, dtype=torch.float64)
    found = []
    for narrow in (None, read_R):
        model.zero_grad()
        hidden = hidden_states(model, layout, narrow)[read_R]
        hidden.sin().sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((hidden.detach(), torch.cat(grads)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_unread_tokens_are_not_fed_forward_and_no_hook_is_left():
    batch = pack(random_pairs(3))
    model = tiny_model()
    mlp, seen = model.model.layers[-1].mlp, []
    handle = mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    hidden_states(model, forest_layout(batch), torch.tensor([2, 2, 4]))
    handle.remove()
    assert seen == [2]
    assert not mlp._forward_hooks and not mlp._forward_pre_hooks


def test_with_gradient_checkpointing_the_whole_layer_is_computed():
    """The backward pass runs the layer again, when the hooks are gone."""
    batch = pack(random_pairs(3))
    layout, read_R = forest_layout(batch), torch.tensor([1, 3])
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with sharing(model):
            hidden_states(model, layout, read_R)[read_R].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    assert segments_of(batch) == layout.segments
