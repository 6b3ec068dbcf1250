"""The GPU benchmark where there is no GPU: the same code at tiny size, which writes no figure."""

import importlib
from argparse import Namespace

import pytest
import torch
from benchmark_runs import BENCHMARKS, run_quickly

pytest.importorskip("trl", reason="the oracle is not installed (pip install 'prefloop[oracle]')")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_long_rows_with_checkpointing_run_on_the_cpu_and_are_no_figures(tmp_path):
    printed, figures = run_quickly("speed_gpu.py", tmp_path, "dpo_*00_*00")
    assert "not measured on a GPU" in printed
    assert figures == {}
    for rows in ("8000_400", "30000_2000"):
        for engine in ("ours", "trl", "padded"):
            assert f"│ dpo_{rows} │ {engine} │" in printed


def test_shared_attention_equals_padded_rows(monkeypatch):
    """The cell that proves FlexAttention on CUDA; here it runs the attention of the CPU."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measured = importlib.import_module("speed_gpu").measure_parity(Namespace(seed=0))
    assert "relative to padded rows" in measured.rows[0]["distinct"]
    assert set(measured.figures) <= {"gpu_flex_logprob_rel_diff", "gpu_flex_gradient_rel_diff"}
