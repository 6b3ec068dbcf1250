"""prefloop's side of the online benchmark: the objectives, and a whole step that samples, scores and trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from torch import nn

from _offline_engines import MAX_GRAD_NORM, Objective, new_optimizer
from _offline_rows import FIRST_TOKEN
from _online_rows import Rollouts
from prefloop.clients.sampling import SamplingSettings
from prefloop.losses.registry import objective
from prefloop.models.sampler import LocalSampler
from prefloop.stages.rewarding import credit_groups
from prefloop.training.algorithm import Algorithm
from prefloop.training.logprobs import logprobs_of
from prefloop.training.policy_gradient import PolicyGradient, reads_old_logprobs
from prefloop.training.step import StepSettings, TrainingStep

EOS = 1


@dataclass(frozen=True)
class Online(Objective):
    """An objective of rollouts; `longest` is what its constant denominator divides by."""

    longest: int = 1

    @property
    def all_knobs(self) -> dict[str, Any]:
        return {**objective(self.algorithm).knobs, **self.knobs}

    def make(self) -> Algorithm:
        return PolicyGradient(self.algorithm, self.all_knobs, 1.0, self.longest)


DR_GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.2, "epsilon_high": 0.28}
FREE = {"kl_coef": 0.0}
ONLINE = {
    "grpo": Online("grpo", "grpo", FREE, {"beta": 0.0, **DR_GRPO}),
    "rloo": Online("rloo", "rloo", FREE, {"beta": 0.0, "epsilon": 0.2}),
}
"""Without KL: none of the peers scores a reference."""


def reward(completions: Sequence[str], **_: object) -> list[float]:
    """A trivial one, of the text alone."""
    return [len(text) % 97 / 97 for text in completions]


def ended(token: NDArray[np.integer], length: int, longest: int) -> list[int]:
    """A completion of a prescribed length: an end token there, unless it is cut off, and none before."""
    whole = np.where(token[:length] == EOS, FIRST_TOKEN, token[:length]).tolist()
    return whole if length == longest else [*whole[:-1], EOS]


@dataclass(frozen=True)
class Task:
    """What a step rolls out: texts of prompts, how often each, and the prescribed length of each row."""

    prompts: list[str]
    size: int
    lengths: NDArray[np.int64]
    longest: int

    @property
    def texts(self) -> list[str]:
        """A prompt for each row."""
        return [prompt for prompt in self.prompts for _ in range(self.size)]


class OurStep:
    """Sample, score, train for `num_passes` optimizer steps on all of it.

    As in the loop, the policy's log-probs are computed before the first of several; a single one makes them itself.
    """

    def __init__(
        self,
        found: Online,
        model: nn.Module,
        tokenizer: transformers.PreTrainedTokenizerFast,
        task: Task,
        seed: int,
        *,
        num_passes: int = 1,
    ) -> None:
        self.found, self.model, self.tokenizer, self.task, self.num_passes = found, model, tokenizer, task, num_passes
        self.sampler = LocalSampler(model, [EOS])
        self.sampler.stops[:] = False  # lengths are prescribed: nothing else ends a row
        self.seed = seed
        self.step = TrainingStep(
            model, None, found.make(), new_optimizer(model), StepSettings(max_grad_norm=MAX_GRAD_NORM)
        )
        self.completions: list[list[int]] = []
        self.metrics: dict[str, float] = {}
        self.sampling_s: list[float] = []

    def __call__(self) -> float:
        groups, values = self._rolled_out()
        if reads_old_logprobs(self.found.all_knobs, self.num_passes):
            olds = logprobs_of(self.model, groups)
            groups = [replace(group, old_logprob=old) for group, old in zip(groups, olds, strict=True)]
        credited = credit_groups(groups, np.array(values), self.found.all_knobs)
        steps = [self.step(credited.groups) for _ in range(self.num_passes)]
        self.metrics = steps[0]
        return self.metrics["loss"]

    @property
    def grad_norm(self) -> float:
        """Of the first step on the last rollouts."""
        return self.metrics["grad_norm"]

    def _rolled_out(self) -> tuple[list[Any], list[float]]:
        begin = time.process_time()
        task = self.task
        prompts: list[list[int]] = self.tokenizer(task.prompts)["input_ids"]
        contexts = [prompt for prompt in prompts for _ in range(task.size)]
        self.seed += 1
        sampled = self.sampler.session().generate(
            contexts,
            range(len(contexts)),
            SamplingSettings(max_new_tokens=task.longest),
            self.seed,
            budgets=task.lengths.tolist(),
        )
        pairs = list(zip(sampled, task.lengths.tolist(), strict=True))
        self.completions = [ended(row.token, length, task.longest) for row, length in pairs]
        logprobs = [
            np.where(row.token == tokens, row.logprob, np.nan)  # an end token was not drawn where it was prescribed
            for row, tokens in zip(sampled, self.completions, strict=True)
        ]
        groups = []
        for i, prompt in enumerate(prompts):
            rows = slice(i * task.size, (i + 1) * task.size)
            own = [[True] * len(tokens) for tokens in self.completions[rows]]
            rollouts = Rollouts(prompt, self.completions[rows], own)
            groups.append(rollouts.group([0.0] * task.size, logprobs[rows]))
        self.sampling_s.append(time.process_time() - begin)
        return groups, reward(self.tokenizer.batch_decode(self.completions, skip_special_tokens=True))
