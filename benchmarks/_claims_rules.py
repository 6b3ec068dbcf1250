"""When a claim holds: rules that are stated before its seeds are run, over differences within seeds.

A claim has parts. A part says that one figure is above another by at least so much, seed by seed. Its difference has a
95 % t interval over the seeds, and the claim its verdict by those of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from prefloop.stats.intervals import Interval, mean_interval

Figures = Mapping[str, float]


class Verdict(Enum):
    """What a claim came to; the value is that of `--json`."""

    HOLDS = 1
    CANNOT_TELL = 0
    DOES_NOT_HOLD = -1

    @property
    def text(self) -> str:
        """As people read it."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Part:
    """Figure `above` is larger than `below` by at least `least`; a negative `least` is what may be lost.

    With `ratio` the figures are compared by their ratio, and `least` is one, too: 1.1 for a tenth more. An empty
    `below` is 0 (of a ratio: 1). `strict`: the whole interval has to lie above `least`; for falls from a peak, of which
    it proves nothing to lie above zero, as none can be negative.
    """

    above: str
    below: str = ""
    least: float = 0.0
    ratio: bool = False
    strict: bool = False

    @property
    def name(self) -> str:
        """In figures and tables."""
        return f"{self.above}_over_{self.below}" if self.below else self.above

    def difference(self, figures: Figures) -> float:
        """Of one seed; of a ratio its logarithm: NaN where one of the two is not above 0, as estimates of KL may be."""
        both = [figures[name] for name in (self.above, self.below) if name]
        if self.ratio:
            both = [math.log(figure) if figure > 0 else math.nan for figure in both]
        return both[0] - sum(both[1:])

    def interval(self, by_seed: Sequence[Figures]) -> Interval | None:
        """The mean difference over seeds with its 95 % interval, in the unit of `least`; None where a ratio is none."""
        differences = [self.difference(figures) for figures in by_seed]
        if any(map(math.isnan, differences)):
            return None
        found = mean_interval(differences)
        if not self.ratio:
            return found
        return Interval(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)

    def verdict(self, interval: Interval | None) -> Verdict:
        """Holds: a difference of the right sign is shown, and its mean is enough. Does not: so much is ruled out.

        Where something may be lost, it holds if a larger loss is ruled out. Without an interval one cannot tell.
        """
        if interval is None:
            return Verdict.CANNOT_TELL
        nothing = 1.0 if self.ratio else 0.0
        shown = self.least if self.strict else min(nothing, self.least)
        if interval.low > shown and interval.value >= self.least:
            return Verdict.HOLDS
        return Verdict.DOES_NOT_HOLD if interval.high < self.least else Verdict.CANNOT_TELL


def verdict_of(parts: Sequence[Verdict]) -> Verdict:
    """That of a claim: it holds if all of its parts do, and does not if one of them does not."""
    return min(parts, key=lambda verdict: verdict.value)
