"""What there is to say of a curated dataset: whether its pairs are right, how long they are, what was dropped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from prefloop.curation.scores import Scored, tie_break
from prefloop.records import JSONObject, Pair, Role, Trajectory, canonical_json
from prefloop.stats.intervals import proportion

SCORE_EDGES = [round(0.1 * step, 1) for step in range(11)]


def pair_precision(pairs: Sequence[Pair], verified: Mapping[str, float], num: int, seed: int) -> JSONObject:
    """How often an independent rater agrees with a random sample of at most `num` pairs.

    `verified` holds that rater's value by trajectory; pairs with a member that it did not judge are not sampled.
    `pair_precision` is the share of agreement among the pairs in which its values differ, with a Wilson interval,
    None where there is no such pair. A tie is neither right nor wrong: `num_precision_ties` counts them.
    """
    known = [pair for pair in pairs if pair.chosen_id in verified and pair.rejected_id in verified]
    drawn = sorted(known, key=lambda pair: tie_break(seed, "precision", pair.chosen_id, pair.rejected_id))[:num]
    differences = [verified[pair.chosen_id] - verified[pair.rejected_id] for pair in drawn]
    decisive = [difference > 0 for difference in differences if difference != 0]
    precision = proportion(decisive).to_dict() if decisive else None
    return {"pair_precision": precision, "num_precision_ties": len(differences) - len(decisive)}


def length(trajectory: Trajectory) -> int:
    """The number of characters that the assistant wrote: content, reasoning, and tool calls as JSON."""
    return sum(
        len(message.content)
        + len(message.reasoning_content)
        + sum(len(canonical_json([call.name, call.arguments])) for call in message.tool_calls)
        for message in trajectory.completion
        if message.role is Role.ASSISTANT
    )


def pair_lengths(pairs: Sequence[Pair], trajectories: Mapping[str, Trajectory]) -> JSONObject:
    """The mean length of chosen and rejected, in characters; None without pairs."""
    chosen = [length(trajectories[pair.chosen_id]) for pair in pairs]
    rejected = [length(trajectories[pair.rejected_id]) for pair in pairs]
    return {"length_chosen": mean(chosen), "length_rejected": mean(rejected)}


def histogram(scores: Iterable[float]) -> JSONObject:
    """Counts of scores in ten equal bins of [0, 1]."""
    counts, _ = np.histogram(list(scores), bins=SCORE_EDGES)
    return {"edges": SCORE_EDGES, "counts": counts.tolist()}


def kept_share_by_task(scored: Iterable[Scored], kept: Iterable[Scored]) -> JSONObject | None:
    """The least, the median and the greatest share of a task's scored trajectories that were kept."""
    totals = Counter(one.task_id for one in scored)
    kept_of = Counter(one.task_id for one in kept)
    shares = [kept_of[task] / total for task, total in totals.items()]
    if not shares:
        return None
    return {"min": min(shares), "median": float(np.median(shares)), "max": max(shares)}


def mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return math.fsum(values) / len(values) if values else None
