"""The plan's formulas against what torch, peft and the sampler's cache really hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from packed_examples import path
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import forest_layout
from prefloop.batch.packed import pack
from prefloop.models.attention import sharing
from prefloop.models.forward import hidden_states
from prefloop.models.kv_cache import KVRows, Shape
from prefloop.models.load import lora_config
from prefloop.planning import memory
from prefloop.planning.memory import Sampling, Setup, Update
from prefloop.planning.shapes import shape_of, shape_of_config

CONFIG = {
    "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 3, "vocab_size": 70, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2,
}  # fmt: skip
KINDS = ("llama", "qwen2", "qwen3", "gemma3_text", "olmo2")
RANK = 8


def model_of(kind, dtype=torch.float32, **changes):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**CONFIG, **changes}), dtype=dtype)


def shape(kind, **changes):
    return shape_of_config(AutoConfig.for_model(kind, **{**CONFIG, **changes}).to_dict(), kind)


def setup_for(kind, dtype="float32", rank=None, precision="float32", checkpointing=False, max_tokens=4096, **changes):
    return Setup(shape(kind, **changes), dtype, rank, "cpu", precision, checkpointing, max_tokens)


def with_adapter(model):
    from peft import get_peft_model

    return get_peft_model(model, lora_config(type("Lora", (), {"rank": RANK, "alpha": 16}), model))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model_and_its_adapter(kind, tied, tmp_path):
    model = model_of(kind, tie_word_embeddings=tied)
    real = sum(p.numel() for p in model.parameters())
    found = shape(kind, tie_word_embeddings=tied)
    assert found.num_parameters == real
    assert found.num_body_parameters == real - (1 if tied else 2) * 70 * 96
    model.save_pretrained(tmp_path)
    read = shape_of(tmp_path)
    assert (read.num_parameters, read.stored_bytes) == (real, 4 * real)
    adapter = with_adapter(model)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert found.num_adapter_parameters(RANK) == trained


def test_all_experts_are_held_and_few_are_passed():
    config = {
        "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 64, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    }  # fmt: skip
    found = shape_of_config(config, "a test")
    assert found.feed_forward == 96
    attention = 4 * 32 * 32 + 2 * 16 + 2 * 32  # projections, norms of queries and keys, norms of the layer
    assert found.num_parameters == 2 * (attention + 3 * 32 * 48 * 8) + 32 + 64 * 32


def kept_per_token(model, mixed):
    """Bytes that the forward keeps for the backward pass, weights and their copies aside."""
    batch = pack([Demonstration((path([*range(3, 43), 43 + i, *range(3, 20)], 40),)) for i in range(4)])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes |= {one[::-1] for one in shapes}
    kept = {}

    def keep(tensor):
        copy = mixed and tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if not copy:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, sharing(model), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        hidden_states(model, forest_layout(batch))
    sizes = [tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights]
    return sum(sizes) / batch.num_tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("dtype", "precision"), [("float32",) * 2, ("bfloat16",) * 2, ("float32", "bfloat16")])
def test_what_a_layer_keeps_of_a_token(kind, adapter, dtype, precision):
    def of_layers(number):
        model = model_of(kind, getattr(torch, dtype), num_hidden_layers=number).train()
        return kept_per_token(with_adapter(model).train() if adapter else model, dtype != precision)

    setup = setup_for(kind, dtype, RANK if adapter else None, precision)
    rel = 0.15 if kind == "olmo2" else 0.04  # its norms over all heads together keep a little more
    assert setup.kept_per_token() == pytest.approx(of_layers(3) - of_layers(2), rel=rel)


@pytest.mark.parametrize("positions", [1, 64, 65, 200, 500])
@pytest.mark.parametrize("first", [0, 40, 130])
def test_the_cache_has_the_room_that_rows_reserve(positions, first):
    if positions < first:
        return
    rows = KVRows(Shape(1, 1, 4, torch.float32, torch.device("cpu")))
    rows.add(["a"])
    for length in range(max(1, first), positions + 1):
        rows.reserve(length)
    assert memory._room(positions, first) == rows.memory.shape[4]


def test_the_bytes_of_a_position_are_those_of_the_cache():
    setup = setup_for("llama", "bfloat16")
    rows = KVRows(Shape(3, 2, 16, torch.bfloat16, torch.device("cpu")))
    rows.add(["a", "b"])
    rows.reserve(64)
    assert 2 * 64 * memory.position_bytes(setup) == rows.memory.numel() * rows.memory.itemsize


def test_an_update_holds_weights_reference_gradients_moments_and_activations():
    setup = setup_for("llama")
    found = memory.update_peak(setup, "train", Update(1000, 500, 3), 0, 0).parts
    weights, slack = 4 * setup.shape.num_parameters, memory.SLACK["cpu"]
    assert found["weights"] == found["reference"] == int(slack * weights)
    assert found["optimizer"] == int(slack * 2 * weights)
    kept = 1000 * 3 * setup.kept_per_token()
    assert kept * 0.95 < found["activations"] < kept * 1.3
    several = memory.update_peak(setup, "train", Update(10_000, 5000, 3), 0, 0).parts
    assert several["gradients"] == int(slack * weights)
    assert several["activations"] == pytest.approx(4.096 * kept * slack, rel=0.05)  # no more than a pack


def test_an_adapter_shares_its_base_with_the_reference_and_trains_little():
    full, lora = (setup_for("llama", rank=rank) for rank in (None, RANK))
    parts = [memory.update_peak(one, "train", Update(1000, 500, 3), 0, 0).parts for one in (full, lora)]
    assert parts[1]["reference"] == 0
    adapter = 4 * lora.shape.num_adapter_parameters(RANK)
    assert parts[1]["optimizer"] == int(memory.SLACK["cpu"] * 2 * adapter)
    trained = replace(lora, shape=replace(lora.shape, adapter_rank=RANK))  # the start policy had an adapter of its own
    assert memory._models(trained)["reference"] == adapter


def test_checkpointing_keeps_inputs_of_layers_and_one_layer():
    setup = setup_for("llama", checkpointing=True)
    assert memory._kept(setup, 100) == 100 * ((3 + 2) * 96 * 4 + setup.kept_per_token())


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "kv_heads", "measured"), [(28, 1024, 16, 8, 105_000), (28, 1536, 12, 2, 131_000)]
)
def test_a_path_beyond_a_pack_takes_what_was_measured_for_a_token(layers, hidden, heads, kv_heads, measured):
    """docs/training.md: bfloat16 with LoRA, at the widths of Qwen3-0.6B and Qwen2.5-1.5B."""
    config = {
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    }  # fmt: skip
    setup = Setup(shape_of_config(config, "a test"), "bfloat16", RANK, "cpu", "bfloat16", True, 4096)
    assert memory._long_path_per_token(setup) == pytest.approx(measured, rel=0.03)
    longest = [memory.update_peak(setup, "train", Update(80_000, 4000, 3, n), 0, 0).total for n in (0, 4096, 40_000)]
    assert longest[0] == longest[1]
    assert longest[2] - 0.8 * 40_000 * measured > 0
    scored = [memory.scoring_peak(setup, "KL", 80_000, 0, 0, n).total for n in (0, 40_000)]
    assert scored[0] < scored[1]


def test_loading_holds_a_file_of_another_type_beside_the_weights():
    setup = setup_for("llama", "bfloat16")
    stored = replace(setup, shape=replace(setup.shape, stored_bytes=4 * setup.shape.num_parameters))
    found = memory.load_peak(stored, 0).parts
    assert found["file"] == 2 * found["weights"]
    same = replace(setup, shape=replace(setup.shape, stored_bytes=2 * setup.shape.num_parameters))
    assert memory.load_peak(same, 0).parts["file"] == 0


def test_rows_of_one_task_share_its_prompt():
    setup = setup_for("llama")
    alone = memory.cache_bytes(setup, Sampling(8, 8, 100, 50))
    shared = memory.cache_bytes(setup, Sampling(8, 1, 100, 50))
    assert shared == (8 * 64 + 128) * memory.position_bytes(setup)
    assert alone == (8 * 256 + 8 * 128) * memory.position_bytes(setup)  # full at 128, and given twice as much


def test_sizes_are_refused_where_a_configuration_does_not_say_them():
    from prefloop.records import PrefloopError

    with pytest.raises(PrefloopError, match="does not say hidden size"):
        shape_of_config({"model_type": "x"}, "here")


def test_a_forward_takes_the_operations_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from prefloop.planning import timing

    setup, tokens = setup_for("llama"), 64
    model = model_of("llama", attn_implementation="eager")
    ids = torch.from_numpy(np.arange(tokens)[None] % 70)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    attention = 4 * 3 * setup.shape.query_width * tokens  # torch counts all scores, not those below the diagonal alone
    ours = tokens * (timing._forward(setup, 0.0) + attention + 2 * 70 * 96)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_only_layers_are_rounded_to_few_bits():
    plain, rounded = (
        setup_for("llama", "bfloat16", RANK),
        replace(setup_for("llama", "bfloat16", RANK), quantization="4bit"),
    )
    body = plain.shape.num_body_parameters
    assert plain.base_bytes - rounded.base_bytes == 2 * body - int(0.516 * body)
