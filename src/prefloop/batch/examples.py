"""What a batch is made of: demonstrations and preference pairs of token paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefloop.records import TokenPath

Paths: TypeAlias = tuple[TokenPath, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """A sample to imitate: the paths of one trajectory.

    `name` says in errors which row it is. `ref_logprob` holds the reference model's log-probs (nats, float32, one
    array per path, aligned with its tokens), empty when not computed.
    """

    paths: Paths
    weight: float = 1.0
    name: str = ""
    ref_logprob: tuple[NDArray[np.float32], ...] = ()

    @property
    def samples(self) -> tuple[Paths, ...]:
        """The one sample."""
        return (self.paths,)


@dataclass(frozen=True, slots=True, eq=False)
class PreferencePair:
    """Two samples of one task, of which the first is preferred.

    `probability` is the belief that chosen really is better; `weight` scales the pair in the loss. `name` says in
    errors which row it is. `ref_logprob` as in `Demonstration`, the chosen paths before the rejected.
    """

    chosen: Paths
    rejected: Paths
    probability: float = 1.0
    weight: float = 1.0
    name: str = ""
    ref_logprob: tuple[NDArray[np.float32], ...] = ()

    @property
    def samples(self) -> tuple[Paths, ...]:
        """Chosen, then rejected."""
        return (self.chosen, self.rejected)


Example: TypeAlias = Demonstration | PreferencePair
