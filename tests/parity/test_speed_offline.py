import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the oracle is not installed (pip install 'prefloop[oracle]')")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed_offline.py"


@pytest.mark.slow
def test_quick_run_writes_the_ratios_and_equal_losses(tmp_path):
    figures = tmp_path / "speed.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "64:64", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    assert "trl 1.16" in done.stdout
    values = json.loads(figures.read_text())
    kinds = ("installed", "compact", "loss_rel_diff", "reported_loss_rel_diff")
    assert set(values) == {f"dpo_{kind}_64_64" for kind in kinds}
    assert values["dpo_compact_64_64"] > 0.8
    assert values["dpo_loss_rel_diff_64_64"] < 1e-5
    assert list(tmp_path.iterdir()) == [figures]


@pytest.mark.slow
def test_measured_cells_are_kept_until_the_run_is_complete(tmp_path):
    specification = importlib.util.spec_from_file_location("speed_offline", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["speed_offline"] = module
    specification.loader.exec_module(module)
    path = tmp_path / "speed.json"
    first = module.Cells(path, {"seed": 0})
    assert first.get("a", lambda: {"figures": {"x": 1.0}}) == {"figures": {"x": 1.0}}
    again = module.Cells(path, {"seed": 0})
    assert again.get("a", lambda: pytest.fail("measured twice")) == {"figures": {"x": 1.0}}
    other = module.Cells(path, {"seed": 1})
    assert other.get("a", lambda: {"figures": {"x": 2.0}}) == {"figures": {"x": 2.0}}
    other.done()
    assert not list(tmp_path.iterdir())
