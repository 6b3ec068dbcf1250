"""The online speed benchmark: its rollouts have the shapes that it names, and its engines compute the same."""

import importlib
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from benchmark_runs import BENCHMARKS, run_quickly

from prefloop.batch.packed import pack

pytest.importorskip("trl", reason="the oracle is not installed (pip install 'prefloop[oracle]')")


@pytest.fixture
def online(monkeypatch):
    """The modules of the benchmark by their short names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"_online_{name}")


@pytest.mark.slow
def test_quick_run_writes_ratios_of_equal_losses(tmp_path):
    printed, values = run_quickly("speed_online.py", tmp_path, "*_step")
    assert "trl 1.16" in printed
    for algorithm in ("grpo", "rloo"):
        for peer in ("installed", "compact"):
            assert values[f"{algorithm}_step_{peer}"] > 0
        assert values[f"{algorithm}_step_grad_norm_rel_diff"] < 1e-3


def test_a_tree_has_27_leaves_and_the_distinct_tokens_of_its_nodes(online):
    found = online("rows").tree(100, 4096, 0)
    batch = pack([found.group([1.0] * 27)])
    assert (len(batch.visit_token_V), batch.num_tokens) == (16200, 6800)
    assert not found.has_tools
    with_tools = online("rows").tree(100, 4096, 0, tools=True)
    assert with_tools.has_tools
    assert np.array(with_tools.own).sum() == 27 * 5 * 50
    assert with_tools.completions == found.completions


def test_turns_are_the_policy_s_and_tools_in_turn(online):
    found = online("rows").with_turns(256, 64, 3, 8, 4096, 0)
    assert [len(tokens) for tokens in found.completions] == [5 * 64] * 8
    assert found.own[0] == [True] * 64 + [False] * 64 + [True] * 64 + [False] * 64 + [True] * 64
    batch = pack([found.group(list(range(8)))])
    assert batch.num_tokens == 256 + 8 * 5 * 64
    assert int(batch.loss_mask_V.sum()) == 8 * 3 * 64
    own = batch.advantage_V[batch.loss_mask_V].reshape(8, -1)
    assert (own == own[:, :1]).all()
    assert own[:, 0].tolist() == list(range(8))


def test_a_completion_ends_where_it_is_told_to(online):
    engines = online("engines")
    token = np.array([7, engines.EOS, 9, 8, 7])
    assert engines.ended(token, 4, 5) == [7, engines.FIRST_TOKEN, 9, engines.EOS]
    assert engines.ended(token, 5, 5) == [7, engines.FIRST_TOKEN, 9, 8, 7]  # cut off


@pytest.mark.parametrize(("algorithm", "turns"), [("grpo", 2), ("rloo", 1)])  # RLOOTrainer has no tools
def test_engines_compute_the_same(online, algorithm, turns):
    measure, engines = online("measure"), online("engines")
    rollouts = online("rows").with_turns(12, 6, turns, 4, measure.SMALL.vocab, 0)
    found = replace(engines.ONLINE[algorithm], longest=rollouts.longest)
    model = measure.new_model(measure.SMALL, 0)
    group = measure.credited(found, model, rollouts, 0)
    assert all(len(old) == 12 + 6 * (2 * turns - 1) for old in group.old_logprob)
    steps = measure.training_engines(found, model, rollouts, group, ("compact", "padded"))
    assert measure.check_same(algorithm, steps)["grad_norm_rel_diff"] < 1e-4


def test_a_difference_stops_the_benchmark(online):
    measure = online("measure")
    same = {"ours": measure.Done(1.0, 2.0), "compact": measure.Done(1.0 + 1e-5, 2.0)}
    assert measure.check_same("x", same)["loss_rel_diff"] == pytest.approx(1e-5, rel=1e-3)
    for other in (measure.Done(1.01, 2.0), measure.Done(1.0, 2.1), measure.Done(math.nan, 2.0)):
        with pytest.raises(AssertionError, match="compact"):
            measure.check_same("x", {"ours": measure.Done(1.0, 2.0), "compact": other})


def test_every_row_of_a_step_has_a_prescribed_length(online):
    task = online("measure").new_task(Namespace(quick=False, seed=0))
    assert (len(task.texts), task.lengths.max(), task.longest) == (64, 128, 128)
    assert 40 < task.lengths.mean() < 75
    assert len(set(task.texts[:8])) == 1
