"""True reward and proxy along a training or over best-of-n, and what is read off such a curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from _language import Words, World, path_of
from _language_online import Rollouts
from prefloop.batch.examples import Demonstration
from prefloop.stats.overoptimisation import Form, GoldFit, best_of_n, best_of_n_kl, explained, fit_gain
from prefloop.training.logprobs import divergences_of

Floats = NDArray[np.float64]
SMOOTHED = 5  # steps
KL_EVERY = 2  # steps


@dataclass(frozen=True)
class Curve:
    """KL to the start policy (nats a completion), true reward and proxy (each in sd of the start policy), by step or n.

    `kl` of a training is over the whole vocabulary at each position of its own attempts; of best-of-n it is the upper
    bound log n - (n - 1) / n.
    """

    form: Form
    kl: list[float]
    gold: list[float]
    proxy: list[float]

    @property
    def smooth(self) -> Curve:
        """Moving averages over steps; best-of-n, which is an average already, as it is."""
        if self.form == "best_of_n" or len(self.kl) < SMOOTHED:
            return self
        window = np.full(SMOOTHED, 1 / SMOOTHED)
        kl, gold, proxy = (np.convolve(one, window, "valid").tolist() for one in (self.kl, self.gold, self.proxy))
        return Curve(self.form, kl, gold, proxy)

    @property
    def points(self) -> tuple[Floats, Floats]:
        """Distances √KL and true rewards, as fits take them."""
        return np.sqrt(np.maximum(self.kl, 0.0)), np.array(self.gold)

    def gold_at(self, kl: float) -> float | None:
        """The true reward where the curve first comes to a KL, by interpolation; None where it does not."""
        path = self.smooth
        above = np.flatnonzero(np.array(path.kl) >= kl)
        if not len(above):
            return None
        i = max(int(above[0]), 1)
        return float(np.interp(kl, path.kl[i - 1 : i + 1], path.gold[i - 1 : i + 1]))

    def figures(self) -> dict[str, float]:
        """Peak and end of the curve, and how far it falls between them."""
        path = self.smooth
        best, last = int(np.argmax(path.gold)), len(path.gold) - 1
        found = {"gold_peak": path.gold[best], "kl_at_peak": path.kl[best], "gold_end": path.gold[last]}
        found |= {"kl_end": path.kl[last], "proxy_end": path.proxy[last], "fall": path.gold[best] - path.gold[last]}
        return found

    def fits(self) -> dict[str, float]:
        """The fit of the curve's own form and of the other: coefficients, R², and where each turns.

        A turning point beyond the largest KL that was seen is left out. `r2_beyond_half` is R² on the farther half of
        the distances of a fit to the nearer half.
        """
        distance, gain = self.points
        fit, other = fit_gain(self.form, distance, gain), fit_gain(self.other_form, distance, gain)
        found = {"fit_alpha": fit.alpha, "fit_beta": fit.beta}
        for name, one in (("fit", fit), ("other_form", other)):
            found[f"{name}_r2"] = one.r_squared
            if one.turning_point <= distance.max():
                found[f"{name}_turning_kl"] = one.turning_point**2
        near = distance <= distance.max() / 2
        if np.count_nonzero(distance[near]) >= 3 and np.count_nonzero(~near) >= 3:
            half = fit_gain(self.form, distance[near], gain[near])
            found["fit_r2_beyond_half"] = explained(half, distance[~near], gain[~near])
        return found

    @property
    def other_form(self) -> Form:
        return "rl" if self.form == "best_of_n" else "best_of_n"

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Curve:
        return cls(**json.loads(file.read_text()))


def pooled_fit(curves: Sequence[Curve], form: Form) -> GoldFit:
    """One fit to all curves."""
    distance, gain = (np.concatenate(part) for part in zip(*(curve.points for curve in curves), strict=True))
    return fit_gain(form, distance, gain)


@dataclass
class Recorder:
    """Watches a training by the attempts that it learns from, which are fresh: no evaluation beside it is needed."""

    world: World
    measured: dict[int, float] = field(default_factory=dict)
    gold: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)

    def __call__(self, step: int, policy: nn.Module, rollouts: Rollouts) -> None:
        if step % KL_EVERY == 0:
            self.measured[step] = kl_of(self.world, policy, rollouts.prompts, rollouts.completions)
        self.gold.append(float(self.world.gold(rollouts.prompts, rollouts.completions).mean()))
        self.reward.append(float(rollouts.reward_S.mean()))

    def curve(self) -> Curve:
        """What was seen; KL between the steps at which it was measured is interpolated."""
        last = max(self.measured) + 1
        kl = np.interp(range(last), list(self.measured), list(self.measured.values()))
        return Curve("rl", kl.tolist(), self.gold[:last], self.reward[:last])


def kl_of(world: World, policy: nn.Module, prompts: Words, completions: Sequence[Words]) -> float:
    """KL to the start policy, nats a completion, over the whole vocabulary at each position that was sampled."""
    rows = [Demonstration((path_of(p, c),)) for p, c in zip(prompts, completions, strict=True)]
    return float(np.mean([array.sum(dtype=np.float64) for (array,) in divergences_of(policy, world.start, rows)]))


def best_of_n_curve(score_PN: Floats, gold_PN: Floats, sizes: Sequence[int]) -> Curve:
    """The best of n completions by the proxy, for each n."""
    gold, proxy = ([float(best_of_n(score_PN, value_PN, n).mean()) for n in sizes] for value_PN in (gold_PN, score_PN))
    return Curve("best_of_n", best_of_n_kl(list(sizes)).tolist(), gold, proxy)
