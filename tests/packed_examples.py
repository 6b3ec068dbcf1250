"""Small models and token paths for the tests of the packed batch, and an independent oracle for their log-probs."""

import copy
import sys

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode

from prefloop.batch.examples import Demonstration, LabelledSample, PreferencePair, Step, SteppedSample
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


def of_sources(tokens, sources):
    """A path of tokens from these sources."""
    token, source = np.asarray(tokens, dtype=np.int32), np.asarray(sources, dtype=np.uint8)
    unknown = np.full(len(token), np.nan, dtype=np.float32)
    return TokenPath(token, source, np.zeros(len(token), dtype=np.int32), unknown)


def agent_paths(num, seed=0):
    """Paths of agents that begin alike: they branch anywhere after the prompt, tools answer between sampled turns,
    some are prefixes of others and some are equal."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, rng.integers(2, 6)).tolist()
    num_prompt, paths = len(tokens), []
    while len(paths) < num:
        tokens, sources = tokens[:num_prompt], [Source.PROMPT] * num_prompt
        if paths:
            other = paths[rng.integers(len(paths))]
            cut = rng.integers(num_prompt, len(other.token) + 1)
            tokens, sources = other.token[:cut].tolist(), other.source[:cut].tolist()
        for kind in (Source.SAMPLED, Source.TOOL, Source.SAMPLED)[rng.integers(4) :]:
            new = rng.integers(3, VOCAB, rng.integers(1, 4)).tolist()
            tokens, sources = tokens + new, sources + [kind] * len(new)
        if Source.SAMPLED in sources:
            paths.append(of_sources(tokens, sources))
    return paths


def _agent_samples(num, seed):
    """Samples of two tasks; every third is of two contexts, as where a template drops earlier reasoning."""
    paths = [one for task in range(2) for one in agent_paths((2 * num) // 3 + 1, seed + 100 * task)]
    return [(paths[i],) if i % 3 else (paths[i], paths[-1 - i]) for i in range(num)]


WEIGHTS = (1.0, 0.3, 2.5)


def agent_demonstrations(num, seed=0):
    samples = _agent_samples(num, seed)
    return [Demonstration(sample, WEIGHTS[i % 3], f"demo-{i}") for i, sample in enumerate(samples)]


def agent_pairs(num, seed=0):
    """Pairs of agents' samples, with weights, margins, ties and probabilities."""
    samples = _agent_samples(2 * num, seed)
    pairs = []
    for i, (chosen, rejected) in enumerate(zip(samples[::2], samples[1::2], strict=True)):
        tied = i % 4 == 3
        probability = 0.5 if tied else (1.0, 0.7, 0.35)[i % 3]
        margin = 0.2 * (i % 3)
        pairs.append(PreferencePair(chosen, rejected, probability, margin, tied, WEIGHTS[i % 3], f"pair-{i}"))
    return pairs


def agent_labels(num, seed=0):
    samples = _agent_samples(num, seed)
    return [LabelledSample(sample, i % 2 == 0, WEIGHTS[i % 3], f"label-{i}") for i, sample in enumerate(samples)]


def agent_steps(num, seed=0):
    """Samples with labels at the end of each sampled turn, some of them soft."""
    stepped = []
    for i, sample in enumerate(_agent_samples(num, seed)):
        masks = [one.loss_mask for one in sample]
        ends = [(p, t) for p, own in enumerate(masks) for t in np.flatnonzero(own & ~np.append(own[1:], False))]
        steps = [Step(p, int(t), (1.0, 0.0, 0.3)[k % 3], WEIGHTS[k % 3]) for k, (p, t) in enumerate(ends, start=i)]
        stepped.append(SteppedSample(sample, tuple(steps), WEIGHTS[i % 3], f"steps-{i}"))
    return stepped


def thinking_paths(num_turns, rng):
    """A run under a template that drops earlier reasoning: each turn is a path, and they share what stays."""
    stays, sources, paths = rng.integers(3, VOCAB, 3).tolist(), [Source.PROMPT] * 3, []
    for _ in range(num_turns):
        reasoning, answer, tool = (rng.integers(3, VOCAB, rng.integers(1, 6)).tolist() for _ in range(3))
        said = [*reasoning, 2, *answer]
        paths.append(of_sources([*stays, *said], [*sources, *[Source.SAMPLED] * len(said)]))
        stays, sources = (
            [*stays, *answer, *tool],
            [*sources, *[Source.PROMPT] * len(answer), *[Source.TOOL] * len(tool)],
        )
    return tuple(paths)


def thinking_runs(records, num, num_turns=6, seed=0):
    """Examples of a kind ("pairs", …) whose samples are such runs, with a row of one short path among them."""
    rng = np.random.default_rng(seed)
    samples = [thinking_paths(num_turns, rng) for _ in range(2 * num)]
    samples[0] = samples[0][:1]
    if records == "pairs":
        sides = zip(samples[::2], samples[1::2], strict=True)
        return [PreferencePair(*both, weight=2.0, name=f"run-{i}") for i, both in enumerate(sides)]
    rows = [(sample, WEIGHTS[i % 3], f"run-{i}") for i, sample in enumerate(samples[:num])]
    if records == "steps":
        ends = [[Step(p, len(one.token) - 1, p % 2, 1.0 + p) for p, one in enumerate(paths)] for paths, _, _ in rows]
        return [SteppedSample(paths, tuple(own), *said) for own, (paths, *said) in zip(ends, rows, strict=True)]
    if records == "labelled samples":
        return [LabelledSample(paths, i % 2 == 0, *said) for i, (paths, *said) in enumerate(rows)]
    return [Demonstration(*row) for row in rows]


def single_turn_labels(num, seed=0):
    """Samples of one turn, whose completions may be dealt to other prompts."""
    paths = paths_of(random_pairs((num + 1) // 2, seed))[:num]
    return [LabelledSample((one,), i % 3 != 0, WEIGHTS[i % 3], f"label-{i}") for i, one in enumerate(paths)]


HEADS = {
    "logits": transformers.AutoModelForCausalLM,
    "score": transformers.AutoModelForSequenceClassification,
    "scores": transformers.AutoModelForTokenClassification,
}
"""What a model gives: logits, a score for each sequence, scores for each token."""


def tiny_model(kind="qwen3", dtype=torch.float32, *, head="logits", **settings):
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
    if "moe" in kind or kind == "mixtral":
        shape |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        shape |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    config = transformers.AutoConfig.for_model(kind, **{**shape, **settings})
    return HEADS[head].from_config(config, dtype=dtype)


def perturbed(model, scale=0.02):
    """A copy with other weights near by."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return other


class _KeepFloat64(TorchFunctionMode):
    """Casts from float64 to float32 do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and getattr(args[0], "dtype", None) == torch.float64:
            if function is torch.Tensor.float or (function is torch.Tensor.to and torch.float32 in args):
                return args[0]
            if function is torch.nn.functional.softmax:
                kwargs.pop("dtype", None)
        return function(*args, **kwargs)


def keep_float64(monkeypatch, model):
    """Keep a model's norm layers, routers and own attention in float64: they would cast down to float32."""

    def exact(original):
        def call(*args, **kwargs):
            with _KeepFloat64():
                return original(*args, **kwargs)

        return call

    for kind in {type(module) for module in model.modules()}:
        if kind.__name__.endswith(("RMSNorm", "Router")):
            monkeypatch.setattr(kind, "forward", exact(kind.forward))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products of matrices know no float64
    architecture = sys.modules[type(model).__module__]
    if hasattr(architecture, "eager_attention_forward"):
        monkeypatch.setattr(architecture, "eager_attention_forward", exact(architecture.eager_attention_forward))


def padded(paths):
    """Token ids and mask of right-padded rows."""
    longest = max(len(one.token) for one in paths)
    ids = torch.zeros(len(paths), longest, dtype=torch.long)
    mask = torch.zeros(len(paths), longest, dtype=torch.long)
    for i, one in enumerate(paths):
        ids[i, : len(one.token)] = torch.from_numpy(one.token)
        mask[i, : len(one.token)] = 1
    return ids, mask


def padded_logprobs(model, paths):
    """log p of each token of each path but the first, from plain right-padded logits of the whole vocabulary."""
    ids, mask = padded(paths)
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
    """0 where both are zero, as the gradient of a hinge is beyond its corner."""
    difference = (actual - expected).norm()
    return float(difference / expected.norm()) if difference else 0.0
