"""How long an iteration takes: the arithmetic of its stages, at the rate that this machine has for these shapes.

The rate is measured, not looked up: products of the model's own widths, with as many rows as packs and decoding steps
have. `SHARE` is what remains of it in a stage, measured in models of 12 and 124 million parameters: rotary positions,
norms, attention in blocks, drawing and the optimizer take the rest. What waits for others (environments, judges behind
a server, the disk) is not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from prefloop.losses.registry import objective
from prefloop.planning.memory import Sampling, Setup, Update
from prefloop.planning.workload import Workload
from prefloop.stages.settings import RunSettings
from prefloop.training.settings import CriticSettings

PACK_ROWS = 512
"""Rows of a product of a pack; more do not make it faster."""

PROBE_SECONDS = 0.3
SHARE = {"pack": 0.75, "decode": 0.5}


@dataclass(frozen=True, slots=True)
class Rates:
    """Floating-point operations a second of products as those of a pack, and of a decoding step."""

    pack: float
    decode: float


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long the stages of an iteration take, and what is done once."""

    stages: dict[str, float]
    once: dict[str, float]

    @property
    def iteration(self) -> float:
        """All stages of one."""
        return sum(self.stages.values())


def measure_rates(setup: Setup, num_rows: int, num_threads: int) -> Rates:
    """The rates of this machine for the feed-forward of a model; `num_rows` are decoded at once. Needs torch."""
    import torch

    from prefloop.models.load import check_device

    check_device(setup.device)
    torch.set_num_threads(num_threads)
    weights = getattr(torch, setup.dtype)
    packed = torch.bfloat16 if setup.arithmetic != "float32" else torch.float32
    return Rates(_rate(setup, PACK_ROWS, packed), _rate(setup, max(1, min(num_rows, PACK_ROWS)), weights))


def _rate(setup: Setup, num_rows: int, dtype: object) -> float:
    import torch

    shape = setup.shape
    options = {"dtype": dtype, "device": setup.device}
    hidden = torch.ones(num_rows, shape.hidden, **options)  # type: ignore[call-overload]
    weight = torch.ones(shape.feed_forward, shape.hidden, **options)  # type: ignore[call-overload]
    best, begun = 0.0, time.perf_counter()
    torch.nn.functional.linear(hidden, weight)
    while time.perf_counter() - begun < PROBE_SECONDS or not best:
        started = time.perf_counter()
        out = torch.nn.functional.linear(hidden, weight)
        float(out[0, 0])  # a device's kernel has run when its result is there
        best = max(best, 2.0 * num_rows * weight.numel() / (time.perf_counter() - started))
    return best


def seconds_of(settings: RunSettings, setup: Setup, work: Workload, rates: Rates) -> Seconds:
    """The time of the stages of an iteration, evaluations before and after the loop apart."""
    units = work.num_trajectories / max(1, work.rollout.num_rows)
    guards = work.num_guards / max(1, work.guard.num_rows)
    readers = 2 if settings.guard.kl == "vocabulary" else 1  # policy and reference, or the reference alone
    guard = guards * (_sampled(setup, work.guard, rates) + readers * _scored(setup, work.guard.num_positions, rates))
    update = work.update.num_steps * _trained(setup, work.update, rates)
    scored = _scored(setup, work.update.num_tokens, rates) if setup.reference else 0.0
    stages = {"rollout": units * _sampled(setup, work.rollout, rates), "train": update + scored, "guard": guard}
    if objective(settings.train.algorithm).critic:
        passes = (settings.train.critic or CriticSettings()).num_epochs or settings.train.num_epochs
        said = _scored(setup, work.update.num_tokens, rates)
        stages["critic"] = said + update * passes / settings.train.num_epochs
    if settings.policy.vllm is not None:
        stages["rollout"] = 0.0
    num_attempts = 1 + settings.evaluation.greedy + (settings.evaluation.best_of or 0)
    times = 2 * num_attempts * settings.evaluation.num_tasks / work.evaluation.num_rows
    once = {"evaluate": 0.0 if settings.policy.vllm is not None else times * _sampled(setup, work.evaluation, rates)}
    if work.sft is not None:
        once["sft"] = work.sft.num_steps * _trained(setup, work.sft, rates)
    return Seconds(stages, once)


def _sampled(setup: Setup, unit: Sampling, rates: Rates) -> float:
    """A prompt once for each task, then row by row of tokens."""
    read = unit.num_tasks * unit.prompt * _forward(setup, unit.prompt / 2)
    words = 2 * setup.shape.vocabulary * setup.shape.hidden
    spoken = unit.num_rows * unit.after * (_forward(setup, unit.prompt + unit.after / 2) + words)
    return read / (SHARE["pack"] * rates.pack) + spoken / (SHARE["decode"] * rates.decode)


def _scored(setup: Setup, num_tokens: int, rates: Rates) -> float:
    work = _forward(setup, 0.0) + 2 * setup.shape.vocabulary * setup.shape.hidden
    return num_tokens * work / (SHARE["pack"] * rates.pack)


def _trained(setup: Setup, step: Update, rates: Rates) -> float:
    """Forward once (twice with gradient checkpointing), backward to the inputs and, of trained weights, to those."""
    passes = (3 if setup.rank is None else 2) + (1 if setup.checkpointing else 0)
    words = 2 * setup.shape.vocabulary * setup.shape.hidden * (3 if setup.rank is None else 2)
    work = step.num_tokens * passes * _forward(setup, 0.0) + step.num_loss_tokens * words
    return work / (SHARE["pack"] * rates.pack)


def _forward(setup: Setup, context: float) -> float:
    """Of a token that sees `context` others: two for each weight, and scores and sums of attention."""
    adapter = 0 if setup.rank is None else 2 * setup.shape.num_adapter_parameters(setup.rank)
    attention = 4 * setup.shape.num_layers * setup.shape.query_width * context
    return 2 * setup.shape.num_body_parameters + adapter + attention
