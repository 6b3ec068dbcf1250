"""TRL's GRPOTrainer on booking, beside our loop: the same start policy, tasks, judge, sampler, loss and optimizer.

Its `rollout_func` rolls an iteration's tasks out by our engine; `env_mask` leaves the tools' tokens out. Both sides
take 12 times 512 rollouts of 64 tasks, and four optimizer steps on them: ours of 16 tasks each, TRL's of 128 rows,
which it shuffles. Both compute the loss `dr_grpo`: group means without scaling, clips of 0.2 and 0.28, sums over a
sample's own tokens divided by the longest reply, no KL. AdamW, its betas and rate, which is constant, and the clipping
of gradients are equal, and both keep the moments of AdamW from iteration to iteration; a first step on the same rows
gives the same weights.

Settings are the fastest that TRL has on a CPU: no gradient checkpointing, nothing saved or reported, no reference,
micro-batches of `MICRO` rows. Its clock leaves out the making of the trainer, and copies of weights to be evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from _learning_booking import Clock, Point, a_run, curve_of, evaluations_of, worst_drop
from _offline_trl import SCRATCH, datasets, quieten, trl
from prefloop.judges import JudgeItem
from prefloop.records import AuthorKind, Checkpoint, JSONObject, Trajectory
from prefloop.rollout import Attempt, Provenance, Rollout
from prefloop.stages.context import BEFORE, Run, opened
from prefloop.stages.evaluating import evaluate_stage
from prefloop.stages.rollouts import iteration_tasks
from prefloop.stages.start import start_policy

MICRO = 64  # of 16, 32, 64 and 128 rows, which take 1.22, 1.04, 1 and 1.07 times as long
LOSS: JSONObject = {"beta": 0.0, "loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.2, "epsilon_high": 0.28}


class _Rollouts:
    """`rollout_func`: the attempts at the next iteration's tasks, as our loop has them, and what the judge says."""

    def __init__(self, run: Run, policy: Any) -> None:
        self.run, self.policy, self.iteration = run, policy, 0
        self.author = run.checkpoint_before(0)  # ids, and the judge's noise with them, are our loop's in iteration 1

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        run, settings = self.run, self.run.settings.rollout
        tasks = iteration_tasks(run, self.iteration)
        attempts = [Attempt(task, i, run.settings.seed) for task in tasks for i in range(settings.samples_per_task)]
        assert [attempt.task.id for attempt in attempts] == list(prompts)
        provenance = Provenance(AuthorKind.CHECKPOINT, self.author, run.id, self.iteration, "rollout")
        rollouts = run.policies.roll_out(self.policy, attempts, settings.sampling, provenance)
        self.iteration += 1
        parts = [_parts(rollout.trajectory) for rollout in rollouts]
        return {
            "prompt_ids": [prompt for prompt, _, _ in parts],
            "completion_ids": [completion for _, completion, _ in parts],
            "env_mask": [own for _, _, own in parts],
            "logprobs": None,
            "value": self._values(attempts, rollouts),
        }

    def _values(self, attempts: Sequence[Attempt], rollouts: Sequence[Rollout]) -> list[float | None]:
        items = []
        for attempt, rollout in zip(attempts, rollouts, strict=True):
            assert rollout.outcome is not None
            verified = self.run.verified(rollout.trajectory.id, rollout.outcome)
            items.append(JudgeItem(attempt.task, rollout.trajectory, verified))
        return [judgement.value for judgement in self.run.judge.judge(items)]


def _parts(trajectory: Trajectory) -> tuple[list[int], list[int], list[int]]:
    """Prompt, completion and which tokens of the completion are the policy's own; what follows the last is left out."""
    (path,) = trajectory.token_paths
    own = path.loss_mask.nonzero()[0]
    first, end = int(own[0]), int(own[-1]) + 1
    return path.token[:first].tolist(), path.token[first:end].tolist(), path.loss_mask[first:end].astype(int).tolist()


class _Snapshots(transformers.TrainerCallback):
    """The weights after each iteration, and the time at which it ended."""

    def __init__(self, model: Any, clock: Clock, every: int) -> None:
        self.model, self.clock, self.every = model, clock, every
        self.weights: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.clock.lap()
            with self.clock.paused():
                self.weights.append({name: value.detach().clone() for name, value in self.model.state_dict().items()})


def trl_loop(
    seed: int, table: JSONObject, start: str, overrides: Sequence[str] = (), micro: int = MICRO, **options: Any
) -> tuple[dict[str, float], list[Point]]:
    """The figures of TRL's training of a start policy, and how it came there; `options` are of GRPOConfig."""
    quieten()
    with a_run(seed, table, start, overrides) as run, opened(run):
        begin = start_policy(run)
        evaluate_stage(run, BEFORE, begin)
        policy = run.policies.take(begin)
        trainer = new_trainer(run, policy, micro, options)
        steps = trainer.args.max_steps // run.settings.iterations
        seen = _Snapshots(policy.model, Clock(), steps)
        trainer.add_callback(seen)
        with _not_filling():
            seen.clock = clock = Clock()
            trainer.train()
            cpu, wall = clock.seconds
        saved = [_saved(run, policy, weights, i) for i, weights in enumerate(seen.weights)]
        curve = curve_of(run, clock.after, lambda i: saved[i - 1] if i else begin)
        found = evaluations_of(run)
        num = run.settings.iterations * run.settings.rollout.num_tasks * run.settings.rollout.samples_per_task
    found |= {"worst_drop": worst_drop([success for _, success in curve]), "num_samples": num, "num_judge_calls": num}
    return {**found, "cpu_s": cpu, "wall_s": wall}, curve


@contextmanager
def _not_filling() -> Iterator[None]:
    """Memory is not filled as it is allocated, as our loop's deterministic mode has it: TRL is a third faster.

    The rest of that mode stays on, which costs it nothing: two iterations took 23.0, 21.9 and 21.0 CPU seconds with it,
    22.6, 22.8 and 21.7 without, in turns.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def new_trainer(run: Run, policy: Any, micro: int, options: JSONObject) -> Any:
    """TRL's trainer of the run's loss on its tasks; a generation of all rollouts of an iteration at a time."""
    settings, rollout = run.settings.train, run.settings.rollout
    rows, step = rollout.num_tasks * rollout.samples_per_task, settings.batch_size * rollout.samples_per_task
    step = min(step, rows)
    micro = min(micro, step)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # left behind by a trainer of another precision
    arguments = trl.GRPOConfig(
        output_dir=SCRATCH.name,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=run.settings.seed,
        shuffle_dataset=False,
        num_generations=rollout.samples_per_task,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=step // micro,
        steps_per_generation=rows // micro,
        max_steps=run.settings.iterations * rows // step,
        max_completion_length=rollout.sampling.max_new_tokens,
        temperature=rollout.sampling.temperature,
        max_grad_norm=settings.max_grad_norm,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="constant",
        **{"learning_rate": settings.learning_rate, **LOSS, **options},
    )
    tasks = [task.id for i in range(run.settings.iterations) for task in iteration_tasks(run, i)]
    trainer = trl.GRPOTrainer(
        policy.model,
        reward_funcs=[lambda value, **_: value],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": tasks}),
        processing_class=policy.tokenizer,
        rollout_func=_Rollouts(run, policy),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _saved(run: Run, policy: Any, weights: dict[str, Any], iteration: int) -> str:
    """The id of a checkpoint of these weights."""
    policy.model.load_state_dict(weights)
    checkpoint: Checkpoint = run.policies.save(policy, algorithm="grpo", iteration=iteration)
    run.store.add_checkpoint(checkpoint)
    return checkpoint.id
