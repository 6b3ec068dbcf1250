import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_examples import branching_demonstrations, path, tiny_model
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import segments_of
from prefloop.batch.packed import pack
from prefloop.models import attention
from prefloop.models.attention import cascade_attention, is_sharing, sharing, why_not_shared
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


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_same(monkeypatch):
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    batch = pack(branching_demonstrations())
    q, k, v = (x.detach() for x in inputs(batch.num_tokens, torch.float32, size=16))
    ours = attention._flex_attention(q, k, v, batch.end_T, 0.25)
    torch.testing.assert_close(ours, dense(q, k, v, batch), rtol=0, atol=2e-6)


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


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "full attention"),
        ("gpt_neox", {}, "architecture 'gpt_neox' is not on the list"),
        ("llama", {"attention_dropout": 0.1}, "attention dropout"),
    ],
)
def test_models_that_cannot_share_say_why(kind, settings, reason):
    assert reason in why_not_shared(tiny_model(kind, **settings).train())


def test_dropout_matters_only_while_training():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), lora)
    assert "dropout is on" in why_not_shared(model.train())
    assert why_not_shared(model.eval()) == ""


def test_adapters_with_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    tuning = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), tuning)
    with pytest.raises(PrefloopError, match=r"virtual tokens .* are not supported; use LoRA"):
        why_not_shared(model)
