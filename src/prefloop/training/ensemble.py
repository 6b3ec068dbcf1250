"""Training reward models, ensembles among them.

Members that see the same pairs agree, whatever their first weights, far beyond what they know: heads on one trunk above
all (Gleave and Irving 2022, arXiv:2203.07472). So each member sees the pairs of a bootstrap sample of its own, the
Bayesian one of Rubin (1981): every prompt weighs Exp(1), none is lost, and one pass over the trunk serves all heads
(bootstrapped heads: Osband et al. 2016, arXiv:1602.04621).

Shape suffixes: P pairs, H members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from prefloop.batch.examples import PreferencePair
from prefloop.models.reward import RewardModel
from prefloop.records import TokenPath
from prefloop.training.algorithm import Algorithm
from prefloop.training.metrics import Metrics
from prefloop.training.settings import TrainingSettings
from prefloop.training.state import TrainingResult
from prefloop.training.trainer import train
from prefloop.training.writers import MetricsWriter

OpenWriters = Callable[[str, int], AbstractContextManager[Sequence[MetricsWriter]]]
"""The writers of the part of this name and place."""


class OnEvaluation(Protocol):
    """Is told of each evaluation, and of the name of the part that was evaluated."""

    def __call__(self, step: int, metrics: Metrics, name: str) -> None:
        """The held-out rows were evaluated after a step."""


class Part(NamedTuple):
    """What is trained at once: the whole model, or one of its adapters; its examples and the seed of their order."""

    name: str
    examples: list[PreferencePair]
    seed: int


def train_reward_model(
    reward_model: RewardModel,
    algorithm: Algorithm,
    pairs: Sequence[PreferencePair],
    settings: TrainingSettings,
    *,
    seed: int,
    identity: str,
    state_directory: Path,
    open_writers: OpenWriters = lambda name, index: nullcontext(()),
    on_evaluation: OnEvaluation = lambda step, metrics, name: None,
    **options: Any,
) -> dict[str, TrainingResult]:
    """Train a reward model in place, adapters one after another, and centre it on the pairs' trajectories.

    Further options are those of `train`; `open_writers` gives the writers of each part's metrics, `on_evaluation` is
    also told which part was evaluated. Returns what came of each part (`parts`), by its name.

    Raises:
        PrefloopError: as `train` and `RewardModel.calibrate`.
    """
    results = {}
    for index, part in enumerate(parts(reward_model, pairs, seed)):
        with open_writers(part.name, index) as writers:
            results[part.name] = train(
                reward_model.model,
                None,
                algorithm,
                part.examples,
                settings,
                seed=part.seed,
                identity=f"{identity} {part.name}",
                state_directory=state_directory / part.name,
                writers=writers,
                on_evaluation=partial(on_evaluation, name=part.name),
                **options,
            )
    reward_model.calibrate([path for pair in pairs for path in scored_paths(pair)], settings.max_tokens)
    return results


def parts(reward_model: RewardModel, pairs: Sequence[PreferencePair], seed: int) -> Iterator[Part]:
    """What is to be trained one after another; each adapter is selected when its turn comes.

    A single model learns from the pairs as they are, the members of an ensemble each from a bootstrap sample.
    """
    pairs = [_as_scored(pair) for pair in pairs]
    num_members = reward_model.num_members
    if num_members == 1:
        yield Part("all", pairs, seed)
        return
    weight_PH = bootstrap_weights(pairs, num_members, seed)
    if len(reward_model.adapters) < 2:
        heads = [replace(p, head_weight=tuple(w)) for p, w in zip(pairs, weight_PH.tolist(), strict=True)]
        yield Part("all", heads, seed)
        return
    for member, name in enumerate(reward_model.adapters):
        reward_model.select(member)
        weights = weight_PH[:, member].tolist()
        examples = [replace(p, weight=p.weight * w) for p, w in zip(pairs, weights, strict=True)]
        yield Part(name, examples, int(np.random.default_rng([seed, member]).integers(2**63)))


def bootstrap_weights(pairs: Sequence[PreferencePair], num_members: int, seed: int) -> NDArray[np.float64]:
    """What each pair weighs for each member, [P, H]: Exp(1), the same for all pairs of one prompt."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    weights = np.random.default_rng([seed, num_members]).exponential(size=(len(index), num_members))
    return weights[[index[pair.prompt] for pair in pairs]]


def scored_paths(pair: PreferencePair) -> tuple[TokenPath, TokenPath]:
    """The paths at whose ends a reward model is read: the last of each side."""
    return pair.chosen[-1], pair.rejected[-1]


def score_pairs(
    reward_model: RewardModel, pairs: Sequence[PreferencePair], max_tokens: int = 16384
) -> NDArray[np.float64]:
    """The scores of the members for both sides of each pair, [P, 2, H].

    Raises:
        PrefloopError: as `RewardModel.scores`.
    """
    score_NH = reward_model.sequence_scores([path for pair in pairs for path in scored_paths(pair)], max_tokens)
    return score_NH.reshape(len(pairs), 2, -1)


def _as_scored(pair: PreferencePair) -> PreferencePair:
    """The pair without what its scores do not depend on: earlier paths, and log-probs of a reference."""
    chosen, rejected = scored_paths(pair)
    return replace(pair, chosen=(chosen,), rejected=(rejected,), ref_logprob=())
