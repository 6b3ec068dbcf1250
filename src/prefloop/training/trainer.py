"""From examples to trained weights: the order of examples, the learning-rate schedule, and exact resumption.

The order is a function of (seed, epoch) and the learning rate of the step number alone, so that the only state
to save beside the weights is the optimizer's and the step number. A training that was killed goes on from its
last saved state and ends with the same bits (same machine, thread count and versions, on CPU).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefloop.batch.examples import Example
from prefloop.records import PrefloopError, content_hash
from prefloop.training.algorithms import Algorithm
from prefloop.training.checkpoint import newest_whole, save_atomically
from prefloop.training.settings import TrainingSettings
from prefloop.training.step import StepSettings, TrainingStep

Metrics = dict[str, float]
KEPT_STATES = 2


@dataclass(slots=True)
class _State:
    step: int = 0
    history: list[Metrics] = field(default_factory=list)


def count_steps(settings: TrainingSettings, num_examples: int) -> int:
    """The number of optimizer steps of a training."""
    return settings.num_steps or settings.num_epochs * math.ceil(num_examples / settings.batch_size)


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
    on_step: Callable[[int, int, Metrics], None] = lambda step, num_steps, metrics: None,
) -> list[Metrics]:
    """Train `model` in place; returns the metrics of each step.

    `identity` names what is trained on what: state saved in `state_directory` under another identity (or other
    settings, thread count or versions) is not used. `on_step` is told of each step done.

    Raises:
        PrefloopError: no examples; and as `TrainingStep`.
    """
    if not examples:
        raise PrefloopError(f"{algorithm.name}: there are no examples to train on")
    num_steps = count_steps(settings, len(examples))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    key = content_hash(
        identity, algorithm.name, repr(algorithm), settings.model_dump(), seed, num_steps, environment_fingerprint()
    )
    saved = _SavedState(state_directory / key, parameters, optimizer)
    state = saved.load()
    step = TrainingStep(model, reference, algorithm, optimizer, _step_settings(settings))
    while state.step < num_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, state.step, num_steps)
        chosen = batch_at(state.step, len(examples), settings.batch_size, seed)
        metrics = step([examples[i] for i in chosen], seed=(seed, state.step))
        state.history.append(metrics)
        state.step += 1
        on_step(state.step, num_steps, metrics)
        if state.step % settings.checkpoint_every == 0 and state.step < num_steps:
            saved.save(state)
    model.eval()
    return state.history


def forget_state(state_directory: Path) -> None:
    """Remove saved training state, once its result is safe."""
    shutil.rmtree(state_directory, ignore_errors=True)


def environment_fingerprint() -> dict[str, Any]:
    """What the bits of a training depend on besides its inputs."""
    return {
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _step_settings(settings: TrainingSettings) -> StepSettings:
    return StepSettings(max_tokens=settings.max_tokens, max_grad_norm=settings.max_grad_norm)


class _SavedState:
    """The state of a training on disk: weights, the optimizer's moments, the step and the metrics so far."""

    def __init__(self, directory: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
        self.directory = directory
        self.parameters = parameters
        self.optimizer = optimizer

    def save(self, state: _State) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"{moment}.{name}"] = value

        def write(target: Path) -> None:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "state.safetensors")
            (target / "state.json").write_text(json.dumps({"step": state.step, "history": state.history}))

        save_atomically(self.directory / f"step-{state.step:08d}", write)
        for old in sorted(self.directory.glob("step-*"))[:-KEPT_STATES]:
            shutil.rmtree(old)

    def load(self) -> _State:
        newest = newest_whole(self.directory)
        if newest is None:
            return _State()
        tensors = load_file(newest / "state.safetensors")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight.{name}"])
            keys = {moment: f"{moment}.{name}" for moment in ("step", "exp_avg", "exp_avg_sq")}
            if keys["step"] in tensors:  # no moments where no step was taken yet, all being skipped
                self.optimizer.state[parameter] = {m: tensors[k].to(parameter.device) for m, k in keys.items()}
        return _State(**json.loads((newest / "state.json").read_text()))
