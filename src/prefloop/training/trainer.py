"""From examples to trained weights: order, learning rate, evaluation, early stopping, and exact resumption.

The order of examples is a function of (seed, epoch) and the learning rate of the step number alone, so that the only
state to save beside the weights is the optimizer's and the result so far. A training that was killed goes on from its
last saved state and ends with the same bits (same machine, thread count and versions, on CPU).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prefloop.batch.examples import Example
from prefloop.models.allocation import map_large_blocks_of_wide
from prefloop.models.attention import causal_model
from prefloop.records import DivergedError, PrefloopError, content_hash
from prefloop.training.algorithm import Algorithm
from prefloop.training.metrics import HELD_OUT, LAST_STEPS, Metrics, is_better
from prefloop.training.reference import follow
from prefloop.training.settings import TrainingSettings, count_steps, warm_up_problem
from prefloop.training.state import Carried, Evaluation, SavedState, SkippedStep, TrainingResult
from prefloop.training.step import MovedEnoughError, StepSettings, TrainingStep
from prefloop.training.watch import falling_chosen
from prefloop.training.writers import MetricsWriter

log = logging.getLogger(__name__)

SKIPPED_ROWS = "skipped.jsonl"
"""Beside the states: the rows of each step that was not finite, one JSON object a line."""


class TrainingDivergedError(DivergedError):
    """Too many steps in a row, or what says when to stop, were not finite; `result` is what came before."""

    def __init__(self, message: str, result: TrainingResult) -> None:
        super().__init__(message)
        self.result = result


def check_warm_up(settings: TrainingSettings, num_examples: int) -> None:
    """See that a training is longer than its warm-up.

    Raises:
        PrefloopError: it is not.
    """
    if wrong := warm_up_problem(settings, count_steps(settings, num_examples)):
        raise PrefloopError(wrong)


def learning_rate_at(settings: TrainingSettings, step: int, num_steps: int) -> float:
    """The learning rate of step 0 … num_steps - 1."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.learning_rate * factor[settings.schedule]


def batch_at(step: int, num_examples: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """The indices of the examples of one optimizer step: each epoch is one seeded permutation."""
    steps_per_epoch = math.ceil(num_examples / batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[position * batch_size : (position + 1) * batch_size]


def train(
    model: nn.Module,
    reference: nn.Module | None,
    algorithm: Algorithm,
    examples: Sequence[Example],
    settings: TrainingSettings,
    *,
    seed: int,
    identity: str,
    state_directory: Path,
    held_out: Sequence[Example] = (),
    carried: Carried | None = None,
    max_update_kl: float | None = None,
    writers: Sequence[MetricsWriter] = (),
    on_step: Callable[[int, int, Metrics], None] = lambda step, num_steps, metrics: None,
    on_evaluation: Callable[[int, Metrics], None] = lambda step, metrics: None,
) -> TrainingResult:
    """Train `model` in place.

    `identity` names what is trained on what: state saved in `state_directory` under another identity (or other
    settings, thread count or versions) is not used. `held_out` examples are evaluated, never learned from. The training
    ends before a step at which the policy has moved by more than `max_update_kl` nats a token (`update_kl` of
    docs/metrics.md; None: wherever it goes). `on_step` is
    told of each step done, `on_evaluation` of each evaluation; `writers` are given all metrics from the first step on,
    in a training that goes on too. `carried` hands the optimizer's moments from one training to the next. A
    reference that follows the policy (`sync_reference_every`) is changed in place.

    Raises:
        PrefloopError: no examples, a warm-up that is longer than the training, nothing held out to evaluate, a
            reference that cannot follow; and as `TrainingStep`.
        TrainingDivergedError: too many steps in a row were not finite, or with patience the held-out metric.
    """
    _check(algorithm, reference, examples, held_out, settings)
    map_large_blocks_of_wide(model)
    check_warm_up(settings, len(examples))
    num_steps = count_steps(settings, len(examples))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    knobs = settings.model_dump(exclude={"report_to"})
    sizes = (num_steps, len(held_out), max_update_kl)
    begin = carried and carried.begin and carried.begin.name
    key = content_hash(identity, algorithm.name, repr(algorithm), knobs, seed, sizes, begin, environment_fingerprint())
    follows = reference is not None and settings.sync_reference_every is not None
    changing = dict(reference.named_parameters()) if reference is not None and follows else {}
    saved = SavedState(state_directory / key, parameters, optimizer, changing, carried)
    step = TrainingStep(model, reference, algorithm, optimizer, _step_settings(settings, max_update_kl))
    training = _Training(step, settings, seed, saved, examples, held_out, num_steps, writers, on_step, on_evaluation)
    with _recomputing(model, settings.gradient_checkpointing):
        return training.run()


@dataclass(slots=True)
class _Training:
    """A training on its way."""

    step: TrainingStep
    settings: TrainingSettings
    seed: int
    saved: SavedState
    examples: Sequence[Example]
    held_out: Sequence[Example]
    num_steps: int
    writers: Sequence[MetricsWriter]
    on_step: Callable[[int, int, Metrics], None]
    on_evaluation: Callable[[int, Metrics], None]
    result: TrainingResult = field(init=False)

    def run(self) -> TrainingResult:
        """Go on from the saved state to the end."""
        self.result = self.saved.load()
        history = self.result.history
        self.step.num_skipped_in_a_row = sum(1 for _ in takewhile(lambda m: m["skipped"], reversed(history)))
        for number in range(1, len(history) + 1):
            self._write(number)
        while len(history) < self.num_steps and not self._has_ended():
            self._go_on()
        if self.result.stopped and self.held_out and history and not self._was_evaluated(len(history)):
            self._evaluate(len(history))
        if self.settings.patience is not None:
            self.saved.restore_best()
        self.saved.leave_moments()
        self.step.optimizer.zero_grad(set_to_none=True)  # gradients would live as long as the model
        self.step.optimizer.state.clear()  # and moments until the garbage collector comes to them
        self.step.model.eval()
        return self.result

    def _has_ended(self) -> bool:
        return self.result.stopped_early or bool(self.result.stopped)

    def _go_on(self) -> None:
        """One step, and what is due after it; nothing where the policy has moved far enough."""
        settings, index = self.settings, len(self.result.history)
        rate = learning_rate_at(settings, index, self.num_steps)
        for group in self.step.optimizer.param_groups:
            group["lr"] = rate
        try:
            metrics = {**self._step(index), "learning_rate": rate}
        except MovedEnoughError as reason:
            self.result.stopped = str(reason)
            self._warn(self.result.stopped)
            return
        self.result.history.append(metrics)
        number, last = index + 1, index + 1 == self.num_steps
        self.on_step(number, self.num_steps, metrics)
        if number % LAST_STEPS == 0 or last:
            self._watch()
        if settings.sync_reference_every and number % settings.sync_reference_every == 0:
            assert self.step.reference is not None  # seen to before
            follow(self.step.reference, self.step.model, settings.sync_reference_mixup)
        if self.held_out and (last or (settings.evaluate_every and number % settings.evaluate_every == 0)):
            self._evaluate(number)
        self._write(number)
        if number % settings.checkpoint_every == 0 and not last and not self.result.stopped_early:
            self.saved.save(self.result)

    def _step(self, index: int) -> Metrics:
        chosen = batch_at(index, len(self.examples), self.settings.batch_size, self.seed)
        try:
            metrics = self.step([self.examples[i] for i in chosen], seed=(self.seed, index))
        except DivergedError as error:
            where = self._keep_skipped(index + 1)
            raise TrainingDivergedError(f"{error}; those of each such step are in {where}", self.result) from error
        if metrics["skipped"]:
            self._keep_skipped(index + 1)
        return metrics

    def _keep_skipped(self, number: int) -> Path:
        """Keep the rows of a step that was skipped, in the result and in a file beside the states."""
        skipped = self.step.last_skipped
        assert skipped is not None
        kept = SkippedStep(number, str(skipped.loss), str(skipped.grad_norm), skipped.rows)
        self.result.skipped.append(kept)
        self.saved.directory.mkdir(parents=True, exist_ok=True)
        path = self.saved.directory / SKIPPED_ROWS
        path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in self.result.skipped))
        return path

    def _watch(self) -> None:
        """Warn once."""
        found = None if self.result.chosen_fell else falling_chosen(self.result.history, self.step.algorithm)
        if found is not None:
            self.result.chosen_fell = True
            self._warn(found)

    def _warn(self, text: str) -> None:
        self.result.warnings.append(f"step {len(self.result.history)}: {text}")
        log.warning("%s", self.result.warnings[-1])

    def _evaluate(self, number: int) -> None:
        """Measure the held-out rows; notes the best weights, and whether patience has ended."""
        result, name, patience = self.result, self.settings.early_stopping_metric, self.settings.patience
        found = self.step.evaluate(self.held_out, seed=(self.seed, 0, 1))  # not a seed of any step
        if not math.isfinite(found["loss"]):
            found[name] = math.nan  # a mean that leaves rows out, or an accuracy of NaN, tells nothing of these weights
        if name not in found:
            raise PrefloopError(
                f"early_stopping_metric: {self.step.algorithm.name} has no {name!r}; it has {', '.join(sorted(found))}"
            )
        self._check_finite(number, found)
        best = next((one.metrics[name] for one in result.evaluations if one.step == result.best_step), None)
        result.evaluations.append(Evaluation(number, {n: value for n, value in found.items() if math.isfinite(value)}))
        if is_better(name, found[name], best):
            result.best_step = number
            if patience is not None:
                self.saved.keep_best()
        since = sum(one.step > (result.best_step or 0) for one in result.evaluations)
        result.stopped_early = patience is not None and since >= patience and number < self.num_steps
        self.on_evaluation(number, result.evaluations[-1].metrics)

    def _check_finite(self, number: int, found: Metrics) -> None:
        """Warn of held-out metrics that are not finite; where one of them says when to stop, that ends the training."""
        for name in sorted(name for name, value in found.items() if not math.isfinite(value)):
            text = f"{name} of the held-out rows is {found[name]}"
            if self.settings.patience is not None and name == self.settings.early_stopping_metric:
                raise TrainingDivergedError(
                    f"step {number}: {text}, and early stopping goes by it: take smaller steps (learning_rate)",
                    self.result,
                )
            self._warn(text)

    def _was_evaluated(self, number: int) -> bool:
        return any(one.step == number for one in self.result.evaluations)

    def _write(self, number: int) -> None:
        """Give the writers a step's metrics, those of the held-out rows among them."""
        found = next((one.metrics for one in self.result.evaluations if one.step == number), {})
        metrics = {**self.result.history[number - 1], **{f"{HELD_OUT}{name}": value for name, value in found.items()}}
        for writer in self.writers:
            writer.write(number, metrics)


def _check(
    algorithm: Algorithm,
    reference: nn.Module | None,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: TrainingSettings,
) -> None:
    if not examples:
        raise PrefloopError(f"{algorithm.name}: there are no examples to train on")
    if settings.evaluate_every is not None and not held_out:
        raise PrefloopError("evaluate_every: no rows are held out; set held_out to the share of the prompts to keep")
    if settings.sync_reference_every is None:
        return
    if not algorithm.needs_reference:
        raise PrefloopError(f"sync_reference_every: {algorithm.name} has no reference that could follow the policy")
    scored = [*examples, *held_out, *getattr(algorithm, "samples", ())]
    if reference is None or any(example.ref_logprob for example in scored):
        raise PrefloopError(
            "sync_reference_every: a reference that follows the policy must be there itself, its log-probs cannot be "
            "computed before"
        )


@contextmanager
def _recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Compute hidden states again in the backward pass, in place of keeping them."""
    causal: Any = causal_model(model)
    if on:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            causal.gradient_checkpointing_disable()


def environment_fingerprint() -> dict[str, Any]:
    """What the bits of a training depend on besides its inputs."""
    return {
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _step_settings(settings: TrainingSettings, max_update_kl: float | None) -> StepSettings:
    return StepSettings(
        max_tokens=settings.max_tokens,
        max_grad_norm=settings.max_grad_norm,
        max_skipped=settings.max_skipped,
        autocast=settings.precision == "bfloat16",
        max_update_kl=math.inf if max_update_kl is None else max_update_kl,
    )
