"""Before the loop: demonstrations, a start policy, and learning from the demonstrations (SFT)."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from prefloop.environments.base import Demonstrator
from prefloop.environments.guarded import sound_tasks
from prefloop.formats.rows import place_prompt
from prefloop.hub import pinned_model
from prefloop.records import (
    Checkpoint,
    Dataset,
    JSONObject,
    PrefloopError,
    Split,
    content_hash,
)
from prefloop.rollout import derived_seed
from prefloop.stages.context import BEFORE, Run, circumstances
from prefloop.stages.demonstrating import demonstrations
from prefloop.training.settings import count_steps

if TYPE_CHECKING:
    from prefloop.models.load import Policy

SERVED = "served"  # the "algorithm" of a checkpoint whose weights are behind a server


def start_policy(run: Run) -> str:
    """Make, or find, the policy that the loop starts from; returns the id of its checkpoint."""
    found = run.found(BEFORE, "policy")
    if found is not None:
        return str(found["checkpoint_id"])
    policy = run.settings.policy
    checkpoint = base = _base(run, _demonstrations(run) if policy.initial is not None else None)
    if policy.model is not None:
        run.policies.check(base.id)  # a model or server that is not there is said now: the run can still be changed
    if run.settings.sft is not None:
        checkpoint = _learn(run, base, _demonstrations(run))
    with run.store.transaction():
        run.store.add_event(run.id, BEFORE, "start", {**circumstances(run.settings), **_origin(base)})
        run.store.add_event(run.id, BEFORE, "policy", {"checkpoint_id": checkpoint.id})
    return checkpoint.id


def _origin(base: Checkpoint) -> JSONObject:
    """The model that the run starts from, with the hash of its weights where they are here."""
    from prefloop.training.weights import weights_hash

    weights = {} if base.algorithm == SERVED else {"weights": weights_hash(base.path)}
    return {"model": base.path, **weights}


def _demonstrations(run: Run) -> Dataset:
    assert run.settings.sft is not None
    found = run.found(BEFORE, "demonstrations")
    if found is not None:
        return run.store.dataset(str(found["dataset_id"]))
    environment, num = run.environment, run.settings.sft.num_demonstrations
    if not isinstance(environment, Demonstrator):
        raise PrefloopError(f"environment {environment.name} has no demonstrator: leave out the table [sft]")
    tasks = sound_tasks(environment, Split.TRAIN, num, first=run.settings.guard.num_tasks)
    with run.recorded(BEFORE, "demonstrations", len(tasks)) as detail, run.store.transaction():
        run.keep_files()
        trajectories, verdicts = demonstrations(run, tasks, BEFORE)
        recipe = {"demonstrator": environment.name, "num": len(tasks), "seed": run.settings.seed}
        dataset = Dataset(recipe, (), tuple(t.id for t in trajectories), run.id, BEFORE)
        detail["dataset_id"] = run.store.add_dataset(dataset)
        detail["num"] = len(tasks)
        detail["success"] = sum(verdict.criteria["success"] for verdict in verdicts) / len(verdicts)
    return dataset


def _base(run: Run, demonstrations: Dataset | None) -> Checkpoint:
    """The untrained policy as a checkpoint."""
    settings = run.settings.policy
    if settings.server is not None:
        served_id = content_hash("checkpoint", run.id, "served", settings.server.base_url, settings.server.model)
        checkpoint = Checkpoint(served_id, settings.server.model, "", SERVED, run_id=run.id)
    elif settings.model is not None:
        name = pinned_model(settings.model)  # a hub's model may change while the run goes on
        loaded_id = content_hash("checkpoint", run.id, "load", name)
        checkpoint = Checkpoint(loaded_id, name, "", "load", run_id=run.id)
    else:
        assert demonstrations is not None  # the schema of the run file sees to it
        checkpoint = run.policies.save(_initial(run, demonstrations), algorithm="initial", iteration=BEFORE)
    run.store.add_checkpoint(checkpoint)
    return checkpoint


def _initial(run: Run, demonstrations: Dataset) -> Policy:
    from prefloop.models.initial import initial_model, train_tokenizer
    from prefloop.models.load import Policy

    settings = run.settings.policy.initial
    assert settings is not None
    trajectories = run.store.trajectories(demonstrations.trajectory_ids)
    tasks = run.store.tasks({t.task_id for t in trajectories})
    tokenizer = train_tokenizer(((t.messages, tasks[t.task_id].tools) for t in trajectories), settings.vocab_size)
    return Policy(initial_model(tokenizer, settings).eval(), tokenizer)


def _learn(run: Run, base: Checkpoint, demonstrations: Dataset) -> Checkpoint:
    """Imitate the demonstrations, all but those of held-out prompts."""
    from prefloop.batch.examples import Demonstration
    from prefloop.training.algorithms import make_algorithm
    from prefloop.training.trainer import train

    settings = run.settings.sft
    assert settings is not None
    trajectories = run.store.trajectories(demonstrations.trajectory_ids)
    tasks = run.store.tasks({t.task_id for t in trajectories})
    split = [place_prompt(tasks[t.task_id].messages, settings.held_out)[0] for t in trajectories]
    with run.recorded(BEFORE, "sft", count_steps(settings, split.count(Split.TRAIN))) as detail:
        policies = run.policies
        policy = policies.take(base.id)
        paths = policies.paths(policy, trajectories, tasks)
        examples = [Demonstration(p, name=t.id) for p, t in zip(paths, trajectories, strict=True)]
        states = run.directory / "training" / "sft"
        with run.writers(BEFORE, "sft", settings) as writers:
            result = train(
                policy.model,
                None,
                make_algorithm("sft"),
                [example for example, side in zip(examples, split, strict=True) if side is Split.TRAIN],
                settings,
                seed=derived_seed(run.settings.seed, "sft"),
                identity=f"{base.id} {demonstrations.id}",
                state_directory=states,
                held_out=[example for example, side in zip(examples, split, strict=True) if side is Split.HELD_OUT],
                writers=writers,
                on_step=lambda step, _, metrics: run.progress.advance(step, f"loss {metrics.get('loss', 0):.3f}"),
            )
        checkpoint = policies.save(
            policy, algorithm="sft", iteration=BEFORE, parent_id=base.id, dataset_id=demonstrations.id
        )
        run.store.add_checkpoint(checkpoint)
        policies.keep(checkpoint.id, policy)
        detail |= {"checkpoint_id": checkpoint.id, **result.summary()}
    shutil.rmtree(states, ignore_errors=True)
    return checkpoint
