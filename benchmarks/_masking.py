"""What it changes to leave the tools' tokens out of the loss: the booking loop with DPO, three ways.

`masked`: only the policy's own tokens count. `counted`: every token after the prompt does, tools' answers too. `trl`:
the same loop with TRL's DPOTrainer as its update, given the same pairs; its completion mask is 1 on every token after
the prompt. All else is equal: the start policy, the seeds, the judge, the optimizer and its schedule. Nothing guards
the updates, so that what the loss does is seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prefloop.training.trainer as trainer_module
from _common import Cell, Measured, Options
from prefloop.batch.examples import PreferencePair
from prefloop.config import apply_overrides, parse_settings, read_run_file
from prefloop.loop import run_loop
from prefloop.records import Source, TokenPath
from prefloop.stages.context import BEFORE, Run, opened
from prefloop.stages.policies import Policies
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.store import Store
from prefloop.training.settings import count_steps
from prefloop.training.state import TrainingResult
from prefloop.training.trainer import batch_at, learning_rate_at

RUN_FILE = Path(__file__).resolve().parents[1] / "examples" / "booking.toml"
NUM_SEEDS = 3
FIRST_SEED = 201
UNGUARDED = ("guard.max_drop=1.0", "guard.max_kl=1e9", "guard.num_tasks=16", "guard.max_retries=0")
UPDATE = ("train.nll_coef=0.0", "train.learning_rate=5e-4")
QUICK = ("sft.num_steps=40", "sft.num_demonstrations=200", "iterations=1", "evaluation.num_tasks=32",
         "rollout.num_tasks=8", "rollout.tasks_per_unit=8")  # fmt: skip
VARIANTS = ("masked", "counted", "trl")


def cells(quick: bool) -> dict[str, Cell]:
    """One cell a seed."""
    return {f"masking-{seed}": partial(measure, FIRST_SEED + seed) for seed in range(1 if quick else NUM_SEEDS)}


def measure(seed: int, options: Options) -> Measured:
    """The three variants from one start policy."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        start = _start(seed, directory, options.quick)
        for variant in VARIANTS:
            sampled, greedy = _loop(variant, seed, directory, start, options.quick)
            found |= {f"masking_{variant}_{seed}": sampled, f"masking_{variant}_greedy_{seed}": greedy}
    return Measured(found)


def _settings(name: str, seed: int, directory: str, quick: bool, *more: str) -> RunSettings:
    # One name for all: the noise of the judge is a function of it. A folder for each.
    seeds = ("name=booking", f"seed={seed}", f"judge.rules.seed={seed}", f"directory={directory}/{name}")
    overrides = (*seeds, *UNGUARDED, *UPDATE, *(QUICK if quick else ()), *more)
    data = apply_overrides(read_run_file(RUN_FILE), overrides)
    if more:  # the start policy is there
        data["policy"], _ = {"model": data["policy"]["model"]}, data.pop("sft")
    return parse_settings(RunSettings, data, str(RUN_FILE))


def _start(seed: int, directory: str, quick: bool) -> str:
    """The directory of a policy that imitates the demonstrator."""
    settings = _settings("start", seed, directory, quick)
    with Store(f"{directory}/start.db") as store, opened(Run(settings, store)) as run:
        checkpoint = store.checkpoint(start_policy(run))
        assert checkpoint is not None
        return checkpoint.path


def _loop(variant: str, seed: int, directory: str, start: str, quick: bool) -> tuple[float, float]:
    """Success after the loop on held-out tasks, at temperature 1 and greedy."""
    settings = _settings(variant, seed, directory, quick, f'policy.model="{start}"')
    with Store(f"{directory}/{variant}.db") as store, VARYING[variant]():
        run = Run(settings, store)
        run_loop(run)
        detail = run.found(settings.iterations, "evaluate")
        assert detail is not None and run.found(BEFORE, "evaluate") is not None
        return detail["sampled"]["success"]["value"], detail["greedy"]["success"]["value"]


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _tools_counted() -> Iterator[None]:
    """Every token from the first sampled one on is taken for the policy's own when it is trained."""
    original = Policies.paths

    def paths(self: Policies, *arguments: Any) -> Any:
        return [tuple(map(_all_own, found)) for found in original(self, *arguments)]

    Policies.paths = paths  # type: ignore[method-assign]
    try:
        yield
    finally:
        Policies.paths = original  # type: ignore[method-assign]


def _all_own(path: TokenPath) -> TokenPath:
    own = np.arange(len(path.token)) >= int(np.argmax(path.loss_mask))
    return replace(path, source=np.where(own, Source.SAMPLED, path.source).astype(np.uint8))


@contextmanager
def _trained_by_trl() -> Iterator[None]:
    """TRL's DPOTrainer takes the optimizer steps."""
    original = trainer_module.train
    references: dict[str, Any] = {}
    paths = Policies.reference

    def reference(self: Policies, checkpoint_id: str) -> Any:
        references["last"] = paths(self, checkpoint_id)
        return references["last"]

    def train(model: Any, _: Any, algorithm: Any, examples: Sequence[Any], settings: Any, **options: Any) -> Any:
        return _trl_training(model, references["last"], algorithm, examples, settings, options["seed"])

    trainer_module.train, Policies.reference = train, reference  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        trainer_module.train, Policies.reference = original, paths  # type: ignore[method-assign]


def _trl_training(
    model: Any, reference: Any, algorithm: Any, examples: Sequence[PreferencePair], settings: Any, seed: int
) -> TrainingResult:
    """The same batches in the same order at the same learning rates, each step by TRL."""
    from _offline_trl import FEATURES, new_trainer, quieten

    quieten()
    options = {"beta": algorithm.knobs["beta"], "use_cpu": True, "bf16": False}
    trainer = new_trainer("dpo", model.train(), reference, options)
    trainer.current_gradient_accumulation_steps = 1
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=betas, weight_decay=settings.weight_decay, fused=True
    )
    rows = FEATURES["dpo"](examples)
    num_steps = count_steps(settings, len(rows))
    result = TrainingResult()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step, num_steps)
        batch = [rows[i] for i in batch_at(step, len(rows), settings.batch_size, seed)]
        loss = float(trainer.training_step(model, trainer.data_collator(batch)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result.history.append({"loss": loss})
    model.eval()
    return result


VARYING = {"masked": _as_it_is, "counted": _tools_counted, "trl": _trained_by_trl}
