"""How good a reward model is on preferences that it was not trained on, and what of it is cheap.

All figures are of decided pairs: a tie has no side that could be right, and is counted apart. Pairs of one prompt hang
together, so that intervals come from a bootstrap over prompts where a prompt has several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from prefloop.evaluation.judging import Bin
from prefloop.evaluation.shortcuts import ComparedPair, compared, length_logits, word_logits
from prefloop.records import JSONObject, PrefloopError
from prefloop.stats.intervals import Interval, PairedComparison, cluster_bootstrap, paired_comparison, wilson
from prefloop.stats.logistic import cross_entropy

if TYPE_CHECKING:
    from prefloop.batch.examples import PreferencePair
    from prefloop.models.reward import RewardModel

Floats = NDArray[np.float64]

MAX_BINS = 10
MIN_IN_BIN = 10
NUM_DRAWS = 1000
PER_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far confidence and truth go together.

    Of each pair the model is confident by σ(|gap|), from 0.5 to 1, that the side it scores higher is the better one.
    `bins` of equal numbers of pairs compare mean confidence with the share in which it was; `ece` is their mean
    absolute difference. Even a calibrated model shows some: in 95 % of draws less than `ece_by_chance`.
    """

    bins: tuple[Bin, ...]
    ece: float
    ece_by_chance: float


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How scores go with length, and how preferences do.

    `slope` is the score gained by `PER_TOKENS` tokens more: the least-squares slope of score gaps on length gaps,
    without intercept, because swapping the sides of a pair changes the sign of both. `slope_given_label` is the same
    beside the label (1 for the better side, -1 for the worse): length that is rewarded beyond what the preferences
    reward; this is the bias. `correlation` is that of both gaps, about 0. Of the pairs of unequal length: the shares in
    which the model, and the label, is for the longer side, and the accuracy where the better side is the shorter one.
    None where there is nothing to tell it from.
    """

    slope: Interval | None
    slope_given_label: Interval | None
    correlation: float | None
    model_prefers_longer: Interval | None
    label_prefers_longer: Interval | None
    accuracy_where_shorter: Interval | None


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A cheap predictor, fitted on the training pairs; `model_against` tells where model and shortcut differ."""

    accuracy: Interval
    log_loss: float
    model_against: PairedComparison


@dataclass(frozen=True, slots=True)
class RewardModelReport:
    """A reward model on held-out pairs.

    `accuracy`: the share in which the better side scores higher; equal scores count half. `log_loss` in nats: of the
    probabilities σ(gap) against those of the labels; 0.693 is that of a coin. `brier` their mean squared distance.
    `mean_gap` is that of the better side's score over the other's, `mean_spread` the mean standard deviation of the gap
    over the members of an ensemble, None of a single model.
    """

    num_pairs: int
    num_ties: int
    accuracy: Interval
    log_loss: float
    brier: float
    mean_gap: float
    mean_spread: float | None
    reliability: Reliability
    length: LengthBias
    shortcuts: Mapping[str, Shortcut]

    def to_dict(self) -> JSONObject:
        """All of it as JSON."""
        return asdict(self)


def evaluate_reward_model(
    model: RewardModel,
    held_out: Sequence[PreferencePair],
    training: Sequence[PreferencePair],
    *,
    max_tokens: int = 16384,
) -> RewardModelReport:
    """Score held-out pairs and evaluate the scores, beside shortcuts that are fitted on the training pairs.

    Raises:
        PrefloopError: as `RewardModel.scores` and `evaluate_scores`.
    """
    from prefloop.training.ensemble import score_pairs

    def decode(ids: list[int]) -> str:
        return str(model.tokenizer.decode(ids, skip_special_tokens=True))

    score_P2H = score_pairs(model, held_out, max_tokens)
    return evaluate_scores(score_P2H, compared(held_out, decode), compared(training, decode))


def evaluate_scores(
    score_P2H: ArrayLike, held_out: Sequence[ComparedPair], training: Sequence[ComparedPair]
) -> RewardModelReport:
    """Evaluate the scores [P, 2, H] that the members of a reward model give to both sides of held-out pairs.

    Raises:
        PrefloopError: no decided pair, held out or to fit the shortcuts on; lengths that differ; scores not finite.
    """
    scores = np.asarray(score_P2H, dtype=np.float64)
    if scores.shape[:2] != (len(held_out), 2) or not np.isfinite(scores).all():
        raise PrefloopError(f"expected finite scores of {len(held_out)} pairs, not {scores.shape[:2]}")
    keep = [i for i, pair in enumerate(held_out) if pair.decided]
    pairs, learnt = [held_out[i] for i in keep], [pair for pair in training if pair.decided]
    if not pairs or not learnt:
        raise PrefloopError(f"{len(pairs)} held-out and {len(learnt)} training pairs are decided: both must be some")
    gap_PH = scores[keep, 0] - scores[keep, 1]
    gap, spread = gap_PH.mean(1), gap_PH.std(1, ddof=1) if gap_PH.shape[1] > 1 else None
    probability = np.array([pair.probability for pair in pairs])
    right = _right(gap, probability)
    return RewardModelReport(
        num_pairs=len(pairs),
        num_ties=len(held_out) - len(pairs),
        accuracy=_share(right, pairs),
        log_loss=float(cross_entropy(gap, probability).mean()),
        brier=float(((special.expit(gap) - probability) ** 2).mean()),
        mean_gap=float((gap * np.sign(probability - 0.5)).mean()),
        mean_spread=None if spread is None else float(spread.mean()),
        reliability=reliability(gap, probability),
        length=length_bias(gap, pairs),
        shortcuts={
            name: _shortcut(logits, probability, right, pairs)
            for name, logits in (("length", length_logits(learnt, pairs)), ("words", word_logits(learnt, pairs)))
        },
    )


def reliability(gap: Floats, probability: Floats) -> Reliability:
    """Confidence against truth in bins of equal numbers of pairs; the truth of a soft label is its probability.

    The expected calibration error is that of Naeini et al. 2015 (with equal-mass bins, Nixon et al. 2019,
    arXiv:1904.01685); what chance alone would show is drawn from the confidences (Bröcker and Smith 2007).
    """
    confidence = special.expit(np.abs(gap))
    truth = np.where(gap >= 0, probability, 1 - probability)
    truth[gap == 0] = 0.5
    num_bins = max(1, min(MAX_BINS, len(gap) // MIN_IN_BIN))
    groups = np.array_split(np.argsort(confidence, kind="stable"), num_bins)
    bins = tuple(
        Bin(float(confidence[g].min()), float(confidence[g].max()), float(confidence[g].mean()), _wilson(truth[g]))
        for g in groups
    )
    drawn = np.random.default_rng(0).random((NUM_DRAWS, len(gap))) < confidence
    by_chance = _calibration_error(confidence, drawn.astype(np.float64), groups)
    ece = _calibration_error(confidence, truth[None], groups)[0]
    return Reliability(bins, float(ece), float(np.quantile(by_chance, 0.95)))


def _calibration_error(confidence: Floats, truth: Floats, groups: Sequence[NDArray[np.int64]]) -> Floats:
    """Σ n_b / n · |mean confidence - mean truth| for each row of `truth` [R, P]; [R]."""
    gaps = [len(g) * np.abs(confidence[g].mean() - truth[:, g].mean(1)) for g in groups]
    return np.asarray(np.sum(gaps, axis=0) / len(confidence))


def length_bias(gap: Floats, pairs: Sequence[ComparedPair]) -> LengthBias:
    """How score gaps go with length gaps.

    That reward models take length for quality, and learn it from preferences: Singhal et al. 2023 (arXiv:2310.03716).
    """
    longer = np.array([pair.lengths[0] - pair.lengths[1] for pair in pairs], dtype=np.float64)
    label = np.array([2 * pair.probability - 1 for pair in pairs])
    unequal = np.flatnonzero(longer)
    if not unequal.size:
        return LengthBias(None, None, None, None, None, None)
    x, toward = longer / PER_TOKENS, np.sign(longer)
    shorter = np.flatnonzero(label * toward < 0)
    return LengthBias(
        slope=_regression(gap, x[:, None], pairs),
        slope_given_label=_regression(gap, np.stack([x, label], 1), pairs),
        correlation=float(x @ gap / np.sqrt((x @ x) * (gap @ gap))) if gap.any() else 0.0,
        model_prefers_longer=_share_of(gap * toward, unequal, pairs),
        label_prefers_longer=_share_of(label * toward, unequal, pairs),
        accuracy_where_shorter=_share_of(gap * label, shorter, pairs),
    )


def _share_of(sign: Floats, which: NDArray[np.int64], pairs: Sequence[ComparedPair]) -> Interval | None:
    """The share of these pairs in which the sign is positive, 0 counting half."""
    return _share((np.sign(sign[which]) + 1) / 2, [pairs[i] for i in which.tolist()]) if which.size else None


def _regression(gap: Floats, features: Floats, pairs: Sequence[ComparedPair]) -> Interval | None:
    """The first coefficient of least squares without intercept, with a bootstrap over prompts (refitted).

    None where the features are collinear.
    """
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    member = np.array([index[pair.prompt] for pair in pairs])
    cluster = np.zeros((len(index), features.shape[1], features.shape[1] + 1))
    np.add.at(cluster, member, features[:, :, None] * np.concatenate([features, gap[:, None]], 1)[:, None, :])
    value = _solve(cluster.sum(0)[None])[0]
    if not np.isfinite(value):
        return None
    drawn = np.random.default_rng(0).multinomial(len(index), np.full(len(index), 1 / len(index)), size=NUM_DRAWS)
    resampled = _solve(np.einsum("rc,cij->rij", drawn.astype(np.float64), cluster))
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return Interval(float(value), float(low), float(high), len(pairs))


def _solve(sums: Floats) -> Floats:
    """The first coefficient of each system of normal equations [R, F, F + 1]; NaN where it is singular."""
    normal, right = sums[:, :, :-1], sums[:, :, -1:]
    found = np.full(len(sums), np.nan)
    regular = np.linalg.cond(normal) < 1e12
    found[regular] = np.linalg.solve(normal[regular], right[regular])[:, 0, 0]
    return found


def _shortcut(logits: Floats, probability: Floats, right: Floats, pairs: Sequence[ComparedPair]) -> Shortcut:
    theirs = _right(logits, probability)
    against = paired_comparison((theirs > 0.5).tolist(), (right > 0.5).tolist())
    return Shortcut(_share(theirs, pairs), float(cross_entropy(logits, probability).mean()), against)


def _right(gap: Floats, probability: Floats) -> Floats:
    """Whether the side with the higher score is the better one: 1, 0, or a half where scores are equal."""
    return np.asarray((np.sign(gap * (probability - 0.5)) + 1) / 2)


def _share(right: Floats, pairs: Sequence[ComparedPair]) -> Interval:
    """The mean, with Wilson's interval where all prompts differ, else a bootstrap over prompts."""
    prompts = [pair.prompt for pair in pairs]
    if 1 < len(set(prompts)) < len(prompts):
        return cluster_bootstrap(right, prompts)
    return _wilson(right)


def _wilson(outcomes: Floats) -> Interval:
    low, high = wilson(float(outcomes.sum()), outcomes.size)
    return Interval(float(outcomes.mean()), low, high, outcomes.size)
