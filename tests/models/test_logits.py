from functools import partial

import pytest
import torch
import transformers

from packed_examples import VOCAB, tiny_model
from prefloop.models import logits as logits_module
from prefloop.models.attention import SHARING_MODEL_TYPES, sharing
from prefloop.models.logits import body_of, head_of, own_logits
from prefloop.records import PrefloopError

IDS = torch.arange(1, 9)[None]


def is_plain(model):
    return head_of(model) is model.get_output_embeddings()


@pytest.mark.parametrize("kind", [*sorted(SHARING_MODEL_TYPES - {"gemma2"}), "gpt_neox", "mamba", "opt"])
def test_most_heads_are_a_product(kind):
    assert is_plain(tiny_model(kind, num_key_value_heads=4))


LARGE = {"initializer_range": 2.0}
MORE_THAN_A_PRODUCT = {
    "gemma2": ("gemma2", {}),
    "gemma3 with a cap": ("gemma3_text", {"final_logit_softcapping": 30.0}),
    "granite": ("granite", {"logits_scaling": 8.0}),
    "cohere": ("cohere", {"logit_scale": 0.0625}),
}


@pytest.mark.parametrize("settings", [{}, LARGE], ids=["small logits", "large"])
@pytest.mark.parametrize("case", MORE_THAN_A_PRODUCT)
def test_caps_and_scales_are_found_also_where_small_logits_hide_them(case, settings):
    kind, options = MORE_THAN_A_PRODUCT[case]
    model = tiny_model(kind, initializer_range=1e-3, **options) if not settings else tiny_model(kind, **options)
    head = head_of(model)
    assert isinstance(head, partial)
    expected = model(input_ids=IDS, use_cache=False).logits[0]
    given = body_of(model)(input_ids=IDS, use_cache=False).last_hidden_state[0]
    assert torch.equal(head(given), expected)


def test_a_cap_without_effect_is_no_cap():
    assert is_plain(tiny_model("gemma2", final_logit_softcapping=None))
    assert is_plain(tiny_model("granite", logits_scaling=1.0))


def test_an_adapter_on_the_head_is_part_of_it():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    plain = tiny_model(tie_word_embeddings=False)
    hidden = torch.randn(3, 32)
    without = head_of(plain)(hidden)
    model = peft.get_peft_model(plain, lora)
    assert isinstance(head_of(model), partial)
    base = model.get_base_model()
    torch.testing.assert_close(head_of(model)(hidden), base.lm_head(hidden))
    assert not torch.allclose(head_of(model)(hidden), without)


def test_a_body_is_put_back_also_after_an_error(monkeypatch):
    model = tiny_model()
    before = model(IDS).logits
    own_logits(model, torch.randn(5, 32))
    with pytest.raises(RuntimeError):
        own_logits(model, torch.randn(5, 31))
    assert "forward" not in vars(model.model)
    monkeypatch.setattr(model.model, "forward", model.model.forward)  # as libraries that wrap it do
    wrapped = vars(model.model)["forward"]
    own_logits(model, torch.randn(5, 32))
    assert vars(model.model)["forward"] is wrapped
    assert torch.equal(model(IDS).logits, before)


def test_it_is_tried_once_for_each_model(monkeypatch):
    tried = []
    monkeypatch.setattr(logits_module, "_gives_the_product", lambda *_: tried.append(1) or True)
    model = tiny_model()
    assert is_plain(model) and is_plain(model) and is_plain(tiny_model())
    assert len(tried) == 2


def test_it_can_be_tried_within_sharing():
    model = tiny_model("gemma2")
    with sharing(model):
        assert isinstance(head_of(model), partial)


def test_models_whose_tokens_see_later_ones_are_refused():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(PrefloopError, match="'bert' lets a token see later ones; use a causal language model"):
        head_of(transformers.BertForMaskedLM(config).eval())
    bidirectional = tiny_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(PrefloopError, match="'gemma3_text' lets a token see later ones"):
        head_of(bidirectional)


def test_logits_of_more_than_the_last_hidden_states_are_refused(monkeypatch):
    model = tiny_model("gpt_neox", num_key_value_heads=4)
    forward = type(model).forward

    def with_the_ids(self, input_ids, **kwargs):
        output = forward(self, input_ids=input_ids, **kwargs)
        output.logits = output.logits + 0.01 * input_ids[..., None]
        return output

    monkeypatch.setattr(type(model), "forward", with_the_ids)
    with pytest.raises(PrefloopError, match="makes its logits of more than its last hidden states"):
        head_of(model)


def test_a_model_without_output_embedding_is_refused():
    with pytest.raises(PrefloopError, match="has no output embedding"):
        head_of(tiny_model().model)
