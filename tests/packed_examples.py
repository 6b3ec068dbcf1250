"""Small models and token paths for the tests of the packed batch, and an independent oracle for their log-probs."""

import numpy as np
import torch
import transformers

from prefloop.batch.examples import Demonstration, PreferencePair
from prefloop.records import Source, TokenPath

VOCAB = 61


def path(tokens, num_prompt):
    """A path whose tokens from `num_prompt` on were sampled."""
    token = np.asarray(tokens, dtype=np.int32)
    sampled = np.arange(len(token)) >= num_prompt
    source = np.where(sampled, Source.SAMPLED, Source.PROMPT).astype(np.uint8)
    logprob = np.where(sampled, -1.0, np.nan).astype(np.float32)
    return TokenPath(token, source, np.zeros(len(token), dtype=np.int32), logprob)


def random_tokens(rng, low, high):
    return rng.integers(0, VOCAB, rng.integers(low, high)).tolist()


def random_pairs(num, seed=0, prompt=(2, 12), completion=(1, 9)):
    """Pairs that share a prompt and often the first sampled tokens, some of them with one prompt for two pairs."""
    rng = np.random.default_rng(seed)
    pairs, tokens = [], []
    for i in range(num):
        tokens = tokens if i % 3 == 2 else random_tokens(rng, *prompt)
        begun = tokens + random_tokens(rng, 0, 4)
        sides = [path(begun + random_tokens(rng, *completion), len(tokens)) for _ in range(2)]
        pairs.append(PreferencePair((sides[0],), (sides[1],), name=f"pair-{i}"))
    return pairs


def random_demonstrations(num, seed=0):
    return [Demonstration(pair.chosen, name=f"demo-{i}") for i, pair in enumerate(random_pairs(num, seed))]


def branching_demonstrations():
    """Hard cases for a forest: equal paths, a path that is a prefix of another, several roots, nested branches."""
    root = [3, 1, 4, 1, 5]
    paths = [
        path([*root, 9, 2, 6], 3),
        path([*root, 9, 2, 6], 3),
        path([*root, 9], 4),
        path([*root, 9, 2, 7, 7], 5),
        path([*root, 8], 5),
        path([7, 7], 1),
        path([*root[:2], 40, 41, 42], 2),
    ]
    return [Demonstration((one,)) for one in paths[:4]] + [Demonstration(tuple(paths[4:]))]


def tiny_model(kind="qwen3", dtype=torch.float32, **settings):
    """A random model of an architecture, with grouped-query attention."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    if kind == "mistral":
        shape["sliding_window"] = None
    config = transformers.AutoConfig.for_model(kind, **{**shape, **settings})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def padded_logprobs(model, paths):
    """log p of each token of each path but the first, from plain right-padded logits of the whole vocabulary."""
    longest = max(len(one.token) for one in paths)
    ids = torch.zeros(len(paths), longest, dtype=torch.long)
    mask = torch.zeros(len(paths), longest, dtype=torch.long)
    for i, one in enumerate(paths):
        ids[i, : len(one.token)] = torch.from_numpy(one.token)
        mask[i, : len(one.token)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return [
        logprobs[i, : len(one.token) - 1].gather(1, ids[i, 1 : len(one.token), None])[:, 0]
        for i, one in enumerate(paths)
    ]


def paths_of(examples):
    return [one for example in examples for sample in example.samples for one in sample]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())
