"""Runs a benchmark as a user does, on less."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_quickly(script, folder, only):
    """What a quick run of these cells printed, in one line, and its figures; it leaves no other file in `folder`."""
    figures = folder / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--fresh", "--only", only, "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    assert list(folder.iterdir()) == [figures]
    return " ".join(done.stdout.split()), json.loads(figures.read_text())
