"""The memory benchmark on less: a run that is cut gives the loss of the whole, and needs less."""

import pytest
from benchmark_runs import run_quickly


@pytest.mark.slow
def test_quick_run_compares_the_ways(tmp_path):
    printed, values = run_quickly("memory.py", tmp_path, "tree_32768")
    assert "budget 512 tokens" in printed
    assert 0 < values["tree_cut_mb_32768"] < values["tree_whole_mb_32768"]
