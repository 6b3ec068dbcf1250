"""No untrusted text becomes a control token, for byte-level BPE, SentencePiece-like BPE and Unigram vocabularies."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from chat_tokenizers import CHATML, CONTROLS, CORPUS, MARKERS, metaspace_backend, wrap
from prefloop.chat import ChatRenderer
from prefloop.records import Message, Role

SPACES = [" ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "  "]
LETTERS = ["a", "Z", "é", "中", "✈", "👩‍🚀", "\u202e", "\x00", "\ufeff", "e\u0301", "▁", "Ġ", "<", "|", ">", "/", "_"]


def strings(count, seed):
    rng = random.Random(seed)
    controls = CONTROLS + MARKERS
    parts = [lambda: rng.choice(controls), lambda: rng.choice(SPACES), lambda: rng.choice(LETTERS)]

    def piece():
        control = rng.choice(controls)
        start = rng.randrange(len(control))
        return control[start : rng.randrange(start, len(control)) + 1]

    parts += [piece, piece, lambda: chr(rng.choice([rng.randrange(32, 0x3000), rng.randrange(0x1F300, 0x1FAFF)]))]
    return ["".join(rng.choice(parts)() for _ in range(rng.randrange(1, 12))) for _ in range(count)]


def unigram_backend():
    """Control strings are in the model's own vocabulary here, as in some SentencePiece models."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=CONTROLS, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="module", params=["byte_level", "metaspace", "unigram"])
def renderer(request, backend):
    made = {"byte_level": lambda: backend, "metaspace": metaspace_backend, "unigram": unigram_backend}
    return ChatRenderer(wrap(made[request.param](), CHATML))


def leaks(renderer, texts):
    controls = renderer.encoder.control_ids
    assert len(controls) >= len(CONTROLS) + len(MARKERS)
    count = 0
    for start in range(0, len(texts), 5000):
        batch = texts[start : start + 5000]
        for text, ids in zip(batch, renderer.encoder.encode_batch(batch), strict=True):
            count += not controls.isdisjoint(ids)
            assert renderer.encoder.normalized(renderer.encoder.decode(ids)) == renderer.encoder.normalized(text)
    return count


def test_5000_strings_leak_nothing_and_decode_exactly(renderer):
    assert leaks(renderer, strings(5_000, seed=1)) == 0


@pytest.mark.slow
def test_100000_strings_leak_nothing_and_decode_exactly(renderer):
    assert leaks(renderer, strings(100_000, seed=2)) == 0


def test_the_tokenizer_itself_would_leak(renderer):
    own = renderer.tokenizer(strings(500, seed=1), add_special_tokens=False).input_ids
    assert sum(not renderer.encoder.control_ids.isdisjoint(ids) for ids in own) > 100


def test_whole_conversations_have_exactly_the_templates_control_tokens(renderer):
    texts = iter(strings(600, seed=3))
    for user, reply, result in zip(texts, texts, texts, strict=True):
        messages = [Message(Role.USER, user), Message(Role.ASSISTANT, reply), Message(Role.TOOL, result)]
        token = renderer.render_prompt(messages).token.tolist()
        names = [renderer.encoder.control_name(t) for t in token if t in renderer.encoder.control_ids]
        assert names == ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"]
        body = "".join(f"<|im_start|>{m.role.value}\n{m.content}<|im_end|>\n" for m in messages)
        back, whole = renderer.encoder.decode(token), body + "<|im_start|>assistant\n"
        assert renderer.encoder.normalized(back) == renderer.encoder.normalized(whole)
