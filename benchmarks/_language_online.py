"""Learning from own completions on the single-turn task of `_language.py`: sample, reward, credit, train, again.

All parts are the project's own: the sampler, the credit of attempts and tokens, the losses and the step. A step draws
fresh prompts, has the policy answer each several times, and moves it towards the answers that a reward prefers. The
reward is any function of prompts and completions: the true one, a reward model, or an ensemble's lower bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from _language import NUM_COMPLETION, NUM_PROMPT, Words, World, path_of
from prefloop.batch.examples import Demonstration, Example, PreferencePair, RolloutGroup
from prefloop.credit.groups import Baseline
from prefloop.losses.registry import objective
from prefloop.stages.rewarding import Credited, credit_groups, credit_tokens
from prefloop.training.algorithm import Algorithm
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import logprobs_of, values_of, with_reference
from prefloop.training.policy_gradient import PolicyGradient
from prefloop.training.step import TrainingStep
from prefloop.training.value import Value

Floats = NDArray[np.float64]
Reward = Callable[[Words, Sequence[Words]], Floats]
FIRST_DRAW = 1000  # of the prompts to learn from; evaluations use those below
MOST_STEPS = 1000  # of a training: each seed has draws of its own
DEMONSTRATED_OF, DEMONSTRATED_DRAW = 8, 1_000_000
WARMUP_STEPS = 20  # of ppo's critic, on the first round's attempts


@dataclass(frozen=True)
class Rollouts:
    """The attempts of one step, S of them, those at one prompt side by side; with their rewards.

    `kl_S` is k1 of each attempt in nats, of the policy that wrote them to the start policy.
    """

    prompts: Words
    completions: list[Words]
    reward_S: Floats
    kl_S: Floats


At = Callable[[int, nn.Module, Rollouts], None]


def train_online(
    world: World,
    algorithm: str,
    reward: Reward,
    *,
    num_steps: int,
    learning_rate: float,
    prompts_per_step: int = 64,
    samples_per_prompt: int = 4,
    kl_coef: float | None = None,
    batch_size: int | None = None,
    num_epochs: int = 1,
    critic_learning_rate: float | None = None,
    at: At = lambda step, model, rollouts: None,
    seed: int = 0,
    **knobs: Any,
) -> nn.Module:
    """Train a copy of the start policy by an objective of fresh attempts (`prefloop.losses.registry`).

    Args:
        reward: the reward of each attempt, float [S].
        num_steps: rounds of sampling and learning.
        kl_coef: β, the price of a nat of KL to the start policy: `kl_coef` of policy gradients, `beta` of online_dpo
            and spin (whose reference is the policy before the round). None: the objective's default.
        batch_size: examples in an optimizer step (groups of attempts, demonstrations, pairs); None: all of the round.
        num_epochs: passes over the attempts of a round.
        critic_learning_rate: of ppo's critic; None: that of the policy.
        at: told before each round's update of the number of rounds that were learned from (0 at first), the policy and
            its attempts.
        knobs: further ones of the objective.
    """
    found = objective(algorithm)
    if kl_coef is not None:
        knobs["kl_coef" if found.records == "rollouts" else "beta"] = kl_coef
    made = make_algorithm(algorithm, **knobs)
    if isinstance(made, PolicyGradient):
        made = replace(made, length_constant=NUM_COMPLETION)
    policy = world.copy_of_start()
    learner = _Learner(world, policy, made, reward, critic_learning_rate or learning_rate)
    step = TrainingStep(policy, None, made, adamw(policy, learning_rate))
    rng = np.random.default_rng([world.seed, seed, 12])
    for number in range(num_steps):
        draw = FIRST_DRAW + MOST_STEPS * seed + number
        prompts = np.repeat(world.language.sentences(prompts_per_step, draw, NUM_PROMPT), samples_per_prompt, axis=0)
        attempts = roll_out(world, policy, prompts, draw, samples_per_prompt, reward)
        at(number, policy, attempts.rollouts)
        examples = learner.examples(attempts, draw)
        for batch in _batches(examples, num_epochs, batch_size, rng):
            step(batch, seed=(seed, number))
    return policy.eval().requires_grad_(False)


def _batches(
    examples: Sequence[Example], num_epochs: int, batch_size: int | None, rng: np.random.Generator
) -> Iterator[list[Example]]:
    """The optimizer steps of a round: none, where there is nothing to learn."""
    for _ in range(num_epochs if examples else 0):
        order = rng.permutation(len(examples))
        for rows in np.array_split(order, math.ceil(len(examples) / (batch_size or len(examples)))):
            yield [examples[i] for i in rows]


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of all trainings here, at a constant rate."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)


# --- attempts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempts:
    """A round's attempts as groups by prompt, with the log-probs of the policy and of the start policy."""

    rollouts: Rollouts
    groups: list[RolloutGroup]

    @property
    def by_group(self) -> Iterator[tuple[RolloutGroup, Floats]]:
        """Each group with the rewards of its attempts."""
        return zip(self.groups, self.rollouts.reward_S.reshape(len(self.groups), -1), strict=True)


def roll_out(
    world: World, policy: nn.Module, prompts: Words, draw: int, samples_per_prompt: int, reward: Reward
) -> Attempts:
    """One attempt at each prompt; equal prompts lie side by side."""
    rows = world.sample_rows(policy, prompts, draw)
    completions = [row.token.astype(np.int64) for row in rows]
    paths = [path_of(p, c, row.logprob) for p, c, row in zip(prompts, completions, rows, strict=True)]
    groups = [
        RolloutGroup(tuple((path,) for path in paths[i : i + samples_per_prompt]), (), name=f"prompt-{draw}-{i}")
        for i in range(0, len(paths), samples_per_prompt)
    ]
    olds, refs = logprobs_of(policy, groups), logprobs_of(world.start, groups)
    groups = [
        replace(group, old_logprob=old, ref_logprob=ref) for group, old, ref in zip(groups, olds, refs, strict=True)
    ]
    both = [zip(group.old_logprob, group.ref_logprob, strict=True) for group in groups]
    kl_S = np.array([float((old - ref).sum(dtype=np.float64)) for group in both for old, ref in group])
    reward_S = np.asarray(reward(prompts, completions), dtype=np.float64)
    return Attempts(Rollouts(prompts, completions, reward_S, kl_S), groups)


# --- what is learned from them -----------------------------------------------------------------------------------


@dataclass
class _Learner:
    """Makes examples of attempts, as the objective learns from them; keeps what passes from round to round."""

    world: World
    policy: nn.Module
    algorithm: Algorithm
    reward: Reward
    critic_learning_rate: float
    baselines: Sequence[Baseline] = ()
    critic: Critic | None = None

    def examples(self, attempts: Attempts, draw: int) -> Sequence[Example]:
        """None where nothing can be learned: attempts at a prompt are all the same."""
        found = objective(self.algorithm.name)
        if found.critic:
            self.critic = self.critic or Critic.of(self.world.start, self.critic_learning_rate)
            return self.critic.credit(attempts, self._knobs)
        if found.records == "rollouts":
            credited = credit_groups(attempts.groups, attempts.rollouts.reward_S, self._knobs, self.baselines)
            self.baselines = [Baseline(**one) for one in credited.detail["baselines"]]
            return credited.groups
        if found.self_play:
            return self._over_own(attempts, draw)
        if found.records == "demonstrations":
            return [
                Demonstration(group.samples[int(reward_S.argmax())], name=group.name)
                for group, reward_S in attempts.by_group
            ]
        pairs = (_best_over_worst(group, reward_S) for group, reward_S in attempts.by_group)
        return [pair for pair in pairs if pair is not None]

    @property
    def _knobs(self) -> Mapping[str, Any]:
        assert isinstance(self.algorithm, PolicyGradient)
        return self.algorithm.knobs

    def _over_own(self, attempts: Attempts, draw: int) -> list[PreferencePair]:
        """The demonstrator's way with each prompt over each attempt that is another; reference: who made it."""
        prompts = attempts.rollouts.prompts[:: len(attempts.groups[0].samples)]
        shown = demonstrations(self.world, prompts, self.reward, draw)
        pairs = [
            PreferencePair((path_of(prompt, demonstration),), own, name=group.name)
            for prompt, demonstration, group in zip(prompts, shown, attempts.groups, strict=True)
            for own in group.samples
            if not np.array_equal(own[0].token[len(prompt) :], demonstration)
        ]
        return with_reference(self.policy, pairs)


def _best_over_worst(group: RolloutGroup, reward_S: Floats) -> PreferencePair | None:
    """The pair that a judge of rewards makes of a group, with the start policy's log-probs; None of equal rewards."""
    best, worst = int(reward_S.argmax()), int(reward_S.argmin())
    if reward_S[best] == reward_S[worst]:
        return None
    reference = (group.ref_logprob[best], group.ref_logprob[worst])
    return PreferencePair(group.samples[best], group.samples[worst], name=group.name, ref_logprob=reference)


def demonstrations(world: World, prompts: Words, reward: Reward, draw: int) -> list[Words]:
    """What a demonstrator writes: the best of several completions of the start policy, as the reward sees it."""
    many = np.repeat(prompts, DEMONSTRATED_OF, axis=0)
    completions = world.sample(world.start, many, DEMONSTRATED_DRAW + draw)
    best = reward(many, completions).reshape(len(prompts), -1).argmax(1)
    return [completions[i * DEMONSTRATED_OF + int(k)] for i, k in enumerate(best)]


@dataclass
class Critic:
    """A critic beside the policy: it says its values, credit follows, and it learns the returns."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    is_warm: bool = False

    @classmethod
    def of(cls, start: nn.Module, learning_rate: float) -> Critic:
        """The trunk of the start policy under a head of zeros."""
        config = copy.deepcopy(start.config)
        config.num_labels, config.classifier_dropout = 1, 0.0
        model = transformers.LlamaForTokenClassification(config)
        model.model.load_state_dict(start.model.state_dict())
        for weight in model.score.parameters():
            nn.init.zeros_(weight)
        return cls(model, adamw(model, learning_rate))

    def credit(self, attempts: Attempts, knobs: Mapping[str, Any]) -> list[RolloutGroup]:
        """The groups with their advantages; then a step of the critic. In the first round others come before."""
        if not self.is_warm:
            for _ in range(WARMUP_STEPS):
                self._learn(self.credited(attempts, knobs), math.inf)
            self.is_warm = True
        credited = self.credited(attempts, knobs)
        self._learn(credited, knobs["clip_value"])
        return credited.groups

    def credited(self, attempts: Attempts, knobs: Mapping[str, Any]) -> Credited:
        """The advantages by what it says now; it learns nothing."""
        # All completions end where the task does: none is cut off.
        reward_S = attempts.rollouts.reward_S
        ends = [False] * len(reward_S)
        return credit_tokens(attempts.groups, reward_S, ends, values_of(self.model, attempts.groups), knobs)

    def _learn(self, credited: Credited, clip: float) -> None:
        value = Value(clip, credited.detail["return_variance"])
        TrainingStep(self.model, None, value, self.optimizer)(credited.groups)
