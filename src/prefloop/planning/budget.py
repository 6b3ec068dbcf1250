"""The peaks of a run's stages, what memory there is, and what would make the run fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prefloop.environments.agent import AgentSettings
from prefloop.losses.registry import objective
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
        peaks.append(scoring_peak(scored, "KL", work.guard.num_positions, judge, arena))
        peaks.append(update_peak(setup, "train", work.update, judge, arena))
        return peaks


def setup_of(settings: RunSettings, shape: ModelShape, training: TrainingSettings) -> Setup:
    """How these settings hold and train a model of this shape."""
    policy = settings.policy
    return Setup(
        shape,
        policy.dtype,
        None if policy.lora is None else policy.lora.rank,
        policy.device,
        training.precision,
        training.gradient_checkpointing,
        training.max_tokens,
        objective(settings.train.algorithm).reference or settings.guard.num_tasks > 0,
        policy.quantization,
        training.sync_reference_every is not None,
    )


# --- what there is ----------------------------------------------------------------------------------------------


def available_memory(device: str) -> int:
    """Bytes that a new process may take: of the device, or of this machine and what limits its processes here.

    Raises:
        PrefloopError: there is no such device here.
    """
    if device.startswith("cuda"):
        import torch

        from prefloop.models.load import check_device

        check_device(device)
        return int(torch.cuda.mem_get_info(device)[0])
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


Lever = tuple[str, str, Callable[[RunSettings], list[str]]]
"""A key, what it does, and the values to try, the mildest first."""

LEVERS: tuple[Lever, ...] = (
    (
        "rollout.tasks_per_unit",
        "fewer rows at once: slower rollouts",
        lambda s: [] if isinstance(s.environment, AgentSettings) else _halved(s.rollout.tasks_per_unit, 1),
    ),
    (
        "environment.max_parallel",
        "fewer agents at once: slower rollouts",
        lambda s: _halved(s.environment.max_parallel, 1) if isinstance(s.environment, AgentSettings) else [],
    ),
    (
        "train.max_tokens",
        "smaller packs: the same result",
        lambda s: _halved(s.train.max_tokens, LEAST_TOKENS),
    ),
    (
        "sft.max_tokens",
        "smaller packs: the same result",
        lambda s: [] if s.sft is None else _halved(s.sft.max_tokens, LEAST_TOKENS),
    ),
    (
        "train.gradient_checkpointing",
        "layers are computed twice: updates take a third longer",
        lambda s: [] if s.train.gradient_checkpointing else ["true"],
    ),
    (
        "sft.gradient_checkpointing",
        "layers are computed twice: it takes a third longer",
        lambda s: [] if s.sft is None or s.sft.gradient_checkpointing else ["true"],
    ),
    (
        "policy.lora.rank",
        "an adapter is trained in place of all weights; take a learning rate ten times as high",
        lambda s: ["32"] if s.policy.lora is None else [],
    ),
    (
        "policy.dtype",
        "weights below the adapter in bfloat16: rounded",
        lambda s: ['"bfloat16"'] if s.policy.dtype == "float32" else [],
    ),
    (
        "policy.quantization",
        "weights below the adapter in 4 bits (NF4): rounded more, slower, and needs bitsandbytes",
        lambda s: ['"4bit"'] if s.policy.quantization != "4bit" else [],
    ),
    ("train.batch_size", "fewer rows in a step", lambda s: _halved(s.train.batch_size, 4)),
    ("guard.num_tasks", "a coarser guard", lambda s: _halved(s.guard.num_tasks, 32)),
    ("rollout.samples_per_task", "fewer rollouts to choose from", lambda s: _halved(s.rollout.samples_per_task, 2)),
    (
        "rollout.sampling.max_new_tokens",
        "shorter replies",
        lambda s: _halved(s.rollout.sampling.max_new_tokens, 32),
    ),
)
"""The least intrusive first: the first six change no result beyond rounding."""

BELOW_ADAPTERS = {"policy.dtype", "policy.quantization"}
HELPS = 0.98
"""Of what all stages have beyond the limit: a change that leaves more is not worth its cost."""


def advise(need: Need, settings: RunSettings, limit: int) -> list[Advice]:
    """Changes to the run file that together bring the largest peak below `limit` bytes, or as near as they can.

    All that help are taken, the least intrusive first, until the run fits; then those that it fits without are given
    up again, the most intrusive first, and the others made as mild as may be.
    """
    chosen: dict[str, str] = {}
    while _excess(need, settings, chosen, limit):
        if not any(_pull(need, settings, chosen, key, limit) for key, _, _ in LEVERS):
            break
    if not _excess(need, settings, chosen, limit):
        _spare(need, settings, chosen, limit)
    found: list[Advice] = []
    for key, effect, _ in LEVERS:
        if key in chosen:
            settings = with_value(settings, key, chosen[key])
            found.append(Advice(key, chosen[key], effect, largest(need.peaks(settings)).total))
    return found


def _pull(need: Need, settings: RunSettings, chosen: dict[str, str], key: str, limit: int) -> bool:
    """Choose the mildest value of a key with which the run fits, else the one that helps most; whether any does."""
    if key in BELOW_ADAPTERS and settings.policy.lora is None and "policy.lora.rank" not in chosen:
        return False  # weights that are trained lose small updates in bfloat16, and cannot have fewer bits
    least, helped = _excess(need, settings, chosen, limit), False
    for value in _values(settings, key):
        now = _excess(need, settings, chosen | {key: value}, limit)
        if now < HELPS * least:
            least, chosen[key], helped = now, value, True
        if not now:
            break
    return helped


def _spare(need: Need, settings: RunSettings, chosen: dict[str, str], limit: int) -> None:
    """Give up what is not needed to stay below the limit."""
    for key in [key for key, _, _ in reversed(LEVERS) if key in chosen]:
        without = {other: value for other, value in chosen.items() if other != key}
        needed = key == "policy.lora.rank" and BELOW_ADAPTERS & chosen.keys()
        if not needed and not _excess(need, settings, without, limit):
            del chosen[key]
            continue
        milder = (
            value for value in _values(settings, key) if not _excess(need, settings, chosen | {key: value}, limit)
        )
        chosen[key] = next(milder, chosen[key])


def _values(settings: RunSettings, key: str) -> list[str]:
    return next(values for name, _, values in LEVERS if name == key)(settings)


def _excess(need: Need, settings: RunSettings, chosen: Mapping[str, str], limit: int) -> int:
    """Bytes beyond the limit, of all stages together: a lever may help one of several that are too large."""
    for key, value in chosen.items():
        settings = with_value(settings, key, value)
    return sum(max(0, peak.total - limit) for peak in need.peaks(settings))


def with_value(settings: RunSettings, key: str, value: str) -> RunSettings:
    """The settings with one key set, as the run file would have it."""
    from prefloop.config import apply_overrides, parse_settings

    data = settings.model_dump(mode="json", exclude_unset=True)
    return parse_settings(RunSettings, apply_overrides(data, [f"{key}={value}"]), "plan")


def _halved(value: int, least: int) -> list[str]:
    """Half, a quarter, … of a value, down to the least."""
    steps = range(1, int(math.log2(max(1, value))) + 1)
    return [str(value >> step) for step in steps if value >> step >= least]
