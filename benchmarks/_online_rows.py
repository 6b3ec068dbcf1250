"""Rollouts of the online speed benchmark: random tokens in the shapes that groups, trees and turns have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from _offline_rows import FIRST_TOKEN
from prefloop.batch.examples import RolloutGroup
from prefloop.records import Source, TokenPath

TREE_NODES = (1, 1, 3, 9, 27, 27)
"""Nodes of each turn of the tree: three of its turns branch in three, so that it has 27 leaves."""


@dataclass(frozen=True)
class Rollouts:
    """Rollouts that begin with one prompt: their completions, and which tokens of these are the policy's own."""

    prompt: list[int]
    completions: list[list[int]]
    own: list[list[bool]]

    @property
    def longest(self) -> int:
        return max(map(len, self.completions))

    @property
    def has_tools(self) -> bool:
        """Whether some tokens of the completions are not the policy's own."""
        return not all(map(all, self.own))

    def group(self, advantage_S: Sequence[float], sampled: Sequence[NDArray[np.float32]] = ()) -> RolloutGroup:
        """As prefloop trains on them; `sampled` are the sampler's log-probs of completions, if there are any."""
        paths = [self._path(i, sampled[i] if sampled else None) for i in range(len(self.completions))]
        advantage = tuple(value * path.loss_mask for value, path in zip(advantage_S, paths, strict=True))
        return RolloutGroup(tuple((path,) for path in paths), advantage)

    def _path(self, index: int, logprob: NDArray[np.float32] | None) -> TokenPath:
        token = np.array([*self.prompt, *self.completions[index]], dtype=np.int32)
        own = np.array([False] * len(self.prompt) + self.own[index])
        source = np.where(own, Source.SAMPLED, Source.TOOL).astype(np.uint8)
        source[: len(self.prompt)] = Source.PROMPT
        path = TokenPath(token, source, np.zeros_like(token), np.full(len(token), np.nan, dtype=np.float32))
        if logprob is None:
            return path
        return replace(path, logprob=np.concatenate([path.logprob[: len(self.prompt)], logprob]))


def grouped(prompt: int, completion: int, size: int, vocab: int, seed: int) -> Rollouts:
    """`size` completions of one prompt, all tokens of which are the policy's own."""
    return with_turns(prompt, completion, 1, size, vocab, seed)


def with_turns(prompt: int, length: int, turns: int, size: int, vocab: int, seed: int) -> Rollouts:
    """Trajectories of one prompt and of `turns` turns of the policy, with as long an answer of a tool between two."""
    rng = np.random.default_rng([seed, turns, size])
    own = [i // length % 2 == 0 for i in range((2 * turns - 1) * length)]
    completions = rng.integers(FIRST_TOKEN, vocab, (size, len(own))).tolist()
    return Rollouts(rng.integers(FIRST_TOKEN, vocab, prompt).tolist(), completions, [own] * size)


def tree(length: int, vocab: int, seed: int, *, tools: bool = False) -> Rollouts:
    """Trajectories that branch: the first turn is the prompt, the others are the policy's own.

    With `tools`, a turn is half the policy's, and half the answer of a tool.
    """
    rng = np.random.default_rng([seed, length])
    turns = [rng.integers(FIRST_TOKEN, vocab, (num, length)) for num in TREE_NODES]
    num_leaves = TREE_NODES[-1]
    completions = [
        np.concatenate([turn[leaf * len(turn) // num_leaves] for turn in turns[1:]]).tolist()
        for leaf in range(num_leaves)
    ]
    own = [not tools or i % length < length // 2 for i in range(len(completions[0]))]
    return Rollouts(turns[0][0].tolist(), completions, [own] * num_leaves)
