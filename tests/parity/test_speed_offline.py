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
    assert "trl 1.16" in " ".join(done.stdout.split())
    values = json.loads(figures.read_text())
    kinds = ("installed", "compact", "loss_rel_diff", "reported_loss_rel_diff")
    assert set(values) == {f"dpo_{kind}_64_64" for kind in kinds}
    assert values["dpo_loss_rel_diff_64_64"] < 1e-5
    assert list(tmp_path.iterdir()) == [figures]
