"""The models of a run in memory, and their checkpoints on disk."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefloop.chat import ChatRenderer, stop_ids, trajectory_paths
from prefloop.clients.sampling import SamplingSettings
from prefloop.clients.vllm import VLLMSampler
from prefloop.environments.agent import Agent
from prefloop.environments.base import steppable
from prefloop.gateway import Batcher, ContinuousBatcher, ProcessBatcher, ServedBatcher
from prefloop.models.allocation import map_large_blocks_of_wide
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
from prefloop.stages.agents import AgentRunner, Keep
from prefloop.stages.voices import ServedVoices, Voice, load_tokenizer
from prefloop.training.checkpoint import save_atomically, verify

CHECKPOINTS = "checkpoints"  # in a run's directory

if TYPE_CHECKING:
    from prefloop.stages.context import Run


class Policies:
    """Loads, keeps and saves the policies of a run.

    At most two models are in memory: the one that is trained and rolled out, and the frozen reference. Adapters of
    one model share its weights. Where a vLLM server samples and sleeps in between, none is in memory while it is awake.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loaded: dict[str, Policy] = {}
        self._taken: Callable[[], Policy | None] = lambda: None
        self._reference: tuple[str, Policy] | None = None
        self._served = _served_voices(run, self._release)
        _set_up_torch(run.settings.num_threads, run.settings.policy.device)

    def get(self, checkpoint_id: str) -> Policy:
        """The policy of a checkpoint, loaded if it is not the current one."""
        if checkpoint_id not in self._loaded:
            self._make_room()
            path, beside = self._whole(checkpoint_id), list(self._living())
            self._loaded = {}
            self._loaded[checkpoint_id] = load_policy(
                path, lora=self._run.settings.policy.lora, beside=beside, **self._options()
            )
            map_large_blocks_of_wide(self._loaded[checkpoint_id].model)
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
            self._make_room()
            path, beside = self._whole(checkpoint_id), list(self._living())
            self._reference = None
            self._reference = (checkpoint_id, load_policy(path, frozen=True, beside=beside, **self._options()))
        return self._reference[1].model

    def _make_room(self) -> None:
        if self._served is not None:
            self._served.make_room()

    def _release(self) -> None:
        """Forget the models in memory, which a server needs."""
        self._loaded, self._reference = {}, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def check(self, checkpoint_id: str) -> None:
        """See that a checkpoint can be sampled.

        Raises:
            PrefloopError: it is not there or damaged, or its server cannot be asked or is not as it must be.
        """
        if self._served is None:
            self.get(checkpoint_id)
        else:
            self._served.check(checkpoint_id, self._whole(checkpoint_id))

    def voice(self, who: Policy | str) -> Voice:
        """The voice of a policy in memory, or of a checkpoint by its id: here, or on the server of the run file."""
        if isinstance(who, str) and self._served is not None:
            return self._served.voice(who, self._whole(who))
        policy = self.get(who) if isinstance(who, str) else who
        renderer = self.renderer(policy)
        return Voice(LocalSampler(policy.model, stop_ids(renderer)), renderer)

    def batcher(self, voice: Voice) -> ContinuousBatcher | ServedBatcher:
        """What puts the requests of many agents together for a voice; the caller closes it."""
        settings = self._run.settings.gateway
        if isinstance(voice.sampler, VLLMSampler):
            return ServedBatcher(voice.sampler, settings.max_batch)
        return ContinuousBatcher(voice.sampler, settings.max_batch, settings.chunk_tokens, settings.cached_rows)

    def serve(self, checkpoint_id: str) -> Serving:
        """A checkpoint for agents that run elsewhere, sampled in a process of its own where its weights are here.

        The caller closes its batcher. No model stays in memory here.
        """
        if self._served is not None:
            voice = self.voice(checkpoint_id)
            return Serving(voice.renderer, self.batcher(voice), voice.sampler.max_context)
        self._release()
        path, settings = self._whole(checkpoint_id), self._run.settings
        renderer = settings.policy.renderer(load_tokenizer(path))
        load = partial(load_sampler, path, stop_ids(renderer), settings.num_threads, **self._options())
        limits = settings.gateway
        batcher = ProcessBatcher(load, limits.max_batch, limits.chunk_tokens, limits.cached_rows)
        return Serving(renderer, batcher, batcher.max_context)

    def rest(self) -> None:
        """Nobody is to speak for a while: a server that was asked to may sleep."""
        if self._served is not None:
            self._served.rest()

    def _living(self) -> Iterator[Policy]:
        """The policies in memory, whose base weights others may share."""
        found = (*self._loaded.values(), self._taken(), self._reference[1] if self._reference is not None else None)
        yield from (policy for policy in found if policy is not None)

    def _options(self) -> dict[str, Any]:
        settings = self._run.settings.policy
        return {"dtype": settings.dtype, "device": settings.device, "quantization": settings.quantization}

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
        path = self._run.directory / CHECKPOINTS / f"{iteration + 1:03d}-{algorithm}-{key[:8]}"
        manifest_hash = save_atomically(path, policy.save)
        return Checkpoint(
            key, str(path), manifest_hash, algorithm, parent_id, dataset_id, self._run.id, iteration, metrics or {}
        )

    def renderer(self, policy: Policy) -> ChatRenderer:
        """The renderer of a policy's chat template."""
        return self._run.settings.policy.renderer(policy.tokenizer)

    def paths(self, policy: Policy, trajectories: Sequence[Trajectory], tasks: dict[str, Task]) -> list[Paths]:
        """Token paths to train on: those that were sampled where they hold for this model, else rendered anew."""
        renderer = self.renderer(policy)
        return [trajectory_paths(renderer, one, tasks[one.task_id].tools) for one in trajectories]

    def roll_out(
        self,
        who: Policy | str,
        attempts: Sequence[Attempt],
        sampling: SamplingSettings,
        provenance: Provenance,
        keep: Keep = lambda _: None,
    ) -> list[Rollout]:
        """Roll out a policy in memory, or a checkpoint by its id, on a unit of attempts.

        An agent of its own does it where the environment is one, and `keep` is told of its episodes one by one.
        """
        environment = self._run.environment
        voice = self.voice(who)
        sampler, renderer = voice.sampler, voice.renderer
        if isinstance(environment, Agent):
            with closing(self.batcher(voice)) as batcher:
                proven = self._run.store.has_trajectories(self._run.id)
                runner = AgentRunner(environment, self._run.settings.gateway, self._run.directory, proven)
                return runner.roll_out(renderer, batcher, sampler.max_context, attempts, sampling, provenance, keep)
        environment = steppable(environment, "a rollout")
        episodes = open_episodes(environment, attempts)
        seed = unit_seed(self._run.settings.seed, provenance, attempts)
        speaker = LocalSpeaker(sampler, renderer, episodes, sampling, seed)
        return roll_out(environment, attempts, episodes, speaker, provenance)


@dataclass(frozen=True, slots=True)
class Serving:
    """A policy that answers many agents at once; `max_context` is the most tokens of a conversation."""

    renderer: ChatRenderer
    batcher: Batcher
    max_context: int


def load_sampler(path: str, stops: Iterable[int], num_threads: int, **options: Any) -> LocalSampler:
    """The sampler of a checkpoint's directory in a process that does nothing else; as `load_policy` for the rest."""
    _set_up_torch(num_threads, options["device"])
    policy = load_policy(path, frozen=True, **options)
    map_large_blocks_of_wide(policy.model)
    return LocalSampler(policy.model, stops)


def _set_up_torch(num_threads: int, device: str) -> None:
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")


def _served_voices(run: Run, before_wake: Callable[[], None]) -> ServedVoices | None:
    policy = run.settings.policy
    if policy.vllm is None or policy.model is None:
        return None
    return ServedVoices(policy.vllm, policy.model, run.directory / CHECKPOINTS, before_wake, policy.renderer)


Paths = tuple[TokenPath, ...]
