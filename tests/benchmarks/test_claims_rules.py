"""Verdicts follow from differences over seeds by the rules that were stated before."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from prefloop.stats.intervals import Interval

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def rules():
    sys.path.insert(0, BENCHMARKS)
    try:
        import _claims_rules
    finally:
        sys.path.remove(BENCHMARKS)
    return _claims_rules


def test_a_difference_is_taken_within_a_seed(rules):
    by_seed = [{"a": 1.0 + seed, "b": 0.5 + seed} for seed in range(5)]
    found = rules.Part("a", "b", least=0.2).interval(by_seed)
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 5)
    assert rules.Part("a").interval(by_seed).value == 3.0


def test_a_ratio_is_the_geometric_mean(rules):
    by_seed = [{"a": 2.0, "b": 1.0}, {"a": 8.0, "b": 1.0}]
    part = rules.Part("a", "b", least=1.1, ratio=True)
    found = part.interval(by_seed)
    assert found.value == pytest.approx(4.0)
    half = 12.7062047 * math.log(4) / 2  # t of one degree of freedom; the logs are log 2 and log 8
    assert found.low == pytest.approx(4 / math.exp(half), rel=1e-6)


@pytest.mark.parametrize(
    ("least", "mean", "low", "high", "expected"),
    [
        (0.2, 0.5, 0.1, 0.9, "HOLDS"),
        (0.2, 0.1, 0.05, 0.15, "DOES_NOT_HOLD"),  # there, but too small
        (0.2, 0.15, 0.05, 0.25, "CANNOT_TELL"),
        (0.2, 0.5, -0.1, 1.1, "CANNOT_TELL"),
        (0.2, -0.5, -0.6, -0.4, "DOES_NOT_HOLD"),
        (-0.2, -0.05, -0.15, 0.05, "HOLDS"),  # little is lost
        (-0.2, -0.1, -0.3, 0.1, "CANNOT_TELL"),
        (-0.2, -0.5, -0.6, -0.3, "DOES_NOT_HOLD"),
    ],
)
def test_a_part_has_the_verdict_of_its_interval(rules, least, mean, low, high, expected):
    part = rules.Part("a", "b", least=least)
    assert part.verdict(Interval(mean, low, high, 5)) is rules.Verdict[expected]


def test_a_ratio_is_held_against_one(rules):
    part = rules.Part("a", "b", least=1.1, ratio=True)
    assert part.verdict(Interval(2.0, 1.01, 4.0, 5)) is rules.Verdict.HOLDS
    assert part.verdict(Interval(2.0, 0.9, 4.4, 5)) is rules.Verdict.CANNOT_TELL
    assert part.verdict(Interval(1.0, 0.95, 1.05, 5)) is rules.Verdict.DOES_NOT_HOLD


def test_a_fall_has_to_be_above_the_least_with_its_whole_interval(rules):
    fall = rules.Part("fall", least=0.2, strict=True)
    assert fall.verdict(Interval(0.5, 0.1, 0.9, 5)) is rules.Verdict.CANNOT_TELL
    assert fall.verdict(Interval(0.5, 0.3, 0.7, 5)) is rules.Verdict.HOLDS


@pytest.mark.parametrize(("above", "below"), [(1.0, -0.02), (0.0, 1.0)])
def test_a_ratio_of_what_is_not_above_zero_tells_nothing(rules, above, below):
    part = rules.Part("a", "b", least=1.1, ratio=True)
    assert part.interval([{"a": 2.0, "b": 1.0}, {"a": above, "b": below}]) is None
    assert part.verdict(None) is rules.Verdict.CANNOT_TELL


def test_a_claim_is_as_good_as_its_weakest_part(rules):
    holds, unclear, fails = rules.Verdict.HOLDS, rules.Verdict.CANNOT_TELL, rules.Verdict.DOES_NOT_HOLD
    assert rules.verdict_of([holds, holds]) is holds
    assert rules.verdict_of([holds, unclear]) is unclear
    assert rules.verdict_of([holds, unclear, fails]) is fails
    assert fails.text == "does not hold"
