"""Whole runs by the command line: the peak that was planned is the one that the system measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plan
from _common import Options

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "small_full",
        "small_lora",
        # One whole iteration of a model of Qwen2.5-1.5B's shape: about two minutes on one free core.
        pytest.param("1.5b", marks=pytest.mark.timeout(1200)),
    ],
)
def test_the_planned_peak_is_the_measured_one_within_15_percent(name: str):
    options = Options(json=None, only="*", quick=False, seed=0, fresh=True)
    figures = plan.measure(name, plan.CASES[name], options).figures
    assert figures[f"plan_{name}_planned_mib"] == pytest.approx(figures[f"plan_{name}_measured_mib"], rel=0.15)
