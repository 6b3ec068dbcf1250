"""The offline speed benchmark: its engines compute the same, and its arithmetic is that of the definitions."""

import importlib
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_runs import BENCHMARKS, run_quickly

pytest.importorskip("trl", reason="the oracle is not installed (pip install 'prefloop[oracle]')")
DATA = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture
def offline(monkeypatch):
    """The modules of the benchmark by their short names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"_offline_{name}")


@pytest.mark.slow
def test_quick_run_writes_the_ratios_and_equal_losses(tmp_path):
    printed, values = run_quickly("speed_offline.py", tmp_path, "[dks][pft]*_64_64")  # dpo, kto, sft
    assert "trl 1.16" in printed
    for objective in ("dpo", "dpo_precomputed", "kto", "sft"):
        for name in ("installed", "compact", "padded", "matmul_share"):
            assert values[f"{objective}_{name}_64_64"] > 0
        assert values[f"{objective}_loss_rel_diff_64_64"] < 1e-5
    assert (values["dpo_visited_64_64"], values["dpo_computed_64_64"]) == (2 * 2 * 128, 2 * 3 * 64)


def test_work_is_counted_as_the_formula_says(offline):
    """Two pairs with prompts of 5 and completions of 3 and 4, by hand."""
    models, engines = offline("models"), offline("engines")
    shape = models.Shape(hidden=16, layers=2, intermediate=24, heads=2, kv_heads=1, vocab=64, head_size=8)
    model = models.new_model(shape, 0)
    pairs = offline("rows").random_pairs([(5, 3, 4)] * 2, shape.vocab, 0)
    work, flops, num_visits = models.needed_work(engines.OBJECTIVES["dpo"], model, pairs)
    attended = 2 * (sum(range(1, 6)) + sum(range(6, 9)) + sum(range(6, 10)))
    assert (work.tokens, work.attended, work.read, num_visits) == (2 * 12, attended, 2 * 7, 2 * 17)
    body = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    once = 2 * body * 24 + 4 * 2 * 16 * attended + 2 * 16 * 64 * 14
    assert flops == 4 * once  # forward, twice that for backward, and the reference's forward
    (_, precomputed, _) = models.needed_work(engines.OBJECTIVES["dpo_precomputed"], model, pairs)
    assert precomputed == 3 * once
    (plain, _, _) = models.needed_work(engines.OBJECTIVES["dpo"], model, pairs, merge=False)
    assert (plain.tokens, plain.attended) == (2 * 17, 2 * (sum(range(1, 9)) + sum(range(1, 10))))


def test_never_merged_packs_every_path_alone_and_is_undone(offline):
    engines = offline("engines")
    pairs = offline("rows").random_pairs([(6, 3, 3)], 64, 0)
    shape = offline("models").Shape(hidden=16, layers=1, intermediate=16, heads=2, kv_heads=2, vocab=64, head_size=8)
    model = offline("models").new_model(shape, 0)
    steps = [engines.Ours(engines.OBJECTIVES["simpo"], model, None, pairs, plain=plain) for plain in (True, False)]
    for step in steps:
        step()
    assert [step.metrics["num_tokens"] for step in steps] == [18, 12]


def test_rows_that_share_nothing_take_the_path_of_plain_packing(offline):
    measure, models = offline("measure"), offline("models")
    rows = offline("rows")
    shape = models.Shape(hidden=16, layers=1, intermediate=16, heads=2, kv_heads=2, vocab=64, head_size=8)
    model = models.new_model(shape, 0)
    pairs = rows.random_pairs([(6, 3, 3)] * 2, 64, 0)
    measure.check_same_path(model, rows.as_records(pairs, "demonstrations"))
    with pytest.raises(AssertionError, match="token_T"):
        measure.check_same_path(model, pairs)


def test_peak_sees_memory_that_is_gone_again(offline):
    def use_and_free():
        return int(torch.ones(64 << 20, dtype=torch.uint8).max())

    total, peak = offline("measure").with_peak(use_and_free)
    assert total == 1
    assert peak is None or peak == pytest.approx(64 << 20, rel=0.3)


def test_varied_lengths_have_the_medians_and_spread_that_are_asked_for(offline):
    lengths = np.log(np.array(offline("rows").varied_lengths(256, 128, 4000, 0), dtype=float))
    assert np.exp(np.median(lengths, axis=0)) == pytest.approx([256, 128, 128], rel=0.05)
    assert lengths.std(axis=0) == pytest.approx([0.6] * 3, rel=0.05)


def test_a_ratio_outside_the_tolerance_stops_the_benchmark(offline):
    measure = offline("measure")
    case = measure.Case("dpo", "64_64", 2)
    measure.check_losses(case, {"ours": 1.0, "padded": 1.0 + 1e-5, "installed": 1.0 + 5e-4})
    with pytest.raises(AssertionError, match="padded"):
        measure.check_losses(case, {"ours": 1.0, "padded": 1.001})
    with pytest.raises(AssertionError, match="compact"):
        measure.check_losses(case, {"ours": 1.0, "compact": math.nan})


def test_missing_rows_are_said_and_give_no_figure(offline, monkeypatch, tmp_path):
    measure, rows = offline("measure"), offline("rows")
    monkeypatch.setattr(rows, "DATA", tmp_path)
    measured = measure.measure(measure.Case("dpo", "llmbar", 2), Namespace(quick=True, seed=0))
    assert measured.figures == {}
    assert "llmbar/natural.json" in measured.rows[0]["engine"]


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not there")
def test_tau_bench_trials_share_the_policy_of_the_airline(offline):
    from prefloop.batch.packed import pack

    group = offline("rows").tau_bench_group(0.5, num_messages=3)
    batch = pack(group)
    assert len(group) == 4
    assert len(batch.visit_token_V) / batch.num_tokens > 2.5
    assert all(0 < example.paths[0].loss_mask.mean() < 0.5 for example in group)
