import pytest
import torch

from packed_examples import path, tiny_model
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import forest_layout, rows_layout
from prefloop.batch.packed import pack
from prefloop.models.forward import forward
from prefloop.records import PrefloopError

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 12,
        "factor": 4.0,
    },
    "original_max_position_embeddings": 12,
    "head_dim": 8,
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "max_position_embeddings": 12,
}


def paths_of_lengths(*lengths):
    return pack([Demonstration((path([1, 2, 3, *[4 + i] * (n - 3)], 2),)) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("lengths", [(8, 12), (13, 20)])
@pytest.mark.parametrize("layout", [forest_layout, rows_layout])
def test_paths_on_one_side_have_the_positions_that_they_have_alone(lengths, layout):
    model, batch = tiny_model("phi3", **LONGROPE), paths_of_lengths(*lengths)
    logprob_V = forward(model, batch, layout=layout(batch)).logprob_T[batch.visit_token_V]
    start = 0
    for length in lengths:
        tokens = batch.token_T[batch.visit_token_V[start : start + length]]
        logits = model(tokens[None]).logits[0]
        alone = torch.log_softmax(logits, -1)[:-1].gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(logprob_V[start + 2 : start + length], alone[1:], rtol=1e-5, atol=1e-5)
        start += length


def test_what_would_be_silently_wrong():
    """Beside a longer row, a row is not what it is alone: in transformers itself."""
    model = tiny_model("phi3", **LONGROPE).eval()
    ids = torch.arange(1, 21).repeat(2, 1)
    assert (model(ids).logits[0, :8] - model(ids[:1, :8]).logits[0]).abs().max() > 0.01


@pytest.mark.parametrize("layout", [forest_layout, rows_layout])
def test_paths_on_both_sides_are_refused(layout):
    batch = paths_of_lengths(8, 13)
    with pytest.raises(PrefloopError, match=r"paths of 8 to 13 tokens: beyond 12 .*\(longrope\).* longer ones apart"):
        forward(tiny_model("phi3", **LONGROPE), batch, layout=layout(batch))


def test_dynamic_scaling_is_refused_beyond_its_length():
    model = tiny_model("llama", **DYNAMIC)
    forward(model, paths_of_lengths(8, 12))
    with pytest.raises(PrefloopError, match=r"beyond 12 .*\(dynamic\).*; limit paths to 12 tokens$"):
        forward(model, paths_of_lengths(13, 13))


def test_parameters_of_each_kind_of_layer_are_looked_at():
    rope = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
    rope["full_attention"] |= DYNAMIC["rope_parameters"]
    layers = {"layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 12}
    model = tiny_model("gemma3_text", rope_parameters=rope, **layers)
    forward(model, paths_of_lengths(8, 12))
    with pytest.raises(PrefloopError, match="dynamic"):
        forward(model, paths_of_lengths(8, 13))
