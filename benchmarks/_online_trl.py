"""TRL's side of the online benchmark: GRPOTrainer and RLOOTrainer, as installed and compact (`_offline_trl.py`).

Their training step runs as they have it: generation of 64 rows by `generate` of transformers, rewards, a shuffle into
micro-batches, loss, backward, clipping, fused AdamW. Settings are the fastest that they have on a CPU: no gradient
checkpointing, the log-probs of the policy before the step computed only where they cannot be done without (RLOOTrainer
always does), no KL, no compilation. Continuous batching of transformers is slower on a CPU than its `generate`.

As installed they take 8 rows at a time, their default; compact they take as many as have about `TOKENS` tokens, which
is the fastest: 16 rows of 640 tokens took 5.2 s at once, 4.0 s by eight and 3.8 s by four.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.generation import StoppingCriteriaList

from _offline_engines import MAX_GRAD_NORM, new_optimizer
from _offline_models import PAD_TOKEN
from _offline_trl import SCRATCH, compact_head, datasets, toy_tokenizer, trl
from _online_engines import Online, Task, ended, reward
from _online_rows import Rollouts
from prefloop.batch.examples import RolloutGroup
from rollout import Prescribed

DEFAULT_ROWS = 8
TOKENS = 2560
TRAINERS = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}


def new_trainer(
    found: Online, model: nn.Module, texts: Sequence[str], size: int, micro: int, num_passes: int = 1
) -> Any:
    """A trainer of groups of `size` that takes `micro` rows at a time, `num_passes` times all of them."""
    trainer_class, config_class = TRAINERS[found.trainer]
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # left behind by a trainer of another precision
    arguments = config_class(
        output_dir=SCRATCH.name,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(texts) // micro,
        num_generations=size,
        num_iterations=num_passes,
        max_completion_length=found.longest,
        temperature=1.0,
        **found.options,
    )
    trainer = trainer_class(
        model,
        reward_funcs=[reward],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": list(texts)}),
        processing_class=toy_tokenizer(model.config.vocab_size),
    )
    trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
    return trainer


class _Engine:
    """One optimizer step a call, or one for each pass: the trainer's own training step for each micro-batch, clipping
    and the update; the loss and the norm are those of the first."""

    def __init__(self, model: nn.Module, trainer: Any, *, compact: bool, num_passes: int = 1) -> None:
        self.trainer, self.compact, self.num_passes = trainer, compact, num_passes
        self.model = trainer.accelerator.prepare_model(model)
        self.optimizer = new_optimizer(model)
        self.grad_norm = 0.0
        self.inputs: Any = None

    def __call__(self) -> float:
        steps = [self._step() for _ in range(self.num_passes)]
        loss, self.grad_norm = steps[0]
        return loss

    def _step(self) -> tuple[float, float]:
        with compact_head() if self.compact else nullcontext():
            losses = [
                self.trainer.training_step(self.model, self.inputs, None)
                for _ in range(self.trainer.current_gradient_accumulation_steps)
            ]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(float(loss) for loss in losses), grad_norm


class TheirTraining(_Engine):
    """The training part: loss, backward, clipping and the update, on rollouts that are padded already."""

    def __init__(
        self,
        found: Online,
        model: nn.Module,
        rollouts: Rollouts,
        group: RolloutGroup,
        *,
        compact: bool = False,
        micro: int | None = None,
    ) -> None:
        size, longest = len(rollouts.completions), len(rollouts.prompt) + rollouts.longest
        micro = micro or rows_at_once(size, longest, compact=compact)
        super().__init__(model, new_trainer(found, model, ["w3"] * size, size, micro), compact=compact)
        padded = {name: tensor.split(micro) for name, tensor in _padded(found, rollouts, group).items()}
        batches = itertools.cycle(dict(zip(padded, parts, strict=True)) for parts in zip(*padded.values(), strict=True))
        self.trainer._prepare_inputs = lambda inputs: next(batches)  # there is nothing to generate


def rows_at_once(num_rows: int, longest: int, *, compact: bool) -> int:
    """How many of rows of at most `longest` tokens a micro-batch takes: a divisor of their number."""
    most = max(1, TOKENS // longest) if compact else DEFAULT_ROWS
    return max(rows for rows in range(1, most + 1) if num_rows % rows == 0)


class TheirStep(_Engine):
    """A whole step. Rows end at prescribed lengths; `replay` gives completions in place of sampled ones."""

    def __init__(
        self,
        found: Online,
        model: nn.Module,
        task: Task,
        seed: int,
        *,
        compact: bool = False,
        micro: int | None = None,
        num_passes: int = 1,
    ) -> None:
        longest = len(task.prompts[0].split()) + task.longest
        micro = micro or rows_at_once(len(task.texts), longest, compact=compact)
        trainer = new_trainer(found, model, task.texts, task.size, micro, num_passes)
        super().__init__(model, trainer, compact=compact, num_passes=num_passes)
        # Nothing ends a row but its prescribed length.
        trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = None
        self._original, model.generate = model.generate, self._generate
        self.task = task
        self.inputs = [{"prompt": text} for text in task.texts]
        self.replay: list[list[int]] | None = None
        torch.manual_seed(seed)

    def _generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        width, task = input_ids.shape[1], self.task
        if self.replay is not None:
            return torch.cat([input_ids, _tensor(self.replay)], dim=1)
        criteria = StoppingCriteriaList([Prescribed(width, task.lengths)])
        out = self._original(input_ids, stopping_criteria=criteria, **options)
        rows = zip(out[:, width:].numpy(), task.lengths.tolist(), strict=True)
        return torch.cat([input_ids, _tensor([ended(row, length, task.longest) for row, length in rows])], dim=1)


def _padded(found: Online, rollouts: Rollouts, group: RolloutGroup) -> dict[str, Any]:
    """What the trainers' own scoring makes of rollouts; advantages and old log-probs are those of the group."""
    size, start = len(rollouts.completions), len(rollouts.prompt)
    own = _tensor(rollouts.own)
    batch = {
        "prompt_ids": torch.tensor([rollouts.prompt] * size),
        "prompt_mask": torch.ones(size, start, dtype=torch.long),
        "completion_ids": _tensor(rollouts.completions),
        "completion_mask": _tensor([[1] * len(tokens) for tokens in rollouts.completions]),
        "advantages": torch.tensor([float(array[np.flatnonzero(array)[:1]].sum()) for array in group.advantage]),
    }
    if rollouts.has_tools:
        batch["tool_mask"] = own
    if group.old_logprob:
        old = torch.zeros(own.shape)
        for row, logprob in zip(old, group.old_logprob, strict=True):
            row[: len(logprob) - start] = torch.from_numpy(logprob[start:])
        batch |= {"old_per_token_logps": old} if found.trainer == "grpo" else {"old_logps": (old * own).sum(1)}
    return batch


def _tensor(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows, padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), PAD_TOKEN)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = torch.tensor(row)
    return padded
