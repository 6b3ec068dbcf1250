"""Measuring online cells: the same loss and gradient norm of all engines first, then their steps in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import nn

from _common import Measured, Options, Timing, interleaved
from _offline_engines import Ours, Padded
from _offline_measure import times
from _offline_models import SMALL, needed_work, new_model, noisy_copy
from _offline_rows import FIRST_TOKEN
from _offline_trl import toy_tokenizer
from _online_engines import ONLINE, Online, OurStep, Task
from _online_rows import Rollouts
from _online_trl import TheirStep, TheirTraining
from prefloop.batch.examples import RolloutGroup
from prefloop.stages.rewarding import credit_groups
from prefloop.training.logprobs import with_reference

TOLERANCE = 1e-3
"""Relative difference of losses and of gradient norms. TRL keeps log-probs in float32; the ratio of a whole sample is
the exponential of a sum."""

LEAST = 1e-3
"""What differences of smaller losses are relative to: on the tokens of the policy itself RLOO's loss is 0, and the norm
of the gradient is what tells."""

OLD_NOISE = {"grpo": 2e-3, "rloo": 1e-3}
"""Noise of the policy that sampled: so much that losses depend on log-probs and some are clipped, and not most."""

PEERS = ("installed", "compact", "padded")
STEP_PROMPTS, STEP_GROUP, STEP_PROMPT, STEP_LONGEST, STEP_MEAN = 8, 8, 256, 128, 56


class Engine(Protocol):
    """An optimizer step a call; its loss, and afterwards the norm of its gradient before clipping."""

    @property
    def grad_norm(self) -> float: ...

    def __call__(self) -> float: ...


@dataclass(frozen=True)
class Training:
    """A cell of the training part: figures are `LABEL_PEER_SUFFIX`."""

    label: str
    algorithm: str
    rollouts: Callable[[Options], Rollouts]
    suffix: str = ""
    peers: tuple[str, ...] = PEERS
    repetitions: int = 5

    def figure(self, what: str) -> str:
        return "_".join(part for part in (self.label, what, self.suffix) if part)


def measure_training(case: Training, options: Options) -> Measured:
    """Time a step on rollouts that are there: loss, backward, clipping and the update."""
    rollouts = case.rollouts(options)
    found = replace(ONLINE[case.algorithm], longest=rollouts.longest)
    model = new_model(SMALL, options.seed)
    group = credited(found, model, rollouts, options.seed)
    engines = training_engines(found, model, rollouts, group, case.peers)
    differences = check_same(case.figure("step"), engines)
    timings = interleaved(engines, 1 if options.quick else case.repetitions, warm=True)
    work, flops, num_visits = needed_work(found, model, [group])
    figures = {
        **ratios(timings),
        "s": timings["ours"].median_cpu,
        **{f"{peer}_s": timings[peer].median_cpu for peer in case.peers},
        "visited": float(num_visits),
        "computed": float(work.tokens),
        **differences,
    }
    rate = flops / timings["ours"].median_cpu / 1e9
    rows = table(timings)
    rows[0]["distinct"] = f"{work.tokens} of {num_visits} tokens, {rate:.0f} GFLOP/s"
    return Measured({case.figure(what): value for what, value in figures.items()}, rows)


def credited(found: Online, model: nn.Module, rollouts: Rollouts, seed: int) -> RolloutGroup:
    """The group with advantages of random rewards, and the log-probs of the policy that sampled it."""
    num = len(rollouts.completions)
    rewards = np.random.default_rng([seed, num]).random(num)
    (group,) = credit_groups([rollouts.group([0.0] * num)], rewards, found.all_knobs).groups
    before = noisy_copy(model, seed, OLD_NOISE[found.algorithm])
    (scored,) = with_reference(before, [group])
    return replace(group, old_logprob=scored.ref_logprob)


def training_engines(
    found: Online, model: nn.Module, rollouts: Rollouts, group: RolloutGroup, peers: Sequence[str]
) -> dict[str, Engine]:
    builders: dict[str, Callable[[Any], Engine]] = {
        "installed": lambda own: TheirTraining(found, own, rollouts, group),
        "compact": lambda own: TheirTraining(found, own, rollouts, group, compact=True),
        "padded": lambda own: Padded(found, own, None, [group]),
    }
    engines: dict[str, Engine] = {"ours": Ours(found, copy.deepcopy(model), None, [group])}
    return engines | {name: builders[name](copy.deepcopy(model)) for name in peers}


def check_same(name: str, engines: Mapping[str, Engine]) -> dict[str, float]:
    """That the first step of all engines has one loss and one gradient norm; the largest relative differences."""
    first = {engine: {"loss": step(), "grad_norm": step.grad_norm} for engine, step in engines.items()}
    ours = first.pop("ours")
    assert ours["grad_norm"] > 0, f"{name}: there is no gradient"
    largest = {f"{what}_rel_diff": 0.0 for what in ours}
    for engine, found in first.items():
        for what, value in found.items():
            off = abs(value - ours[what]) / max(abs(ours[what]), LEAST)
            assert off < TOLERANCE, f"{name}: {what} {ours[what]}, {engine} {value}"
            largest[f"{what}_rel_diff"] = max(largest[f"{what}_rel_diff"], off)
    return largest


def measure_step(algorithm: str, options: Options, *, num_passes: int = 1) -> Measured:
    """A whole step: 64 rollouts in groups of 8, prompts of 256 tokens, geometric lengths of up to 128.

    With two passes over the rollouts both libraries compute the policy's log-probs before they train; with one neither
    needs to, but RLOOTrainer does.
    """
    label = f"{algorithm}_step" if num_passes == 1 else f"{algorithm}_passes_{num_passes}"
    task = new_task(options)
    found, model = replace(ONLINE[algorithm], longest=task.longest), new_model(SMALL, options.seed)
    own, tokenizer = copy.deepcopy(model), toy_tokenizer(SMALL.vocab)
    engines: dict[str, Any] = {"ours": OurStep(found, own, tokenizer, task, options.seed, num_passes=num_passes)}
    for name in ("installed", "compact"):
        theirs, compact = copy.deepcopy(model), name == "compact"
        engines[name] = TheirStep(found, theirs, task, options.seed, compact=compact, num_passes=num_passes)
    differences = check_same_rollouts(label, engines)
    timings = interleaved(engines, 1 if options.quick else 3, warm=True)
    share = float(np.median(engines["ours"].sampling_s[1:])) / timings["ours"].median_cpu
    figures = {**ratios(timings), "s": timings["ours"].median_cpu, "sampling_share": share, **differences}
    rows = table(timings)
    rows[0]["distinct"] = f"{share:.0%} sampling, {int(task.lengths.sum())} new tokens"
    return Measured({f"{label}_{what}": value for what, value in figures.items()}, rows)


def check_same_rollouts(name: str, engines: Mapping[str, Any]) -> dict[str, float]:
    """`check_same` on what ours sampled first, which TRL is given as if it had sampled it."""
    ours = engines["ours"]
    first = {"ours": Done(ours(), ours.grad_norm)}
    for peer, engine in engines.items():
        if isinstance(engine, TheirStep):
            engine.replay = ours.completions
            first[peer] = Done(engine(), engine.grad_norm)
            engine.replay = None
    return check_same(name, first)


@dataclass(frozen=True)
class Done:
    """A step that was taken."""

    loss: float
    grad_norm: float

    def __call__(self) -> float:
        return self.loss


def new_task(options: Options) -> Task:
    num, size, length, longest = STEP_PROMPTS, STEP_GROUP, STEP_PROMPT, STEP_LONGEST
    if options.quick:
        num, length, longest = 2, 64, 32
    rng = np.random.default_rng(options.seed)
    prompts = [" ".join(f"w{token}" for token in rng.integers(FIRST_TOKEN, SMALL.vocab, length)) for _ in range(num)]
    lengths = np.clip(rng.geometric(1 / STEP_MEAN, num * size), 1, longest)
    lengths[0] = longest  # TRL pads to it
    return Task(prompts, size, lengths, longest)


def ratios(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Time of each peer over ours."""
    ours = timings["ours"].median_cpu
    return {name: timing.median_cpu / ours for name, timing in timings.items() if name != "ours"}


def table(timings: Mapping[str, Timing]) -> list[dict[str, str]]:
    found = ratios(timings)
    return [
        {"engine": name, **times(timing), "× ours": f"{found[name]:.2f}" if name in found else ""}
        for name, timing in timings.items()
    ]
