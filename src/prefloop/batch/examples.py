"""What a batch is made of: demonstrations, pairs, labelled samples, samples with labelled steps, groups of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefloop.records import TokenPath

Paths: TypeAlias = tuple[TokenPath, ...]
Logprobs: TypeAlias = tuple[NDArray[np.floating[Any]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """A sample to imitate: the paths of one trajectory.

    `name` says in errors which row it is. `ref_logprob` holds the reference model's log-probs (nats, one array
    per path, aligned with its tokens, in the precision of the model), empty when not computed; `ref_hash` of which
    model and tokens they are, where that was kept.
    """

    paths: Paths
    weight: float = 1.0
    name: str = ""
    ref_logprob: Logprobs = ()
    ref_hash: str = ""

    @property
    def samples(self) -> tuple[Paths, ...]:
        """The one sample."""
        return (self.paths,)


@dataclass(frozen=True, slots=True, eq=False)
class PreferencePair:
    """Two samples of one task, of which the first is preferred.

    `probability` is the belief that chosen really is better, a tie counting half; `tied` says that neither is
    (the probability is then 0.5). `margin` is by how much chosen is better, in the unit of a reward model's score.
    `weight` scales the pair in the loss. `name`, `ref_logprob` and `ref_hash` as in `Demonstration`, the chosen paths
    before the rejected. `head_weight` scales it for each head of a reward model apart; empty: 1 for all.
    """

    chosen: Paths
    rejected: Paths
    probability: float = 1.0
    margin: float = 0.0
    tied: bool = False
    weight: float = 1.0
    name: str = ""
    ref_logprob: Logprobs = ()
    ref_hash: str = ""
    head_weight: tuple[float, ...] = ()

    @property
    def samples(self) -> tuple[Paths, ...]:
        """Chosen, then rejected."""
        return (self.chosen, self.rejected)

    @property
    def prompt(self) -> bytes:
        """What tells pairs of different prompts apart: the tokens before the first that the policy said."""
        first = self.chosen[0]
        return first.token[: int(np.argmax(first.loss_mask))].tobytes()


@dataclass(frozen=True, slots=True, eq=False)
class LabelledSample:
    """A sample that was found good (`desirable`) or bad; `weight`, `name` and the others as in `Demonstration`."""

    paths: Paths
    desirable: bool
    weight: float = 1.0
    name: str = ""
    ref_logprob: Logprobs = ()
    ref_hash: str = ""

    @property
    def samples(self) -> tuple[Paths, ...]:
        """The one sample."""
        return (self.paths,)


class Step(NamedTuple):
    """The label in [0, 1] of one step of a sample, read at its last token: `token` counts within path `path`."""

    path: int
    token: int
    label: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class SteppedSample:
    """A sample whose steps were labelled, each on its own; `name` as in `Demonstration`."""

    paths: Paths
    steps: tuple[Step, ...]
    weight: float = 1.0
    name: str = ""
    ref_logprob: Logprobs = ()
    ref_hash: str = ""

    @property
    def samples(self) -> tuple[Paths, ...]:
        """The one sample."""
        return (self.paths,)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """A policy's attempts at one task, and what each token that it said is worth.

    `advantage` has an array for each path, in the order of the attempts, aligned with its tokens and read inside its
    loss mask. `old_logprob` likewise: the trained policy's own log-probs (nats) before the first step on this group;
    empty where it takes one step only, so that they are those of the step itself. Likewise for a critic what it should
    have said before each token (`ret`), and what it said before its first step (`old_value`), in the unit of the
    reward. `order` has the places of each attempt's own tokens, counted path after path, in the order in which they
    were said; empty where that is the same. `weight`, `name` and the others as in `Demonstration`.
    """

    samples: tuple[Paths, ...]
    advantage: Logprobs
    old_logprob: Logprobs = ()
    ret: Logprobs = ()
    old_value: Logprobs = ()
    order: tuple[NDArray[np.int64], ...] = ()
    weight: float = 1.0
    name: str = ""
    ref_logprob: Logprobs = ()
    ref_hash: str = ""


Example: TypeAlias = Demonstration | PreferencePair | LabelledSample | SteppedSample | RolloutGroup
