"""A person's taste, voted on the page, and nothing else, moves the policy that way."""

from __future__ import annotations

import pytest
from annotation_page import chromium, running_page, vote_by_taste

from prefloop.clients.sampling import SamplingSettings
from prefloop.config import parse_settings
from prefloop.feedback.queue import QueueSettings
from prefloop.records import AuthorKind, Split, Trajectory
from prefloop.rollout import Attempt, Provenance
from prefloop.stages.context import BEFORE, Run, opened
from prefloop.stages.curating import curate_stage
from prefloop.stages.rollouts import rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.updating import train_stage
from prefloop.store import Store

NUM_VOTES = 60  # at two or three seconds a vote, three minutes of a person

SETTINGS = {
    "name": "taste",
    "iterations": 1,
    "num_threads": 1,
    "environment": {"name": "booking"},
    "policy": {"initial": {"vocab_size": 768}},
    "sft": {"num_demonstrations": 1000, "num_steps": 120, "learning_rate": 6e-3, "warmup_steps": 10},
    "rollout": {"num_tasks": 30, "samples_per_task": 6, "sampling": {"max_new_tokens": 48}},
    "train": {"learning_rate": 5e-4, "num_epochs": 4, "batch_size": 16},
    # What the people want is not what the environment calls success: the guards only bound the KL.
    "guard": {"num_tasks": 64, "max_drop": 1.0, "max_kl": 20.0},
}


def filters(trajectory: Trajectory) -> bool:
    return any(call.name == "filter_results" for message in trajectory.completion for call in message.tool_calls)


def share_that_filters(run: Run, checkpoint_id: str) -> float:
    policy = run.policies.get(checkpoint_id)
    attempts = [Attempt(task, 0, 0) for task in run.environment.tasks(Split.HELD_OUT, 200)]
    sampling = SamplingSettings(max_new_tokens=48)
    provenance = Provenance(AuthorKind.CHECKPOINT, checkpoint_id, run.id, BEFORE, "taste")
    rollouts = run.policies.roll_out(policy, attempts, sampling, provenance)
    return sum(filters(rollout.trajectory) for rollout in rollouts) / len(rollouts)


@pytest.mark.slow
def test_votes_on_the_page_alone_move_the_policy(tmp_path):
    settings = parse_settings(RunSettings, {**SETTINGS, "directory": str(tmp_path)}, "test")
    with Store(str(tmp_path / "store.db")) as store, opened(Run(settings, store)) as run:
        start = start_policy(run)
        rollout_stage(run, 0)
        queue = QueueSettings(run_id=run.id, num_pairs=200)
        with running_page(store, queue, rater="anna") as served, chromium() as context:
            page = context.new_page()
            page.goto(served.url)
            voted = vote_by_taste(page, lambda left, right: "filter_results" in left, NUM_VOTES)
        assert voted == NUM_VOTES
        curate_stage(run, 0)
        curated = run.found(0, "curate")
        assert curated["num_pairs"] == curated["num_human_pairs"] > 0
        train_stage(run, 0)
        end = run.checkpoint_before(1)
        assert end != start
        before, after = share_that_filters(run, start), share_that_filters(run, end)
        # 200 tasks each: two standard errors of the difference are at most 0.1.
        assert after > before + 0.15, f"share of trajectories that filter: {before:.2f} → {after:.2f}"
