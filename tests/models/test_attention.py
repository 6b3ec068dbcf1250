import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_examples import VOCAB, branching_demonstrations, path, tiny_model
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import forest_layout, segments_of
from prefloop.batch.packed import pack
from prefloop.models import attention
from prefloop.models.attention import cascade_attention, disable_dropout, is_sharing, sharing, why_not_shared
from prefloop.models.piecewise import piecewise_attention
from prefloop.records import PrefloopError

token_paths = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=8)


def inputs(num_tokens, dtype, heads=4, kv_heads=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, num_tokens, h, size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=dtype, generator=generator).transpose(1, 2).requires_grad_() for s in shapes]


def dense(q, k, v, batch):
    index = torch.arange(batch.num_tokens)
    mask = (index[None] <= index[:, None]) & (index[:, None] < batch.end_T[None])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def assert_same_as_dense(batch, dtype, tolerance):
    q, k, v = inputs(batch.num_tokens, dtype)
    ours = cascade_attention(q, k, v, segments_of(batch), q.shape[-1] ** -0.5)
    theirs = dense(q, k, v, batch)
    weight = torch.randn(theirs.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


@given(token_paths)
@settings(deadline=None, max_examples=40)
def test_cascade_equals_a_dense_mask_on_any_forest(paths):
    assert_same_as_dense(pack([Demonstration((path(p, 1),)) for p in paths]), torch.float64, 1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_cascade_equals_a_dense_mask_on_longer_branches(dtype, tolerance):
    root = list(range(50))
    paths = [root + [60] * 70, root + [59] * 3 + [58] * 40, root + [59] * 3 + [57] * 5, [56] * 30]
    assert_same_as_dense(pack([Demonstration((path(p, 1),)) for p in paths]), dtype, tolerance)


def dense_variant(q, k, v, batch, window, softcap):
    index, depth = torch.arange(batch.num_tokens), batch.depth_T
    seen = (index[None] <= index[:, None]) & (index[:, None] < batch.end_T[None])
    seen &= depth[:, None] - depth[None] < (window or batch.num_tokens)
    group = q.shape[1] // k.shape[1]
    score = 0.25 * q @ k.repeat_interleave(group, 1).transpose(-1, -2)
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    return score.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)


FLEX = [(None, None), (3, None), (None, 2.0)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_same(monkeypatch):
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    batch = pack(branching_demonstrations())
    q, k, v = (x.detach() for x in inputs(batch.num_tokens, torch.float32, size=16))
    for window, softcap in FLEX:
        ours = attention._flex_attention(q, k, v, forest_layout(batch), 0.25, window, softcap)
        torch.testing.assert_close(ours, dense_variant(q, k, v, batch, window, softcap), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_compiled_flex_attention_gives_the_same_as_the_cascade():
    """Forward alone: on a CPU FlexAttention has no backward."""
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(61, (200,), generator=rng).tolist()
    completions = [torch.randint(61, (60 + 30 * i,), generator=rng).tolist() for i in range(3)]
    batch = pack([Demonstration((path(prompt + completion, 200),)) for completion in completions])
    q, k, v = (x.detach() for x in inputs(batch.num_tokens, torch.float32, size=16))
    forest = forest_layout(batch)
    with torch.no_grad():
        ours = attention._flex_attention(q, k, v, forest, 0.25, None, None)
        torch.testing.assert_close(ours, cascade_attention(q, k, v, forest.segments, 0.25), rtol=0, atol=2e-6)
        windowed = attention._flex_attention(q, k, v, forest, 0.25, 50, 2.0)
        exact = piecewise_attention(q, k, v, forest.segments, 0.25, window=50, softcap=2.0)
        torch.testing.assert_close(windowed, exact, rtol=0, atol=2e-6)


def test_generation_is_untouched_before_within_and_after():
    model = tiny_model()
    ids = torch.arange(1, 9)[None]
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    with sharing(model):
        assert is_sharing(model)
        with pytest.raises(PrefloopError, match="outside prefloop's forward"):
            model(input_ids=ids)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)


def test_attention_is_restored_after_an_error():
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), sharing(model):
        raise ZeroDivisionError
    assert not is_sharing(model)


HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gpt_neox", {}, "architecture 'gpt_neox' is not on the list"),
        ("mamba", {"state_size": 4}, "'linear_attention' are no attention to all ancestors"),
        ("falcon_h1", {}, "'hybrid' are no attention"),
        ("recurrent_gemma", {}, "'linear_attention' are no attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "'conv' are no attention"),
        ("qwen3_next", HYBRID | {"num_experts": 0}, "'linear_attention' are no attention"),
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention' are no attention"),
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("gpt_oss", {"num_local_experts": 2, "layer_types": ["full_attention"] * 2}, "its attention has sinks"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its attention is not causal"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is on"),
        ("mixtral", {"num_local_experts": 2, "router_jitter_noise": 0.1}, "jitter_noise is on"),
    ],
)
def test_models_that_cannot_share_say_why(kind, settings, reason):
    assert reason in why_not_shared(tiny_model(kind, **settings).train())


MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        (transformers.Qwen2_5_VLConfig(text_config=MROPE), "its positions have three axes (M-RoPE)"),
        (transformers.FalconConfig(alibi=True), "its attention is biased by the distance in the row (ALiBi)"),
        (transformers.Llama4TextConfig(), "layers of the kind 'chunked_attention'"),
        (transformers.JambaConfig(), "layers of the kind 'linear_attention'"),
        (transformers.LlamaConfig(), ""),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_configs_tell_of_obstacles(config, obstacle):
    found = attention._obstacle(config)
    assert found.startswith(obstacle) and bool(found) == bool(obstacle)


def test_noise_matters_only_while_training_and_can_be_switched_off(caplog):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(attention_dropout=0.2), lora)
    assert why_not_shared(model.train()).startswith("attention_dropout, dropout is on")
    assert why_not_shared(model.eval()) == ""
    disable_dropout(model)
    assert caplog.messages == [
        "switched off, since a token that several samples share is computed once: attention_dropout, dropout"
    ]
    assert why_not_shared(model.train()) == ""
    assert model.config.attention_dropout == 0
    disable_dropout(model)
    assert len(caplog.messages) == 1


def test_dropout_that_is_read_from_the_config_is_switched_off_and_layers_stay_layers():
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.FalconConfig(**shape, attention_dropout=0.1, hidden_dropout=0.1)
    model = transformers.FalconForCausalLM(config)
    disable_dropout(model.train())
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("extra", [{"dropout": 0.1}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(4)}])
def test_what_the_kernel_does_not_know_is_refused(extra):
    batch = pack(branching_demonstrations())
    q, k, v = inputs(batch.num_tokens, torch.float32)
    with pytest.raises(PrefloopError, match="neither dropout nor sinks nor position biases"):
        attention._registered(
            tiny_model().model.layers[0].self_attn, q, k, v, None, forest=forest_layout(batch), **extra
        )


def test_adapters_with_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    tuning = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), tuning)
    with pytest.raises(PrefloopError, match=r"virtual tokens .* are not supported; use LoRA"):
        why_not_shared(model)
