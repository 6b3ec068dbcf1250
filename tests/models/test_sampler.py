"""The local sampler against transformers: same greedy tokens, same log-probs, whatever is cached or shared."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefloop.clients.sampling import Sampled, SamplingSettings
from prefloop.models import kv_cache
from prefloop.models.cached_engine import CachedEngine, _groups
from prefloop.models.sampler import LocalSampler
from prefloop.records import PrefloopError

VOCAB, STOPS = 120, [0, 1]
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
}
WINDOWED = (MistralForCausalLM, MistralConfig, {"sliding_window": 8})


def build(spec, seed=0):
    model_class, config_class, extra = spec
    torch.manual_seed(seed)
    model = model_class(config_class(**{**COMMON, **extra}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)  # peaked enough that an error shows
    return model.eval()


@pytest.fixture(scope="module")
def qwen3():
    return build(MODELS["qwen3"])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grouped_contexts(seed=0, copies=3):
    """Groups with equal prompts, rows with long common beginnings, and one row that shares nothing."""
    rng = np.random.default_rng(seed)
    system = rng.integers(2, VOCAB, 20)
    groups = [np.concatenate([system, rng.integers(2, VOCAB, n)]) for n in (3, 11, 26)]
    trunk = rng.integers(2, VOCAB, 30)
    branches = [np.concatenate([trunk, rng.integers(2, VOCAB, n)]) for n in (1, 7, 9)]
    contexts = [group for group in groups for _ in range(copies)] + branches + [rng.integers(2, VOCAB, 5)]
    return [contexts[i] for i in rng.permutation(len(contexts))]


def full_logprobs(model, context, sampled, temperature=1.0, top_p=1.0):
    ids = torch.from_numpy(np.concatenate([context, sampled.token]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(context) - 1 : -1].double() / temperature
    if top_p < 1:
        for row in logits:
            order = row.argsort(descending=True)
            before = row.softmax(-1)[order].cumsum(-1) - row.softmax(-1)[order]
            row[order[before >= top_p]] = -torch.inf
    chosen = torch.from_numpy(sampled.token.astype(np.int64))[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy()


def generate_alone(model, context, budget):
    ids = torch.from_numpy(context.astype(np.int64))[None]
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=budget, eos_token_id=STOPS, pad_token_id=0
    )
    return out[0, len(context) :].numpy()


def assert_logprobs(model, contexts, results, **settings):
    for context, sampled in zip(contexts, results, strict=True):
        expected = full_logprobs(model, context, sampled, **settings)
        np.testing.assert_allclose(sampled.logprob, expected, atol=1e-5, rtol=0)


def assert_same(results: list[Sampled], others: list[Sampled]) -> None:
    for one, other in zip(results, others, strict=True):
        np.testing.assert_array_equal(one.token, other.token)
        np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5, rtol=0)
        assert one.stopped == other.stopped


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate_on_every_row(name):
    model = build(MODELS[name])
    sampler = LocalSampler(model, STOPS)
    assert sampler.slow_reason == ""
    contexts = grouped_contexts()
    greedy = SamplingSettings(temperature=0, max_new_tokens=24)
    results = sampler.session().generate(contexts, range(len(contexts)), greedy, seed=0)
    for context, sampled in zip(contexts, results, strict=True):
        np.testing.assert_array_equal(sampled.token, generate_alone(model, context, 24))
        assert (sampled.logprob == 0).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_logprobs_are_those_of_a_full_forward(qwen3, temperature, top_p):
    settings = SamplingSettings(temperature=temperature, top_p=top_p, max_new_tokens=20)
    contexts = grouped_contexts()
    results = LocalSampler(qwen3, STOPS).session().generate(contexts, range(len(contexts)), settings, seed=5)
    assert_logprobs(qwen3, contexts, results, temperature=temperature, top_p=top_p)
    lengths = {len(sampled.token) for sampled in results}
    assert len(lengths) > 2  # rows did end at different steps
    for sampled in results:
        ended = np.isin(sampled.token, STOPS)
        assert not ended[:-1].any()
        assert sampled.stopped == ("stop" if ended[-1] else "length")


def sample(model, contexts):
    settings = SamplingSettings(max_new_tokens=8)
    return LocalSampler(model, STOPS).session().generate(contexts, range(len(contexts)), settings, seed=0)


def turn_contexts(contexts, results, rng):
    """Each row's context with what it sampled and 1 to 19 forced tokens."""
    return [
        np.concatenate([c, s.token, rng.integers(2, VOCAB, rng.integers(1, 20))])
        for c, s in zip(contexts, results, strict=True)
    ]


def test_turns_equal_from_scratch_and_compute_only_what_is_new(qwen3, monkeypatch):
    rng = np.random.default_rng(1)
    settings = SamplingSettings(max_new_tokens=12)
    sampler = LocalSampler(qwen3, STOPS)
    session = sampler.session()
    contexts, keys = grouped_contexts(), list(range(100, 113))
    seen = []
    forward = CachedEngine._forward
    monkeypatch.setattr(
        CachedEngine,
        "_forward",
        lambda self, plan, token, at: (seen.append(len(token)), forward(self, plan, token, at))[1],
    )
    cached = 0
    for turn in range(4):
        seen.clear()
        results = session.generate(contexts, keys, settings, seed=turn)
        if turn:  # what is new in the contexts, and all but the last of what was sampled
            assert sum(seen) == sum(map(len, contexts)) - cached + sum(len(s.token) - 1 for s in results)
        assert_logprobs(qwen3, contexts, results)
        assert_same(results, sampler.session().generate(contexts, keys, settings, seed=turn))
        longer = turn_contexts(contexts, results, rng)
        alive = [i for i in range(len(keys)) if i % 4 != turn]  # some rows stay behind for good
        cached = sum(len(contexts[i]) + len(results[i].token) - 1 for i in alive)
        contexts, keys = [longer[i] for i in alive], [keys[i] for i in alive]


def test_rows_may_leave_come_back_and_join(qwen3):
    rng = np.random.default_rng(2)
    settings = SamplingSettings(max_new_tokens=8)
    sampler = LocalSampler(qwen3, STOPS)
    session = sampler.session()
    state = dict(enumerate(grouped_contexts()))
    joining = dict(enumerate(grouped_contexts(seed=9), start=50))
    for turn, keys in enumerate([[0, 3, 5, 7], [1, 2, 3, 50, 51, 52], list(range(13)), [*range(50, 63), 4, 0]]):
        state = {**joining, **state}
        contexts = [state[key] for key in keys]
        results = session.generate(contexts, keys, settings, seed=turn)
        assert_same(results, sampler.session().generate(contexts, keys, settings, seed=turn))
        assert_logprobs(qwen3, contexts, results)
        state.update(zip(keys, turn_contexts(contexts, results, rng), strict=True))


def test_a_rewritten_history_rolls_back(qwen3):
    settings = SamplingSettings(max_new_tokens=10)
    sampler = LocalSampler(qwen3, STOPS)
    session = sampler.session()
    contexts = grouped_contexts()
    keys = range(len(contexts))
    session.generate(contexts, keys, settings, seed=0)
    rng = np.random.default_rng(3)
    for cut in (12, 1, 4):  # inside the shared prefix, almost all of it, and again further on
        rewritten = [np.concatenate([c[:cut], rng.integers(2, VOCAB, 15)]) for c in contexts]
        for asked in (rewritten, contexts, contexts):  # the same context twice: nothing new to compute but its end
            results = session.generate(asked, keys, settings, seed=cut)
            assert_logprobs(qwen3, asked, results)
            assert_same(results, sampler.session().generate(asked, keys, settings, seed=cut))


def in_chunks(session, contexts, keys, settings, seeds, chunk):
    """Sample in calls of `chunk` tokens, each row going on where it stopped; token, log-prob and end of each row."""
    token, logprob = [list(c) for c in contexts], [[] for _ in contexts]
    ends, left = ["length"] * len(contexts), [settings.max_new_tokens] * len(contexts)
    while alive := [i for i, budget in enumerate(left) if budget]:
        asked = [np.array(token[i]) for i in alive]
        budgets = [min(chunk, left[i]) for i in alive]
        found = session.generate(asked, [keys[i] for i in alive], settings, [seeds[i] for i in alive], budgets)
        for i, sampled in zip(alive, found, strict=True):
            token[i] += sampled.token.tolist()
            logprob[i] += sampled.logprob.tolist()
            left[i] = 0 if sampled.stopped == "stop" else left[i] - len(sampled.token)
            ends[i] = sampled.stopped
    return [
        Sampled(np.array(t[len(c) :], np.int32), np.array(p, np.float32), e)
        for t, c, p, e in zip(token, contexts, logprob, ends, strict=True)
    ]


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_sampling_in_chunks_gives_the_same_bits(qwen3, chunk):
    settings = SamplingSettings(max_new_tokens=22)
    sampler, contexts = LocalSampler(qwen3, STOPS), grouped_contexts()
    keys, seeds = [2**63 - 1 - i for i in range(13)], [2**62 + 5 * i for i in range(13)]
    whole = sampler.session().generate(contexts, keys, settings, seeds)
    assert len({len(sampled.token) for sampled in whole}) > 2
    pieces = in_chunks(sampler.session(), contexts, keys, settings, seeds, chunk)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one.token, other.token)
        np.testing.assert_array_equal(one.logprob, other.logprob)
        assert one.stopped == other.stopped


def test_each_row_may_have_its_own_seed(qwen3):
    settings = SamplingSettings(max_new_tokens=9)
    sampler, contexts = LocalSampler(qwen3, STOPS), grouped_contexts()
    together = sampler.session().generate(contexts, range(13), settings, seed=[i % 3 for i in range(13)])
    for seed in range(3):
        same = sampler.session().generate(contexts, range(13), settings, seed=seed)
        assert_same(together[seed::3], same[seed::3])
    with pytest.raises(PrefloopError, match="13 contexts but 2 seeds"):
        sampler.session().generate(contexts, range(13), settings, seed=[0, 1])


def test_released_rows_give_their_memory_back_and_may_return(qwen3):
    settings, rng = SamplingSettings(max_new_tokens=6), np.random.default_rng(5)
    sampler = LocalSampler(qwen3, STOPS)
    session, engine = sampler.session(), None
    kept, key = grouped_contexts(seed=1)[:2], 1000
    for turn in range(12):
        contexts, keys = kept + grouped_contexts(seed=turn), [1, 2, *range(key, key + 13)]
        found = session.generate(contexts, keys, settings, seed=turn)
        assert_same(found, sampler.session().generate(contexts, keys, settings, seed=turn))
        assert_logprobs(qwen3, contexts, found)
        kept = turn_contexts(kept, found[:2], rng)
        session.release([*range(key, key + 13), 77])
        key += 13
        engine = session._engine
        assert len(engine._rows) <= 15 and engine._rows.memory.shape[2] <= 22
        assert len(engine._prefixes) <= 2 * 13
    session.release([1, 2])
    assert set(engine._rows.key) == set(engine._prefixes.key) == {None}
    last = session.generate(kept, [1, 2], settings, seed=99)
    assert_same(last, sampler.session().generate(kept, [1, 2], settings, seed=99))


def test_what_rows_share_stays_while_one_of_them_needs_it(qwen3):
    settings, rng = SamplingSettings(max_new_tokens=5), np.random.default_rng(6)
    sampler = LocalSampler(qwen3, STOPS)
    session = sampler.session()
    kept, said = [], []
    for turn in range(4):
        trunk = rng.integers(2, VOCAB, 40)
        contexts = [np.concatenate([trunk, rng.integers(2, VOCAB, n)]) for n in (3, 4, 5)]
        keys = [10 * turn + i for i in range(3)]
        found = session.generate(contexts, keys, settings, seed=turn)
        assert (session._engine._rows.prefix_length > 0).any()
        session.release(keys[1:])  # one of the three goes on, and others take the slots
        if kept:
            longer = turn_contexts(kept, said, rng)
            assert_logprobs(qwen3, longer, session.generate(longer, [10 * turn - 10], settings, seed=50 + turn))
            session.release([10 * turn - 10])
        kept, said = contexts[:1], found[:1]
    assert len(session._engine._prefixes) == 2


def test_draws_do_not_depend_on_the_batch(qwen3):
    settings = SamplingSettings(max_new_tokens=16)
    sampler = LocalSampler(qwen3, STOPS)
    contexts = grouped_contexts()
    keys = [1000 - i for i in range(len(contexts))]
    together = sampler.session().generate(contexts, keys, settings, seed=3)
    again = sampler.session().generate(contexts[::-1], keys[::-1], settings, seed=3)[::-1]
    alone = [sampler.session().generate([c], [k], settings, seed=3)[0] for c, k in zip(contexts, keys, strict=True)]
    assert_same(together, again)
    assert_same(together, alone)
    other = sampler.session().generate(contexts, keys, settings, seed=4)
    assert sum(np.array_equal(a.token, b.token) for a, b in zip(together, other, strict=True)) < 3


def test_first_tokens_follow_the_distribution(qwen3):
    context = np.arange(2, 12)
    num = 4000
    one = SamplingSettings(max_new_tokens=1)
    results = LocalSampler(qwen3, STOPS).session().generate([context] * num, range(num), one, seed=0)
    counts = np.bincount([s.token[0] for s in results], minlength=VOCAB)
    with torch.no_grad():
        p = qwen3(torch.from_numpy(context)[None]).logits[0, -1].double().softmax(-1).numpy()
    common = p * num >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * num
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    dof = common.sum()
    assert chi2 < dof + 4 * np.sqrt(2 * dof)


def test_budgets_and_the_end_of_the_context(qwen3):
    contexts = grouped_contexts()[:6]
    budgets = [0, 1, 2, 5, 50, 9]
    sampler = LocalSampler(qwen3, [0], max_context=max(map(len, contexts)) + 4)
    settings = SamplingSettings(max_new_tokens=9)
    results = sampler.session().generate(contexts, range(6), settings, seed=0, budgets=budgets)
    for context, budget, sampled in zip(contexts, budgets, results, strict=True):
        limit = min(budget, 9, sampler.max_context - len(context))
        assert len(sampled.token) == limit or sampled.stopped == "stop"
        assert len(sampled.token) <= limit
    assert results[0].token.shape == (0,) and results[0].stopped == "length"
    full = np.arange(sampler.max_context) % VOCAB
    assert sampler.session().generate([full], [0], settings, seed=0)[0].stopped == "length"


def test_long_prompts_are_computed_in_pieces(qwen3, monkeypatch):
    contexts = grouped_contexts()
    settings = SamplingSettings(max_new_tokens=6)
    whole = LocalSampler(qwen3, STOPS).session().generate(contexts, range(13), settings, seed=0)
    monkeypatch.setattr(CachedEngine, "_TOKENS_PER_ROW", 7)
    monkeypatch.setattr(CachedEngine, "_TOKENS_PER_FORWARD", 20)
    monkeypatch.setattr(kv_cache.KVRows, "_GRANULE", 4)
    pieces = LocalSampler(qwen3, STOPS).session().generate(contexts, range(13), settings, seed=0)
    assert_same(whole, pieces)


def test_training_with_the_same_model_is_not_disturbed(qwen3):
    model = copy.deepcopy(qwen3).train()
    model.model.layers[0].mlp.eval()  # a part that its owner froze
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    ids = torch.arange(2, 40)[None]
    before = model(ids, labels=ids).loss.item()
    sampler = LocalSampler(model, STOPS)
    session = sampler.session()
    session.generate(grouped_contexts(), range(13), SamplingSettings(max_new_tokens=4), seed=0)
    session._engine.decode = lambda token: token.no_such_attribute
    with pytest.raises(AttributeError, match="no_such_attribute"):
        session.generate(grouped_contexts(), range(13), SamplingSettings(max_new_tokens=4), seed=0)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == before
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_that_failed_do_not_poison_later_sessions(qwen3):
    model = copy.deepcopy(qwen3)
    sampler = LocalSampler(model, STOPS)
    contexts, settings = grouped_contexts(), SamplingSettings(max_new_tokens=6)
    good = copy.deepcopy(model.state_dict())
    expected = sampler.session().generate(contexts, range(13), settings, seed=0)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(torch.nan)
    with pytest.raises(PrefloopError, match="not finite"):
        sampler.session().generate(contexts, range(13), settings, seed=0)
    model.load_state_dict(good)
    assert_same(sampler.session().generate(contexts, range(13), settings, seed=0), expected)


def test_two_sessions_at_once_do_not_share_memory(qwen3):
    sampler, settings = LocalSampler(qwen3, STOPS), SamplingSettings(max_new_tokens=6)
    rng = np.random.default_rng(0)
    contexts, others = grouped_contexts(), grouped_contexts(seed=4)
    first, second = sampler.session(), sampler.session()
    results = first.generate(contexts, range(13), settings, seed=0)
    second.generate(others, range(13), settings, seed=0)
    longer = turn_contexts(contexts, results, rng)
    assert_logprobs(qwen3, longer, first.generate(longer, range(13), settings, seed=1))


def test_lora_adapters_take_part(qwen3):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(qwen3), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.eval()
    contexts = grouped_contexts()
    results = sample(model, contexts)
    assert_logprobs(model, contexts, results)
    base = sample(qwen3, contexts)
    assert any(not np.array_equal(a.token, b.token) for a, b in zip(results, base, strict=True))
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(PrefloopError, match="virtual tokens"):
        LocalSampler(peft.get_peft_model(copy.deepcopy(qwen3), prompts), STOPS)


NEOX = (
    GPTNeoXForCausalLM,
    GPTNeoXConfig,
    {"num_key_value_heads": 4, "num_hidden_layers": 1, "tie_word_embeddings": False},
)


@pytest.mark.parametrize(("spec", "reason"), [(WINDOWED, "sliding-window"), (NEOX, "gpt_neox")])
def test_other_architectures_run_row_by_row_and_are_right(spec, reason):
    model = build(spec)
    sampler = LocalSampler(model, STOPS)
    assert reason in sampler.slow_reason
    session, rng = sampler.session(), np.random.default_rng(0)
    contexts, settings = grouped_contexts()[:5], SamplingSettings(max_new_tokens=12)
    for turn in range(2):
        results = session.generate(contexts, range(5), settings, seed=turn)
        assert_logprobs(model, contexts, results)
        contexts = turn_contexts(contexts, results, rng)
    greedy = session.generate(contexts, range(5), SamplingSettings(temperature=0, max_new_tokens=6), seed=0)
    for context, sampled in zip(contexts, greedy, strict=True):
        np.testing.assert_array_equal(sampled.token, generate_alone(model, context, 6))


def test_half_precision_stays_near_its_own_full_forward(qwen3):
    model = copy.deepcopy(qwen3).to(torch.bfloat16)
    contexts = grouped_contexts()
    results = sample(model, contexts)
    for context, sampled in zip(contexts, results, strict=True):
        np.testing.assert_allclose(sampled.logprob, full_logprobs(model, context, sampled), atol=0.2)


def test_groups_are_equal_contexts_then_long_common_beginnings():
    trunk = list(range(40))
    rows = [[9, 9], [*trunk, 1], [9, 9], [*trunk, 2, 3], [5] * 50, trunk[:25], trunk[:30] + [7] * 200]
    contexts = {slot: np.array(row, np.int32) for slot, row in enumerate(rows)}
    groups = {(tuple(sorted(members)), length) for members, length in _groups(contexts, least=16)}
    # The last row shares only 30 of its 230 tokens and stays alone; so does the one that sorts before it.
    assert groups == {((0, 2), 2), ((1, 3), 40)}


@pytest.mark.parametrize(
    ("contexts", "keys", "budgets", "message"),
    [
        ([[1], [2]], [0], None, "2 contexts but 1 row keys"),
        ([[1], [2]], [0, 0], None, "repeat"),
        ([[1], []], [0, 7], None, "context 1 .key 7. is empty"),
        ([[1]], [0], [1, 2], "2 budgets"),
        ([[VOCAB]], [0], None, "outside the vocabulary"),
    ],
)
def test_wrong_calls_are_refused(qwen3, contexts, keys, budgets, message):
    session = LocalSampler(qwen3, STOPS).session()
    with pytest.raises(PrefloopError, match=message):
        session.generate(contexts, keys, SamplingSettings(), seed=0, budgets=budgets)


@pytest.mark.parametrize("stops", [[], [-1], [VOCAB]])
def test_wrong_stop_tokens_are_refused(qwen3, stops):
    with pytest.raises(PrefloopError, match="stop_ids"):
        LocalSampler(qwen3, stops)
