"""How much memory each stage of a run needs at its peak, from shapes and settings: free of torch.

Where the numbers come from:

- **process**: an interpreter with the libraries loaded and the store open, measured (torch 2.13 for CPUs).
- **weights**: what the files hold, in the dtype of the policy. An adapter's are float32 whatever the base is, as peft
  makes them. A frozen reference shares the base weights with a policy that has an adapter, else it is a second model.
- **gradients** and **optimizer**: the trained weights once, and twice for AdamW's moments.
- **activations** of an update: what autograd keeps for a token and layer is a sum of the layer's widths, `KEPT`,
  counted by hooks on saved tensors (a test counts again). With gradient checkpointing only the input of each layer is
  kept, and one layer is computed again.
- **cache**: keys and values of a unit's rows, as `KVRows` reserves them: twice the room whenever it is full.
- **logits**: as `prefloop.models.forward` and `prefloop.models.draw` hold them.

A block that is freed counts no more (`prefloop.models.allocation`); on a GPU, `SLACK` is what its allocator holds back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from prefloop.planning.shapes import BYTES, OUTER_NORMS, QK_NORMS, ModelShape

Precision = Literal["float32", "bfloat16", "mixed"]
"""Of the layers' arithmetic; mixed: weights in float32, arithmetic in bfloat16."""

PROCESS, ADAPTING, QUANTISING = 440 << 20, 30 << 20, 110 << 20
"""Of the libraries; more with peft, which only adapters need, and more where that finds bitsandbytes installed."""

ON_DEVICE = 600 << 20
"""What CUDA itself takes of a GPU."""

SLACK = {"cpu": 1.02, "cuda": 1.05}

# Bytes kept of a token in a layer, for each unit of hidden size, queries, keys, feed-forward and rank of an adapter.
KEPT: Mapping[tuple[Precision, bool], tuple[int, int, int, int, int]] = {
    ("float32", False): (24, 8, 8, 16, 0),
    ("float32", True): (16, 8, 8, 16, 28),
    ("bfloat16", False): (16, 4, 4, 8, 0),
    ("bfloat16", True): (28, 8, 4, 10, 28),
    ("mixed", False): (26, 4, 4, 8, 0),
    ("mixed", True): (18, 6, 4, 8, 14),
}
NORMED_KEPT: Mapping[tuple[Precision, bool], int] = {
    ("float32", False): 8,
    ("float32", True): 4,
    ("bfloat16", False): 7,
    ("bfloat16", True): 4,
    ("mixed", False): 7,
    ("mixed", True): 4,
}
"""The same for each unit of queries and keys where those are normalised."""

OUTER_KEPT: Mapping[tuple[Precision, bool], int] = {
    ("float32", False): 16,
    ("float32", True): 8,
    ("bfloat16", False): 20,
    ("bfloat16", True): 8,
    ("mixed", False): 16,
    ("mixed", True): 8,
}

QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.516}
"""Of a weight: NF4 with a scale of 8 bits for 64 weights and one of 32 for 256 of those (arXiv:2305.14314)."""

LOGIT_BUDGET, CHUNK_TOKENS, CHUNK_LOGITS = 1 << 29, 512, 1 << 24  # as in prefloop.models.forward
FEED_FORWARD_CHUNK = 2048  # as in prefloop.models.sparing
PREFILL_TOKENS, GRANULE, KEPT_ARENA = 4096, 64, 1 << 30  # as in prefloop.models.cached_engine and kv_cache


@dataclass(frozen=True, slots=True)
class Setup:
    """How a policy is held and trained.

    `rank` None: all weights are trained; `reference`: the objective has one; `follows`: it follows the policy, with
    weights of its own.
    """

    shape: ModelShape
    dtype: str
    rank: int | None
    device: str
    precision: str
    checkpointing: bool
    max_tokens: int
    reference: bool = True
    quantization: str | None = None
    follows: bool = False

    @property
    def arithmetic(self) -> Precision:
        """That of the layers in an update."""
        if self.dtype == "bfloat16":
            return "bfloat16"
        return "mixed" if self.precision == "bfloat16" else "float32"

    @property
    def base_bytes(self) -> int:
        """Of the model without an adapter; embeddings and norms are never rounded to few bits."""
        shape = self.shape
        if self.quantization is None:
            return shape.num_parameters * BYTES[self.dtype]
        rounded = int(shape.num_body_parameters * QUANTISED_BYTES[self.quantization])
        return rounded + (shape.num_parameters - shape.num_body_parameters) * BYTES[self.dtype]

    @property
    def adapter_bytes(self) -> int:
        """Of the adapter, if there is one."""
        return 0 if self.rank is None else 4 * self.shape.num_adapter_parameters(self.rank)

    @property
    def trained_bytes(self) -> int:
        """Of the weights that an update changes."""
        return self.base_bytes if self.rank is None else self.adapter_bytes

    def kept_per_token(self) -> int:
        """Bytes that a layer keeps of a token for the backward pass."""
        key, shape = (self.arithmetic, self.rank is not None), self.shape
        hidden, query, keys, wide, rank = KEPT[key]
        if shape.model_type in QK_NORMS:
            query, keys = query + NORMED_KEPT[key], keys + NORMED_KEPT[key]
        if shape.model_type in OUTER_NORMS:
            hidden += OUTER_KEPT[key]
        widths = (shape.hidden, shape.query_width, shape.key_width, shape.feed_forward, self.rank or 0)
        return sum(a * b for a, b in zip((hidden, query, keys, wide, rank), widths, strict=True))


@dataclass(frozen=True, slots=True)
class Sampling:
    """A unit of rollouts: rows at once, of how many tasks, tokens of a prompt, and positions after it."""

    num_rows: int
    num_tasks: int
    prompt: int
    after: int

    @property
    def num_positions(self) -> int:
        """Tokens of all rows, each with its prompt."""
        return self.num_rows * (self.prompt + self.after)


@dataclass(frozen=True, slots=True)
class Update:
    """An optimizer step: tokens that it computes, those of them that enter the loss, and how many steps there are.

    `longest` is how many tokens a single path has: one that is longer than a pack goes through whole.
    """

    num_tokens: int
    num_loss_tokens: int
    num_steps: int
    longest: int = 0


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak of a stage, in bytes, and what it is made of."""

    stage: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def load_peak(setup: Setup, others: int) -> Peak:
    """While a model is loaded; its file is mapped, so that weights of another dtype are there twice.

    `others` are bytes of models beside the policy: the judge's.
    """
    stored = setup.shape.stored_bytes
    converted = stored if stored and stored != setup.base_bytes else 0
    weights = {"weights": setup.base_bytes + setup.adapter_bytes, "file": converted}
    return _peak(setup, "load", weights | {"judge": others})


def sampling_peak(setup: Setup, stage: str, unit: Sampling, others: int) -> Peak:
    """While a unit is rolled out; a reference stays in memory from the first evaluation on."""
    cache = cache_bytes(setup, unit)
    logits = unit.num_rows * setup.shape.vocabulary * (12 if setup.dtype == "float32" else 14)
    tokens = min(PREFILL_TOKENS, unit.num_tasks * unit.prompt)
    prefill = tokens * _inference_per_token(setup) + min(tokens, PREFILL_TOKENS) * _feed_forward(setup)
    parts = {"cache": cache, "logits": logits, "activations": max(0, prefill - logits)}
    return _peak(setup, stage, _models(setup) | {"judge": others} | parts)


def scoring_peak(setup: Setup, stage: str, num_tokens: int, others: int, arena: int, longest: int = 0) -> Peak:
    """While the reference scores tokens, packed up to `max_tokens` of them, or a path of `longest` alone."""
    tokens = min(num_tokens, max(setup.max_tokens, longest, 1))
    activations = tokens * _inference_per_token(setup) + min(tokens, FEED_FORWARD_CHUNK) * _feed_forward(setup)
    logits = 3 * _chunk_bytes(setup.shape, tokens)
    parts = {"cache": arena, "logits": logits, "activations": activations}
    return _peak(setup, stage, _models(setup) | {"judge": others} | parts)


def update_peak(setup: Setup, stage: str, update: Update, others: int, arena: int) -> Peak:
    """While an optimizer step runs.

    The peak is at the end of the forward pass, when all activations are there, or at that of the backward pass, when
    all gradients are; with several micro-batches the gradients of the first are there from then on.
    """
    shape, trained = setup.shape, setup.trained_bytes
    tokens = min(update.num_tokens, setup.max_tokens)
    several = update.num_tokens > setup.max_tokens
    kept, transient = _kept(setup, tokens), tokens * _backward_per_token(setup)
    if update.longest > setup.max_tokens:
        kept = max(kept, update.longest * _long_path_per_token(setup))
    loss_tokens = min(update.num_loss_tokens, tokens)
    # Beyond the budget none are kept; but packs of a step differ, and one just below it keeps most.
    full = min(4 * loss_tokens * shape.vocabulary, LOGIT_BUDGET)
    logits = full + 3 * _chunk_bytes(shape, loss_tokens)
    embedding = 0 if setup.rank is not None else shape.vocabulary * shape.hidden * 4
    forward = kept + logits + embedding + (trained if several else 0)
    backward = trained + _layer(setup, tokens) + transient + embedding + full
    # Both as if the gradients came first: what is left of the larger of the two is activations.
    gradients = trained if several or backward >= forward else min(trained, embedding)
    rest = max(forward, backward) - gradients - logits
    parts = {
        "gradients": gradients,
        "optimizer": 2 * trained if update.num_steps > 1 or backward >= forward else 0,
        "activations": max(0, rest),
        "logits": logits,
        "cache": arena,
    }
    return _peak(setup, stage, _models(setup) | {"judge": others} | parts)


def cache_bytes(setup: Setup, unit: Sampling) -> int:
    """Keys and values of a unit at the moment when its rows are given more room."""
    shared = unit.num_tasks < unit.num_rows
    own = unit.after if shared else unit.prompt + unit.after
    room = _room(own, 0 if shared else unit.prompt)
    old = room // 2 if room > _granules(0 if shared else unit.prompt) and room > GRANULE else 0
    prefixes = unit.num_tasks * _granules(unit.prompt) if shared else 0
    return (unit.num_rows * (room + old) + prefixes) * position_bytes(setup)


def arena_bytes(setup: Setup, unit: Sampling) -> int:
    """What the sampler keeps between units of a policy, for the next one."""
    shared = unit.num_tasks < unit.num_rows
    room = _room(unit.after if shared else unit.prompt + unit.after, 0 if shared else unit.prompt)
    kept = unit.num_rows * room * position_bytes(setup)
    return kept if kept <= KEPT_ARENA and not setup.device.startswith("cuda") else 0


def position_bytes(setup: Setup) -> int:
    """Keys and values of one token."""
    return setup.shape.num_layers * 2 * setup.shape.key_width * BYTES[setup.dtype]


def _room(positions: int, first: int) -> int:
    """Positions that a row has room for: twice as many whenever they are full, from the first need on."""
    room = _granules(max(1, first))
    while room < positions:
        room *= 2
    return room


def _granules(positions: int) -> int:
    return -(-positions // GRANULE) * GRANULE


def _models(setup: Setup) -> dict[str, int]:
    shared = setup.adapter_bytes if setup.shape.adapter_rank is not None else 0
    reference = setup.base_bytes if setup.rank is None or setup.follows else shared
    return {
        "weights": setup.base_bytes + setup.adapter_bytes,
        "reference": reference if setup.reference else 0,
    }


def _kept(setup: Setup, tokens: int) -> int:
    shape = setup.shape
    width = 2 if setup.arithmetic == "bfloat16" else 4
    copies = 2 * shape.num_body_parameters if setup.arithmetic == "mixed" else 0  # of the weights, in bfloat16
    if setup.checkpointing:
        return tokens * (shape.num_layers + 2) * shape.hidden * width + _layer(setup, tokens)
    return tokens * shape.num_layers * setup.kept_per_token() + copies


def _long_path_per_token(setup: Setup) -> int:
    """Of a path beyond a pack: the inputs of all layers, and the layer at work (see `prefloop.models.sparing`).

    Numbers of a layer, some of which an adapter takes to float32, as measured (docs/training.md).
    """
    shape, width = setup.shape, 2 if setup.arithmetic == "bfloat16" else 4
    layer = 5 * shape.hidden + 3 * shape.query_width + 3 * shape.key_width
    at_work = 3.5 if width == 2 and setup.rank is not None else width
    return shape.num_layers * shape.hidden * width + int(layer * at_work)


def _layer(setup: Setup, tokens: int) -> int:
    """What one layer keeps."""
    copies = 2 * setup.shape.num_body_parameters if setup.arithmetic == "mixed" else 0
    return tokens * setup.kept_per_token() + copies // setup.shape.num_layers


def _backward_per_token(setup: Setup) -> int:
    """Gradients of the widest tensors of a layer, alive at once."""
    width = 2 if setup.arithmetic != "float32" else 4
    return width * (2 * setup.shape.feed_forward + 2 * setup.shape.hidden)


def _inference_per_token(setup: Setup) -> int:
    """Residual, norm, queries, keys, values and the attention's sums in float32."""
    shape, width = setup.shape, BYTES[setup.dtype]
    return width * (3 * shape.hidden + 2 * shape.query_width + 3 * shape.key_width) + 4 * shape.query_width


def _feed_forward(setup: Setup) -> int:
    """Of a token of a chunk; an adapter adds its product in float32."""
    width = BYTES[setup.dtype] * 3 + (8 if setup.rank is not None else 0)
    return width * setup.shape.feed_forward


def _chunk_bytes(shape: ModelShape, tokens: int) -> int:
    """Logits that are computed at a time."""
    step = min(CHUNK_TOKENS, max(1, CHUNK_LOGITS // shape.vocabulary), max(1, tokens))
    return 4 * step * shape.vocabulary


def _peak(setup: Setup, stage: str, parts: Mapping[str, int]) -> Peak:
    on_device = setup.device.startswith("cuda")
    slack = SLACK["cuda" if on_device else "cpu"]
    scaled = {name: int(size * slack) for name, size in parts.items()}
    return Peak(stage, {"process": ON_DEVICE if on_device else _process(setup), **scaled})


def _process(setup: Setup) -> int:
    if setup.rank is None:
        return PROCESS
    return PROCESS + ADAPTING + (QUANTISING if find_spec("bitsandbytes") is not None else 0)


def largest(peaks: Iterator[Peak] | list[Peak]) -> Peak:
    """The stage that needs most."""
    return max(peaks, key=lambda peak: peak.total)
