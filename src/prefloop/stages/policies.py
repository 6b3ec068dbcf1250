"""The models of a run in memory, and their checkpoints on disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefloop.chat import ChatRenderer, stop_ids, trajectory_paths
from prefloop.clients.sampling import SamplingSettings
from prefloop.environments.base import steppable
from prefloop.models.load import Policy, load_policy
from prefloop.models.sampler import LocalSampler
from prefloop.records import (
    Checkpoint,
    JSONObject,
    PrefloopError,
    Task,
    TokenPath,
    Trajectory,
    content_hash,
)
from prefloop.rollout import Attempt, LocalSpeaker, Provenance, Rollout, open_episodes, roll_out, unit_seed
from prefloop.training.checkpoint import save_atomically, verify

if TYPE_CHECKING:
    from prefloop.stages.context import Run


class Policies:
    """Loads, keeps and saves the policies of a run.

    At most two models are in memory: the one that is trained and rolled out, and the frozen reference. Adapters of
    one model share its weights.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loaded: dict[str, Policy] = {}
        self._taken: Callable[[], Policy | None] = lambda: None
        self._reference: tuple[str, Policy] | None = None
        torch.set_num_threads(run.settings.num_threads)
        torch.use_deterministic_algorithms(True, warn_only=run.settings.policy.device != "cpu")

    def get(self, checkpoint_id: str) -> Policy:
        """The policy of a checkpoint, loaded if it is not the current one."""
        if checkpoint_id not in self._loaded:
            path, beside = self._whole(checkpoint_id), list(self._living())
            self._loaded = {}
            self._loaded[checkpoint_id] = load_policy(
                path, lora=self._run.settings.policy.lora, beside=beside, **self._options()
            )
        return self._loaded[checkpoint_id]

    def take(self, checkpoint_id: str) -> Policy:
        """The policy of a checkpoint, to be trained: the next `get` loads it anew."""
        policy = self.get(checkpoint_id)
        self._loaded = {}
        self._taken = weakref.ref(policy)
        return policy

    def keep(self, checkpoint_id: str, policy: Policy) -> None:
        """Remember a policy as the current one."""
        self._loaded = {checkpoint_id: policy}

    def reference(self, checkpoint_id: str) -> Any:
        """The frozen model of a checkpoint."""
        if self._reference is None or self._reference[0] != checkpoint_id:
            path, beside = self._whole(checkpoint_id), list(self._living())
            self._reference = None
            self._reference = (checkpoint_id, load_policy(path, frozen=True, beside=beside, **self._options()))
        return self._reference[1].model

    def _living(self) -> Iterator[Policy]:
        """The policies in memory, whose base weights others may share."""
        found = (*self._loaded.values(), self._taken(), self._reference[1] if self._reference is not None else None)
        yield from (policy for policy in found if policy is not None)

    def _options(self) -> dict[str, Any]:
        settings = self._run.settings.policy
        return {"dtype": settings.dtype, "device": settings.device}

    def _whole(self, checkpoint_id: str) -> str:
        checkpoint = self._run.store.checkpoint(checkpoint_id)
        if checkpoint is None:
            raise PrefloopError(f"there is no checkpoint {checkpoint_id} in {self._run.store.location}")
        if checkpoint.manifest_hash and verify(Path(checkpoint.path)) != checkpoint.manifest_hash:
            raise PrefloopError(f"checkpoint {checkpoint.path} is not the one that was recorded: restore it")
        return checkpoint.path

    def save(
        self,
        policy: Policy,
        *,
        algorithm: str,
        iteration: int,
        parent_id: str = "",
        dataset_id: str = "",
        attempt: int = 0,
        metrics: JSONObject | None = None,
    ) -> Checkpoint:
        """Save a policy as one atomic unit; the caller records the checkpoint in the store."""
        key = content_hash("checkpoint", self._run.id, algorithm, iteration, parent_id, dataset_id, attempt)
        path = self._run.directory / "checkpoints" / f"{iteration + 1:03d}-{algorithm}-{key[:8]}"
        manifest_hash = save_atomically(path, policy.save)
        return Checkpoint(
            key, str(path), manifest_hash, algorithm, parent_id, dataset_id, self._run.id, iteration, metrics or {}
        )

    def renderer(self, policy: Policy) -> ChatRenderer:
        """The renderer of a policy's chat template."""
        return ChatRenderer(policy.tokenizer)

    def paths(self, policy: Policy, trajectories: Sequence[Trajectory], tasks: dict[str, Task]) -> list[Paths]:
        """Token paths to train on: those that were sampled where they hold for this model, else rendered anew."""
        renderer = self.renderer(policy)
        return [trajectory_paths(renderer, one, tasks[one.task_id].tools) for one in trajectories]

    def roll_out(
        self, policy: Policy, attempts: Sequence[Attempt], sampling: SamplingSettings, provenance: Provenance
    ) -> list[Rollout]:
        """Roll a policy out on a unit of attempts."""
        environment = steppable(self._run.environment, "a rollout")
        renderer = self.renderer(policy)
        sampler = LocalSampler(policy.model, stop_ids(renderer))
        episodes = open_episodes(environment, attempts)
        seed = unit_seed(self._run.settings.seed, provenance, attempts)
        speaker = LocalSpeaker(sampler, renderer, episodes, sampling, seed)
        return roll_out(environment, attempts, episodes, speaker, provenance)


Paths = tuple[TokenPath, ...]
