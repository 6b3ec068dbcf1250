"""What preferences reward cheaply: how well length alone, or words alone, predict them.

A reward model that does no better than these has learnt no more than these from the preferences.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefloop.stats.logistic import fit_with_chosen_ridge

if TYPE_CHECKING:
    from prefloop.batch.examples import PreferencePair

Floats = NDArray[np.float64]

MAX_WORDS = 20_000
RIDGES = (0.1, 1.0, 10.0, 100.0)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class ComparedPair:
    """What the policy said on both sides of a preference: its words with their counts, and its length in tokens.

    `probability` is the belief that the first side is better; a pair is decided unless `tied` or at a half.
    """

    prompt: bytes
    words: tuple[Counter[str], Counter[str]]
    lengths: tuple[int, int]
    probability: float = 1.0
    tied: bool = False

    @property
    def decided(self) -> bool:
        """Whether one side is better."""
        return not self.tied and self.probability != 0.5


def compared(pairs: Sequence[PreferencePair], decode: Callable[[list[int]], str]) -> list[ComparedPair]:
    """The pairs as shortcuts see them; `decode` gives the text of tokens."""
    found = []
    for pair in pairs:
        said = [[path.token[path.loss_mask].tolist() for path in side] for side in pair.samples]
        first, second = (Counter(word for ids in side for word in words_of(decode(ids))) for side in said)
        lengths = (sum(map(len, said[0])), sum(map(len, said[1])))
        found.append(ComparedPair(pair.prompt, (first, second), lengths, pair.probability, pair.tied))
    return found


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def length_logits(training: Sequence[ComparedPair], held_out: Sequence[ComparedPair]) -> Floats:
    """The log-odds that the first side of each held-out pair is better, by length alone: a multiple of log length."""

    def features(pairs: Sequence[ComparedPair]) -> Floats:
        return np.array([[math.log1p(pair.lengths[0]) - math.log1p(pair.lengths[1])] for pair in pairs])

    return _predict(features(training), features(held_out), training)


def word_logits(training: Sequence[ComparedPair], held_out: Sequence[ComparedPair]) -> Floats:
    """The same by a linear model on bags of words: log counts of the commonest words that two training pairs have."""
    seen = Counter(word for pair in training for word in pair.words[0].keys() | pair.words[1].keys())
    known = [word for word, number in seen.most_common(MAX_WORDS) if number > 1]
    index = {word: column for column, word in enumerate(known)}
    return _predict(_bags(training, index), _bags(held_out, index), training)


def _predict(features: Any, held_out: Any, training: Sequence[ComparedPair]) -> Floats:
    if not features.shape[1]:
        return np.zeros(held_out.shape[0])
    probability = np.array([pair.probability for pair in training])
    weights, _ = fit_with_chosen_ridge(features, probability, [pair.prompt for pair in training], RIDGES)
    return np.asarray(held_out @ weights)


def _bags(pairs: Sequence[ComparedPair], index: dict[str, int]) -> Any:
    """Sparse [N, W]: log counts of the first side less those of the second."""
    from scipy.sparse import csr_array

    rows, columns, values = [], [], []
    for row, pair in enumerate(pairs):
        for words, sign in zip(pair.words, (1.0, -1.0), strict=True):
            for word, count in words.items():
                if word in index:
                    rows.append(row)
                    columns.append(index[word])
                    values.append(sign * math.log1p(count))
    return csr_array((values, (rows, columns)), shape=(len(pairs), len(index)))
