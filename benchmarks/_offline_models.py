"""Models of the offline speed benchmark, the work that a step needs on them, and the machine's rate at such work.

The work of a step counts every distinct token once: what no implementation can do without.

    FLOPs = sum over forwards of  k (2 N T + 4 L D A + 2 D W U)

N weights of the body's linear layers, T distinct tokens, L layers, D attention width (heads times head size), A pairs
of a token and one that it attends to (the sum of depth + 1), W vocabulary, U distinct tokens whose log-prob is read;
k = 3 for a forward with its backward, 1 for one without. A reward model has no vocabulary: W is 1.
The rate is that of `torch.mm` at the shapes of the body's layers and the head with the step's number of tokens, forward
and both backward products, all FLOPs over the sum of the best times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from _offline_engines import Objective
from prefloop.batch.examples import Example
from prefloop.batch.packed import PackedBatch, pack
from prefloop.training.kl_samples import rotated

PAD_TOKEN = 0
NOISE = 2e-3  # between policy and reference, so that losses are not those of equal models


@dataclass(frozen=True)
class Shape:
    """A Qwen shape."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    family: str = "qwen3"
    head_size: int = 64
    max_length: int = 16384
    tied: bool = True


SMALL = Shape(hidden=256, layers=4, intermediate=768, heads=4, kv_heads=2, vocab=4096)
WIDE = Shape(hidden=512, layers=8, intermediate=1536, heads=8, kv_heads=4, vocab=16384)


def new_model(shape: Shape, seed: int, *, scores: bool = False) -> Any:
    """A model with random weights in float32; with `scores` it has a scalar head instead of a vocabulary."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{shape.family.title()}Config")(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.max_length,
        pad_token_id=PAD_TOKEN,
        attn_implementation="sdpa",
        num_labels=1,
    )
    kind = "ForSequenceClassification" if scores else "ForCausalLM"
    return getattr(transformers, f"{shape.family.title()}{kind}")(config)


def noisy_copy(model: nn.Module, seed: int, noise: float = NOISE) -> Any:
    """The reference: the model with a little noise."""
    other = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += noise * torch.randn(p.shape, generator=generator).to(p)
    return other


@dataclass(frozen=True)
class Work:
    """Distinct tokens of a forward: how many, the pairs that attention joins, and how many the head reads."""

    tokens: int
    attended: int
    read: int

    def flops(self, model: Any) -> float:
        """Of one forward."""
        config = model.config
        body = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
        width = config.num_attention_heads * config.head_dim
        outputs = model.score.out_features if hasattr(model, "score") else config.vocab_size
        attention = 4 * config.num_hidden_layers * width * self.attended
        return 2 * body * self.tokens + attention + 2 * config.hidden_size * outputs * self.read


def work_of(batch: PackedBatch, read_V: torch.Tensor) -> Work:
    """The work of a forward over a batch that shares all it can."""
    read = int(torch.unique(batch.visit_token_V[read_V]).numel())
    return Work(batch.num_tokens, int((batch.depth_T + 1).sum()), read)


def needed_work(
    objective: Objective, model: Any, examples: Sequence[Example], *, merge: bool = True
) -> tuple[Work, float, int]:
    """The policy's work with everything shared (or nothing), the FLOPs of a step, and the tokens that paths visit.

    KTO also scores mismatched completions under both models without gradient.
    """
    algorithm = objective.make()
    batch = pack(examples, merge=merge)
    policy = everything = work_of(batch, algorithm.read_V(batch))
    num_visits = batch.visit_token_V.shape[0]
    if objective.algorithm == "kto":
        joint = pack([*examples, *rotated(examples, (0,))], merge=merge)
        everything = work_of(joint, joint.loss_mask_V)
        num_visits = joint.visit_token_V.shape[0]
    num_reference = int(algorithm.needs_reference and not objective.precomputed)
    flops = 2 * policy.flops(model) + (1 + num_reference) * everything.flops(model)
    return everything, flops, num_visits


class MatmulRate:
    """Times the products of a step's linear layers; call it a few times, then read `best`."""

    def __init__(self, model: Any, num_tokens: int, num_read: int, dtype: torch.dtype) -> None:
        device = next(model.parameters()).device
        shapes = [m.weight.shape for m in model.base_model.modules() if isinstance(m, nn.Linear)]
        counts = {shape: shapes.count(shape) for shape in shapes}
        jobs = [(num_tokens, *shape, count) for shape, count in counts.items()]
        if not hasattr(model, "score"):
            jobs.append((num_read, model.config.vocab_size, model.config.hidden_size, 1))
        self._products = [self._operands(*job, device, dtype) for job in jobs]
        self._best = [float("inf")] * len(jobs)
        self._flops = sum(6.0 * rows * out * inner * count for rows, out, inner, count in jobs)
        self._counts = [job[-1] for job in jobs]

    @staticmethod
    def _operands(
        rows: int, out: int, inner: int, count: int, device: torch.device, dtype: torch.dtype
    ) -> Sequence[torch.Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (out, inner), (rows, out))]

    def __call__(self) -> None:
        for i, (x, weight, grad) in enumerate(self._products):
            begin = _now(x.device)
            x @ weight.T
            grad @ weight
            grad.T @ x
            self._best[i] = min(self._best[i], _now(x.device) - begin)

    @property
    def best(self) -> float:
        """Floating-point operations a second."""
        return self._flops / sum(best * count for best, count in zip(self._best, self._counts, strict=True))


def _now(device: torch.device) -> float:
    """Process CPU seconds; wall seconds where an accelerator does the work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
