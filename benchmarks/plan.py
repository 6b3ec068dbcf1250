"""The memory and time that `prefloop plan` foretells against what `prefloop run` takes.

Each cell makes a model with random weights, plans a run of one iteration (start evaluation, rollout, judging, curation,
update, guard, end evaluation) and then runs it by the same command that a user types, in a process of its own whose
peak of resident memory the system tells. `1.5b` is the shape of Qwen2.5-1.5B with an adapter in bfloat16.

    python benchmarks/plan.py [--json PATH] [--only PATTERN] [--quick] [--seed N]
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from _common import Measured, Options, parse_options, run_cells, versions

MIB = 1 << 20

SHAPES: dict[str, tuple[str, ...]] = {
    "small": ("architecture=qwen2", "hidden_size=384", "intermediate_size=1024", "num_layers=6", "num_heads=6",
              "num_kv_heads=2", "num_embeddings=8192", "max_length=4096"),
    "medium": ("architecture=llama", "hidden_size=768", "intermediate_size=2560", "num_layers=12", "num_heads=12",
               "num_embeddings=32000", "max_length=4096"),
    "large": ("architecture=qwen2", "hidden_size=896", "intermediate_size=4864", "num_layers=24", "num_heads=14",
              "num_kv_heads=2", "num_embeddings=151936", "max_length=4096"),
    "1.5b": ("architecture=qwen2", "hidden_size=1536", "intermediate_size=8960", "num_layers=28", "num_heads=12",
             "num_kv_heads=2", "num_embeddings=151936", "max_length=4096"),
}  # fmt: skip

RUN: dict[str, Any] = {
    "name": "planned",
    "iterations": 1,
    "num_threads": 1,
    "environment": {"name": "arithmetic"},
    "rollout": {"num_tasks": 4, "samples_per_task": 8, "sampling": {"max_new_tokens": 64}},
    "judge": {"rules": {"noise_sd": 0.3}},
    "curation": {"margin": 0.0, "fraction": 0.5},
    "train": {"learning_rate": 1e-6, "batch_size": 8, "num_steps": 4},
    "guard": {"num_tasks": 4, "max_kl": 1e6, "max_drop": 1.0},
    "evaluation": {"num_tasks": 4, "greedy": False},
}


@dataclass(frozen=True)
class Case:
    """A model's shape, the type that its file is in, and changes of the run file."""

    shape: str
    dtype: str = "float32"
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


ADAPTER = {"policy": {"lora": {"rank": 32}}}
LITTLE = {"policy": {"dtype": "bfloat16", "lora": {"rank": 32}}, "train": {"gradient_checkpointing": True}}
FEW = {
    "rollout": {"num_tasks": 2, "samples_per_task": 4, "sampling": {"max_new_tokens": 24}},
    "train": {"batch_size": 2, "num_steps": 2, "gradient_checkpointing": True},
    "guard": {"num_tasks": 2},
    "evaluation": {"num_tasks": 2},
}

CRITIC = {**FEW, "train": {"algorithm": "ppo", "batch_size": 2, "num_steps": 2}}
"""So few tokens that models are most of the peak: policy, reference, and a critic with its gradients and moments."""

CASES = {
    "small_full": Case("small", changes={"rollout": {"num_tasks": 8}, "train": {"batch_size": 16}}),
    "small_lora": Case("small", changes=ADAPTER),
    "small_grpo": Case("small", changes={"rollout": {"num_tasks": 8}, "train": {"algorithm": "grpo", "batch_size": 4}}),
    "medium_full": Case("medium"),
    "medium_lora": Case("medium", changes=ADAPTER),
    "medium_ppo": Case("medium", changes=CRITIC),
    "large_lora": Case("large", "bfloat16", LITTLE),
    "1.5b": Case("1.5b", "bfloat16", {**FEW, "policy": LITTLE["policy"]}),
}


def toml(settings: dict[str, Any], prefix: str = "") -> str:
    values = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    tables = [(f"{prefix}{key}", value) for key, value in settings.items() if isinstance(value, dict)]
    head = [f"[{prefix[:-1]}]"] if prefix else []
    return "\n".join([*head, *values, *(toml(value, f"{name}.") for name, value in tables)])


def run_file(case: Case, seed: int) -> str:
    settings = copy.deepcopy(RUN) | {"seed": seed}
    settings["policy"] = {"model": "model"}
    for table, changes in case.changes.items():
        for key, value in changes.items():
            mine = settings[table]
            mine[key] = {**mine[key], **value} if isinstance(mine.get(key), dict) else value
    return toml(settings)


# The peak is told by the process itself: what the system says of a child counts the one that started it, too.
PROGRAM = """
import pathlib, runpy, sys
from _memory import peak_so_far
try:
    runpy.run_module("prefloop.cli", run_name="__main__", alter_sys=True)
finally:
    pathlib.Path("peak").write_text(str(peak_so_far()))
"""


def command(folder: Path, *arguments: str) -> tuple[str, float, float]:
    """Run a command of prefloop; what it printed, the peak of its memory in bytes, and its wall time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    search = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(search)
    begun = time.perf_counter()
    with (folder / "output").open("w") as output:
        line = [sys.executable, "-c", PROGRAM, *arguments]
        done = subprocess.run(line, cwd=folder, env=environment, stdout=output, check=False)
    printed = (folder / "output").read_text()
    if done.returncode:
        raise SystemExit(f"prefloop {' '.join(arguments)} ended with {done.returncode}: {printed[-2000:]}")
    return printed, float((folder / "peak").read_text()), time.perf_counter() - begun


def measure(name: str, case: Case, options: Options) -> Measured:
    """Plan and run one case."""
    with tempfile.TemporaryDirectory(prefix="prefloop-plan-") as directory:
        folder = Path(directory)
        shape = [part for setting in SHAPES[case.shape] for part in ("--set", setting)]
        command(folder, "init-model", "model", "--dtype", case.dtype, *shape)
        (folder / "run.toml").write_text(run_file(case, options.seed))
        plan = json.loads(command(folder, "plan", "run.toml", "--json")[0])
        _, peak, wall = command(folder, "run", "run.toml")
    planned, seconds = plan["peak_bytes"], plan["seconds"]
    foretold = sum(seconds["stages"].values()) + sum(seconds["once"].values())
    figures = {
        f"plan_{name}_planned_mib": planned / MIB,
        f"plan_{name}_measured_mib": peak / MIB,
        f"plan_{name}_of_measured": planned / peak,
        f"plan_{name}_planned_s": foretold,
        f"plan_{name}_wall_s": wall,
    }
    row = {
        "parameters": f"{plan['parameters'] / 1e6:,.0f} M",
        "planned": f"{planned / MIB:,.0f} MiB",
        "measured": f"{peak / MIB:,.0f} MiB",
        "of measured": f"{planned / peak:.2f}",
        "planned time": f"{foretold:.0f} s",
        "wall time": f"{wall:.0f} s",
    }
    return Measured(figures, [row])


def main() -> None:
    options = parse_options(__doc__)
    chosen = {"small_full": CASES["small_full"]} if options.quick else CASES
    cells = {name: partial(measure, name, case) for name, case in chosen.items()}
    run_cells("plan", cells, options, versions("prefloop", "torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
