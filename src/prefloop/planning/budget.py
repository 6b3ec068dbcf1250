"""The peaks of a run's stages, what memory there is, and what would make the run fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from prefloop.config import Settings, apply_overrides, parse_settings
from prefloop.environments.agent import AgentSettings
from prefloop.losses.registry import objective
from prefloop.models.settings import LoraSettings, trains_adapter
from prefloop.planning.memory import (
    Peak,
    Setup,
    arena_bytes,
    largest,
    load_peak,
    sampling_peak,
    scoring_peak,
    update_peak,
)
from prefloop.planning.shapes import ModelShape
from prefloop.planning.workload import Lengths, Workload, workload
from prefloop.stages.settings import RunSettings
from prefloop.training.settings import TrainingSettings

SCORED_TOKENS = 16384
"""Of a pack in which the reference scores evaluations: the default of `prefloop.training.step.with_reference`."""

LEAST_TOKENS = 512  # of a pack that is advised


@dataclass(frozen=True, slots=True)
class Need:
    """What a run file asks of a machine: all that peaks are a function of, the settings aside.

    `judge_bytes` are those of a reward model that judges on the same machine; `tasks` as `workload` takes them.
    """

    shape: ModelShape
    lengths: Lengths
    tasks: tuple[int | None, int | None]
    judge_bytes: int = 0

    @property
    def levers(self) -> Sequence[Lever[RunSettings]]:
        """What may be changed."""
        return LEVERS

    def workload(self, settings: RunSettings) -> Workload:
        """The tokens of the stages under these settings."""
        return workload(settings, self.lengths, self.shape.max_context, self.tasks)

    def peaks(self, settings: RunSettings) -> list[Peak]:
        """The peak of each stage, in order; of a policy that is sampled elsewhere, of what is done here."""
        work, judge = self.workload(settings), self.judge_bytes
        setup = setup_of(settings, self.shape, settings.train)
        sampled = settings.policy.vllm is None
        arena = arena_bytes(setup, work.rollout) if sampled else 0
        peaks = [load_peak(setup, judge)]
        if work.sft is not None and settings.sft is not None:
            first = replace(setup_of(settings, self.shape, settings.sft), reference=False)
            peaks.append(update_peak(first, "sft", work.sft, judge, 0))
        scored = replace(setup, max_tokens=SCORED_TOKENS)
        if sampled:
            peaks.append(sampling_peak(setup, "evaluate", work.evaluation, judge))
            peaks.append(sampling_peak(setup, "rollout", work.rollout, judge))
        peaks.append(sampling_peak(setup, "guard", work.guard, judge))
        peaks.append(scoring_peak(scored, "KL", work.guard.num_positions, judge, arena, work.update.longest))
        if objective(settings.train.algorithm).critic:
            # It is never of few bits, has no logits, and shares no weight with the policy, which lies beside it.
            critic, beside = replace(setup, quantization=None), judge + setup.base_bytes + setup.adapter_bytes
            peaks.append(update_peak(critic, "critic", replace(work.update, num_loss_tokens=0), beside, arena))
        peaks.append(update_peak(setup, "train", work.update, judge, arena))
        return peaks


def setup_of(settings: RunSettings, shape: ModelShape, training: TrainingSettings) -> Setup:
    """How these settings hold and train a model of this shape."""
    policy = settings.policy
    return Setup(
        shape,
        policy.dtype,
        shape.adapter_rank if policy.lora is None else policy.lora.rank,
        policy.device,
        training.precision,
        training.gradient_checkpointing,
        training.max_tokens,
        objective(settings.train.algorithm).reference or settings.guard.num_tasks > 0,
        policy.quantization,
        training.sync_reference_every is not None,
    )


# --- what there is ----------------------------------------------------------------------------------------------


ASLEEP = 3 << 30
"""What a vLLM server keeps of a GPU while it sleeps: CUDA's own, captured graphs and buffers."""


def available_memory(device: str, *, shared_with_server: bool = False) -> int:
    """Bytes that a new process may take: of the device, or of this machine and what limits its processes here.

    A GPU that is `shared_with_server`, a vLLM server that sleeps while models are used here, counts whole but for what
    that keeps: the server may be awake now, and then holds most of it.

    Raises:
        PrefloopError: there is no such device here.
    """
    if device.startswith("cuda"):
        import torch

        from prefloop.models.load import check_device

        check_device(device)
        free, total = torch.cuda.mem_get_info(device)
        return max(int(free), int(total) - ASLEEP) if shared_with_server else int(free)
    return min([_machine(), *_limits()])


def _machine() -> int:
    lines = _text(Path("/proc/meminfo")).splitlines()
    found = next((line for line in lines if line.startswith("MemAvailable:")), "")
    return int(found.split()[1]) * 1024 if found else 1 << 62


def _limits(root: Path = Path("/sys/fs/cgroup"), member: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What control groups leave, of version 2 and 1 (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""
    for line in _text(member).splitlines():
        _, kinds, place = line.split(":", 2)
        folders = [root / place.lstrip("/"), root] if not kinds else []
        if "memory" in kinds.split(","):
            folders = [root / "memory" / place.lstrip("/"), root / "memory"]
        names = ("memory.max", "memory.current") if not kinds else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for folder in folders:
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                yield max(0, int(limit) - int(used) + _cached(folder))


def _cached(folder: Path) -> int:
    """Of what a group uses, the files that the system drops when memory is short."""
    pairs = (line.split() for line in _text(folder / "memory.stat").splitlines())
    found = dict(pair for pair in pairs if len(pair) == 2)
    return int(found.get("inactive_file", 0)) + int(found.get("active_file", 0))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# --- what would make it fit -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Advice:
    """A change of the run file, as `--set` takes it, what it costs, and the peak with it and all those before."""

    key: str
    value: str
    effect: str
    peak: int

    @property
    def override(self) -> str:
        """For `--set`."""
        return f"{self.key}={self.value}"


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Lever(Generic[S]):
    """A key, what changing it costs, and the values to try, the mildest first."""

    key: str
    effect: str
    values: Callable[[S], list[str]]


class Asks(Protocol[S]):
    """What peaks are a function of, the settings aside."""

    @property
    def levers(self) -> Sequence[Lever[S]]:
        """What may be changed, the least intrusive first."""
        ...

    def peaks(self, settings: S) -> list[Peak]:
        """The peak of each stage."""
        ...


def adapts(model: str | None, lora: LoraSettings | None) -> bool:
    """Whether an adapter is trained."""
    return trains_adapter({"model": model, "lora": lora})


def halved(value: int, least: int) -> list[str]:
    """Half, a quarter, … of a value, down to the least."""
    steps = range(1, int(math.log2(max(1, value))) + 1)
    return [str(value >> step) for step in steps if value >> step >= least]


LEVERS: tuple[Lever[RunSettings], ...] = (
    Lever(
        "rollout.tasks_per_unit",
        "fewer rows at once: slower rollouts",
        lambda s: [] if isinstance(s.environment, AgentSettings) else halved(s.rollout.tasks_per_unit, 1),
    ),
    Lever(
        "environment.max_parallel",
        "fewer agents at once: slower rollouts",
        lambda s: halved(s.environment.max_parallel, 1) if isinstance(s.environment, AgentSettings) else [],
    ),
    Lever(
        "train.max_tokens",
        "smaller packs: the same result",
        lambda s: halved(s.train.max_tokens, LEAST_TOKENS),
    ),
    Lever(
        "sft.max_tokens",
        "smaller packs: the same result",
        lambda s: [] if s.sft is None else halved(s.sft.max_tokens, LEAST_TOKENS),
    ),
    Lever(
        "train.gradient_checkpointing",
        "layers are computed twice: updates take a third longer",
        lambda s: [] if s.train.gradient_checkpointing else ["true"],
    ),
    Lever(
        "sft.gradient_checkpointing",
        "layers are computed twice: it takes a third longer",
        lambda s: [] if s.sft is None or s.sft.gradient_checkpointing else ["true"],
    ),
    Lever(
        "policy.lora.rank",
        "an adapter is trained in place of all weights; a learning rate of your own should be ten times as high",
        lambda s: [] if adapts(s.policy.model, s.policy.lora) else ["32"],
    ),
    Lever(
        "policy.dtype",
        "weights below the adapter in bfloat16: rounded",
        lambda s: ['"bfloat16"'] if s.policy.dtype == "float32" and adapts(s.policy.model, s.policy.lora) else [],
    ),
    Lever(
        "policy.quantization",
        "weights below the adapter in 4 bits (NF4): rounded more, slower, and needs bitsandbytes",
        lambda s: ['"4bit"'] if s.policy.quantization != "4bit" and adapts(s.policy.model, s.policy.lora) else [],
    ),
    Lever("train.batch_size", "fewer rows in a step", lambda s: halved(s.train.batch_size, 4)),
    Lever("guard.num_tasks", "a coarser guard", lambda s: halved(s.guard.num_tasks, 32)),
    Lever("rollout.samples_per_task", "fewer rollouts to choose from", lambda s: halved(s.rollout.samples_per_task, 2)),
    Lever(
        "rollout.sampling.max_new_tokens",
        "shorter replies",
        lambda s: halved(s.rollout.sampling.max_new_tokens, 32),
    ),
)
"""The least intrusive first: the first six change no result beyond rounding."""

BELOW_ADAPTERS = {"policy.dtype", "policy.quantization", "dtype", "quantization"}
"""Where there is no adapter they stay: trained weights lose small updates in bfloat16, and cannot have fewer bits."""

ADAPTERS = {"policy.lora.rank", "lora.rank"}
HELPS = 0.98
"""Of what all stages have beyond the limit: a change that leaves more is not worth its cost."""


def advise(need: Asks[S], settings: S, limit: int) -> list[Advice]:
    """Changes to the settings that together bring the largest peak below `limit` bytes, or as near as they can.

    All that help are taken, the least intrusive first, until the run fits; then those that it fits without are given
    up again, the most intrusive first, and the others made as mild as may be.
    """
    chosen: dict[str, str] = {}
    while _excess(need, settings, chosen, limit):
        if not any(_pull(need, settings, chosen, lever, limit) for lever in need.levers):
            break
    if not _excess(need, settings, chosen, limit):
        _spare(need, settings, chosen, limit)
    found: list[Advice] = []
    for lever in need.levers:
        if lever.key in chosen:
            settings = with_value(settings, lever.key, chosen[lever.key])
            peak = largest(need.peaks(settings)).total
            found.append(Advice(lever.key, chosen[lever.key], lever.effect, peak))
    return found


def _pull(need: Asks[S], settings: S, chosen: dict[str, str], lever: Lever[S], limit: int) -> bool:
    """Choose the mildest value of a key with which the run fits, else the one that helps most; whether any does."""
    least, helped = _excess(need, settings, chosen, limit), False
    for value in _values(settings, chosen, lever):
        now = _excess(need, settings, chosen | {lever.key: value}, limit)
        if now < HELPS * least:
            least, chosen[lever.key], helped = now, value, True
        if not now:
            break
    return helped


def _spare(need: Asks[S], settings: S, chosen: dict[str, str], limit: int) -> None:
    """Give up what is not needed to stay below the limit."""
    for lever in [lever for lever in reversed(need.levers) if lever.key in chosen]:
        key = lever.key
        without = {other: value for other, value in chosen.items() if other != key}
        needed = key in ADAPTERS and BELOW_ADAPTERS & chosen.keys()
        if not needed and not _excess(need, settings, without, limit):
            del chosen[key]
            continue
        values = _values(settings, chosen, lever)
        milder = (value for value in values if not _excess(need, settings, chosen | {key: value}, limit))
        chosen[key] = next(milder, chosen[key])


def _values(settings: S, chosen: Mapping[str, str], lever: Lever[S]) -> list[str]:
    """The values to try beside the other changes that were chosen."""
    rest = {lever.key, *(BELOW_ADAPTERS if lever.key in ADAPTERS else ())}
    return lever.values(_changed(settings, {key: value for key, value in chosen.items() if key not in rest}))


def _excess(need: Asks[S], settings: S, chosen: Mapping[str, str], limit: int) -> int:
    """Bytes beyond the limit, of all stages together: a lever may help one of several that are too large."""
    return sum(max(0, peak.total - limit) for peak in need.peaks(_changed(settings, chosen)))


def _changed(settings: S, chosen: Mapping[str, str]) -> S:
    for key, value in chosen.items():
        settings = with_value(settings, key, value)
    return settings


def with_value(settings: S, key: str, value: str) -> S:
    """The settings with one key set, as the file would have it."""
    data: dict[str, Any] = settings.model_dump(mode="json", exclude_unset=True)
    return parse_settings(type(settings), apply_overrides(data, [f"{key}={value}"]), "plan")
