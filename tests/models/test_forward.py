from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers

from packed_examples import (
    VOCAB,
    branching_demonstrations,
    gradient,
    keep_float64,
    padded_logprobs,
    path,
    paths_of,
    random_pairs,
    relative_error,
    tiny_model,
)
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import forest_layout, rows_layout
from prefloop.batch.packed import pack
from prefloop.batch.packing import pack_group
from prefloop.models import attention
from prefloop.models import forward as forward_module
from prefloop.models.attention import SHARING_MODEL_TYPES, sharing, why_not_shared
from prefloop.models.forward import forward, layout_for
from prefloop.records import PrefloopError

LAYOUTS = {"forest": forest_layout, "rows": rows_layout}
EXAMPLES = {"pairs": random_pairs(7), "branching": branching_demonstrations()}


def ours(model, batch, layout, **options):
    """The log-prob of every loss visit."""
    out = forward(model, batch, layout=layout, **options)
    return out.logprob_T[batch.visit_token_V[batch.loss_visits]]


def theirs(model, batch, paths):
    """The same from plain padded logits of every path."""
    zero = torch.zeros(1, dtype=torch.float64)
    visits = torch.cat([torch.cat([zero, logprob.double()]) for logprob in padded_logprobs(model, paths)])
    return visits[batch.loss_visits]


def assert_parity(model, examples, layout, value_tolerance, gradient_tolerance):
    batch = pack(examples)
    coefficient = torch.randn(len(batch.loss_visits), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = []
    values = ours(model, batch, layout(batch)), theirs(model, batch, paths_of(examples))
    for value in values:
        model.zero_grad()
        (value * coefficient).sum().backward()
        gradients.append(gradient(model))
    torch.testing.assert_close(values[0].double(), values[1], rtol=value_tolerance, atol=value_tolerance)
    assert relative_error(*gradients) < gradient_tolerance


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
WINDOWS = {
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "ministral": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "mixtral": {"sliding_window": 4},
    "olmo3": MIXED,
    "phi3": {"sliding_window": 4},
    "qwen2": MIXED | {"use_sliding_window": True},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": MIXED | {"use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 4},
    "smollm3": MIXED | {"use_sliding_window": True},
}
CAPS = {
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
}
VARIANTS = [
    *(pytest.param(kind, {}, id=kind) for kind in sorted(SHARING_MODEL_TYPES)),
    *(pytest.param(kind, settings, id=f"{kind} windowed") for kind, settings in WINDOWS.items()),
    *(pytest.param(kind, settings, id=f"{kind} capped") for kind, settings in CAPS.items()),
]
"""Windows of 4 tokens where paths have up to 24, and caps that bite."""


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_gradients_equal_plain_padded_sequences(kind, settings, layout):
    for examples in EXAMPLES.values():
        assert_parity(tiny_model(kind, **settings), examples, LAYOUTS[layout], 1e-5, 5e-6)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_in_float64_they_are_equal_exactly(kind, settings, monkeypatch):
    """The models' own casts to float32 left out."""
    model = tiny_model(kind, torch.float64, **settings)
    keep_float64(monkeypatch, model)
    for examples in EXAMPLES.values():
        assert_parity(model, examples, forest_layout, 1e-13, 1e-13)


def test_every_architecture_that_can_have_a_window_is_tried_with_one():
    configs = {kind: transformers.AutoConfig.for_model(kind) for kind in SHARING_MODEL_TYPES}
    assert {kind for kind, config in configs.items() if hasattr(config, "sliding_window")} == set(WINDOWS)


def test_a_window_that_reaches_everything_uses_the_cascade(monkeypatch):
    monkeypatch.setattr(attention, "piecewise_attention", None)
    batch = pack([Demonstration((path(range(1, 9), 2),)), Demonstration((path([1, 2, 3, 9], 2),))])
    forward(tiny_model("mistral", sliding_window=8), batch, layout=forest_layout(batch))
    with pytest.raises(TypeError):
        forward(tiny_model("mistral", sliding_window=7), batch, layout=forest_layout(batch))


FALLBACKS = [
    ("gpt_neox", {"num_key_value_heads": 4}),
    ("gpt2", {}),
    ("opt", {"num_key_value_heads": 4, "word_embed_proj_dim": 32}),
    ("mamba", {"state_size": 4}),
    ("recurrent_gemma", {"lru_width": 32, "num_hidden_layers": 3}),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("bloom", {}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    ("granite", {"logits_scaling": 4.0}),
    ("cohere2", {"sliding_window": 4}),
]


@pytest.mark.parametrize(("kind", "settings"), FALLBACKS, ids=[kind for kind, _ in FALLBACKS])
def test_models_that_cannot_share_run_as_rows(kind, settings):
    model = tiny_model(kind, **settings).eval()
    assert_parity(model, EXAMPLES["pairs"], lambda batch: layout_for(model, batch), 2e-5, 2e-5)
    batch = pack(EXAMPLES["pairs"])
    with pytest.raises(PrefloopError, match="cannot run over shared prefixes"):
        forward(model, batch, layout=forest_layout(batch))


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
VISION = {"hidden_size": 16, "intermediate_size": 16}


def vision_language_model(kind):
    if kind == "gemma3":
        config = transformers.Gemma3Config(
            text_config=SHAPE | {"sliding_window": 4, "head_dim": 16},
            vision_config=VISION
            | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        )
        return transformers.Gemma3ForConditionalGeneration(config)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=SHAPE | {"rope_parameters": rope},
        vision_config=VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 32},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_models_that_can_also_see_run_text_as_rows(kind):
    torch.manual_seed(0)
    model = vision_language_model(kind).eval()
    assert why_not_shared(model)
    batch = pack(EXAMPLES["pairs"])
    expected = theirs(model, batch, paths_of(EXAMPLES["pairs"]))
    torch.testing.assert_close(ours(model, batch, None).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bloom", "recurrent_gemma", "lfm2", "mamba"])
def test_without_the_guard_they_would_be_silently_wrong(kind):
    model, batch = tiny_model(kind, **dict(FALLBACKS)[kind]).eval(), pack(EXAMPLES["branching"])
    forest, rows = forest_layout(batch), rows_layout(batch)
    with torch.no_grad():
        truth = model.base_model(input_ids=rows.blocks[0]).last_hidden_state.flatten(0, 1)[rows.place_T]
        with sharing(model):
            wrong = model.base_model(forest.blocks[0], position_ids=forest.position_ids_BL, forest=forest)
    assert relative_error(wrong.last_hidden_state[0], truth) > 0.05


def test_tokens_outside_the_loss_are_zero_and_first_tokens_of_siblings_are_right():
    model, batch = tiny_model(), pack(EXAMPLES["branching"])
    logprob_T = forward(model, batch).logprob_T
    needed = torch.zeros(batch.num_tokens, dtype=torch.bool)
    needed[batch.visit_token_V[batch.loss_mask_V]] = True
    assert (logprob_T[~needed] == 0).all()
    assert (logprob_T[needed] < 0).all()
    siblings = needed & (batch.parent_T != torch.arange(batch.num_tokens) - 1)
    assert siblings.sum() >= 3  # read at t - 1 instead of the parent, these would be another branch's


def test_the_layout_is_the_cheaper_one():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, 60).tolist()
    alone = [Demonstration((path([i, *rng.integers(0, VOCAB, 5)], 1),)) for i in range(40)]
    shared = [Demonstration((path([*prompt, i, *rng.integers(0, VOCAB, 5)], 60),)) for i in range(40)]
    model = tiny_model()
    assert layout_for(model, pack(shared)).segments is not None
    assert layout_for(model, pack(alone)).segments is None
    assert layout_for(tiny_model("gpt_neox", num_key_value_heads=4), pack(shared)).segments is None


def test_rows_that_share_nothing_lie_end_to_end_without_padding():
    """The code path of plain packing: one row of separate trees, each one segment that attends to itself alone."""
    rng = np.random.default_rng(0)
    alone = [Demonstration((path([i, *rng.integers(0, VOCAB, rng.integers(20, 200))], 1),)) for i in range(16)]
    with torch.device("meta"):
        model = tiny_model("llama", hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    batch = pack_group(alone, range(len(alone)))
    layout = layout_for(model, batch)
    lengths = [len(example.paths[0].token) for example in alone]
    starts = np.cumsum([0, *lengths])
    assert layout.num_places == sum(lengths)
    assert [(s.start, s.stop, s.end) for s in layout.segments] == [(a, b, b) for a, b in pairwise(starts.tolist())]
    assert layout.position_ids_BL[0].tolist() == [i for length in lengths for i in range(length)]


def test_narrow_types_sum_the_head_s_gradient_in_float32(monkeypatch):
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", 1)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 8, generator=rng)
    weight = torch.randn(16, 8, generator=rng)
    token = torch.randint(16, (600,), generator=rng)

    def weight_gradient(dtype):
        leaf = weight.to(torch.bfloat16).to(dtype).requires_grad_()
        logprob, _ = forward_module._LinearHead.apply(
            hidden.to(torch.bfloat16).to(dtype), leaf, None, token, False, False
        )
        logprob.sum().backward()
        return leaf.grad.float()

    assert relative_error(weight_gradient(torch.bfloat16), weight_gradient(torch.float32)) < 4e-3


def test_entropy_equals_its_definition():
    model, examples = tiny_model(), EXAMPLES["branching"]
    batch = pack(examples)
    entropy_T = forward(model, batch, {"logprob", "entropy"}).entropy_T
    start = 0
    for one in paths_of(examples):
        logprobs = torch.log_softmax(model(torch.from_numpy(one.token).long()[None]).logits[0], -1)
        expected = -(logprobs.exp() * logprobs).sum(-1)[:-1]
        scored = torch.from_numpy(one.loss_mask[1:])
        visits = batch.visit_token_V[start + 1 : start + len(one.token)]
        torch.testing.assert_close(entropy_T[visits][scored], expected[scored], rtol=1e-5, atol=1e-5)
        start += len(one.token)
    assert forward(model, batch).entropy_T is None


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_chunks_and_recomputation_change_nothing(monkeypatch, budget):
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", 5)
    model = tiny_model(tie_word_embeddings=False)
    batch = pack(EXAMPLES["pairs"])
    assert_parity(model, EXAMPLES["pairs"], forest_layout, 5e-6, 5e-6)
    kept = ours(model, batch, forest_layout(batch), logit_budget=budget)
    torch.testing.assert_close(kept.double(), theirs(model, batch, paths_of(EXAMPLES["pairs"])), rtol=0, atol=5e-6)
    model.zero_grad()
    kept.sum().backward()
    first = gradient(model)
    model.zero_grad()
    theirs(model, batch, paths_of(EXAMPLES["pairs"])).sum().backward()
    assert relative_error(first, gradient(model)) < 5e-6


def test_logits_beyond_the_budget_are_not_kept(monkeypatch):
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", 5)
    batch = pack(EXAMPLES["pairs"])
    num_logits = len(torch.unique(batch.visit_token_V[batch.loss_visits])) * VOCAB
    for budget, kept in ((num_logits * 4, True), (num_logits * 4 - 1, False)):
        node = forward(tiny_model(), batch, logit_budget=budget).logprob_T.grad_fn
        while not hasattr(node, "kept"):
            node = next(parent for parent, _ in node.next_functions if parent is not None)
        assert bool(node.kept) is kept


def test_a_head_with_an_adapter_runs_through_its_module():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=False), lora)
    batch = pack(EXAMPLES["pairs"])
    value = ours(model, batch, forest_layout(batch))
    torch.testing.assert_close(value.double(), theirs(model, batch, paths_of(EXAMPLES["pairs"])), rtol=0, atol=2e-5)
    value.sum().backward()
    adapted = [p for name, p in model.named_parameters() if "lm_head.lora_B" in name]
    assert adapted and all(p.grad.abs().sum() > 0 for p in adapted)


def test_gradient_checkpointing_needs_its_backward_inside_sharing():
    model, batch = tiny_model().train(), pack(EXAMPLES["pairs"])
    layout = forest_layout(batch)
    ours(model, batch, layout).sum().backward()
    expected = gradient(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with pytest.raises(PrefloopError, match="must run inside `sharing"):
        ours(model, batch, layout)
    with sharing(model):
        ours(model, batch, layout).sum().backward()
    assert relative_error(gradient(model), expected) < 1e-6


def test_autocast_stays_near_float32():
    model, batch = tiny_model(initializer_range=0.1), pack(EXAMPLES["pairs"])
    layout = forest_layout(batch)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(model, batch, layout)
    value.sum().backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ours(model, batch, layout), rtol=0.05, atol=0.05)
