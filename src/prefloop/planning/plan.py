"""The plan of a run: what it needs, how long it takes, what it costs, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefloop.hub import fetch_model, readable
from prefloop.planning.budget import Advice, Need, advise, available_memory, setup_of
from prefloop.planning.cost import JudgeCost, judge_cost
from prefloop.planning.memory import Peak, Setup, largest
from prefloop.planning.shapes import BYTES, ModelShape, initial_shape, shape_of
from prefloop.planning.timing import Rates, Seconds, measure_rates, seconds_of
from prefloop.planning.workload import Lengths, Workload, lengths_of, tasks_there_are
from prefloop.records import JSONObject, PrefloopError, Split
from prefloop.stages.context import Run
from prefloop.stages.settings import JudgeSettings, RunSettings

if TYPE_CHECKING:
    from prefloop.chat import ChatRenderer

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run file asks for. `peaks` by stage, `available` in bytes; `advice` is empty where the run fits."""

    name: str
    setup: Setup
    lengths: Lengths
    work: Workload
    peaks: list[Peak]
    available: int
    advice: list[Advice]
    rates: Rates | None = None
    seconds: Seconds | None = None
    judge: JudgeCost | None = None

    @property
    def peak(self) -> Peak:
        """The stage that needs most."""
        return largest(self.peaks)

    @property
    def fits(self) -> bool:
        """Whether the largest peak is within what there is."""
        return self.peak.total <= self.available

    def to_dict(self) -> JSONObject:
        """As JSON: bytes, seconds, tokens and US dollars."""
        return {
            "run": self.name,
            "parameters": self.setup.shape.num_parameters,
            "trained_bytes": self.setup.trained_bytes,
            "device": self.setup.device,
            "available_bytes": self.available,
            "peak_bytes": self.peak.total,
            "fits": self.fits,
            "stages": {peak.stage: {"bytes": peak.total, "parts": peak.parts} for peak in self.peaks},
            "tokens": {**asdict(self.lengths), **asdict(self.work)},
            "seconds": None if self.seconds is None else asdict(self.seconds),
            "judge": None if self.judge is None else asdict(self.judge),
            "advice": [asdict(one) for one in self.advice],
        }


def plan_run(run: Run, memory: int | None = None) -> Plan:
    """The whole plan: prompts are rendered by the model's own chat template, and the machine's rate is measured.

    With `memory`, in bytes, it is for a device that has so much and need not be here: nothing is then known of time.

    Raises:
        PrefloopError: the policy is served and needs nothing here, its model is not there, its tokenizer fails, or its
            device is not here.
    """
    need = _need(run, _renderer(run))
    settings = run.settings
    setup, work = setup_of(settings, need.shape, settings.train), need.workload(settings)
    judge = judge_cost(run, need.lengths, work)
    if memory is not None:
        return _plan(run, need, memory, None, None, judge)
    available = _available(settings)
    rates = measure_rates(setup, work.rollout.num_rows, settings.num_threads)
    return _plan(run, need, available, rates, seconds_of(settings, setup, work, rates), judge)


def check_memory(run: Run) -> None:
    """See that a run fits into memory before it starts: no model is loaded, prompts are counted by their characters.

    Raises:
        PrefloopError: it does not, with what would make it fit.
    """
    if run.settings.policy.server is not None or run.environment.num_tasks(Split.TRAIN) == 0:
        return  # nothing is done here, or nothing can be, which is said where it is tried
    plan = _plan(run, _need(run, None), _available(run.settings), None, None, None)
    if plan.fits:
        return
    changes = " ".join(f"--set {one.override}" for one in plan.advice)
    advice = too_little(changes, plan.advice, plan.peak, plan.available, "its run file")
    where = "on " + plan.setup.device if plan.setup.device.startswith("cuda") else "of memory"
    raise PrefloopError(
        f"run {plan.name} needs about {size(plan.peak.total)} {where} in the stage {plan.peak.stage!r}, and "
        f"{size(plan.available)} are free: {advice}; `prefloop plan` tells more, --ignore-memory goes on anyway"
    )


def too_little(changes: str, advice: Sequence[Advice], peak: Peak, available: int, where: str) -> str:
    """What advice comes to, in words; `changes` spells it, and `where` they would be made."""
    left = advice[-1].peak if advice else peak.total
    if not advice:
        return f"nothing in {where} would make it fit: take a smaller model"
    if left <= available:
        return f"it would fit with {changes}"
    return f"even {changes} leaves {size(left)}: take a smaller model"


def size(num_bytes: int) -> str:
    """Bytes in words."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.0f} MiB"


def _plan(
    run: Run, need: Need, available: int, rates: Rates | None, seconds: Seconds | None, judge: JudgeCost | None
) -> Plan:
    settings = run.settings
    peaks = need.peaks(settings)
    advice = advise(need, settings, available) if largest(peaks).total > available else []
    setup, work = setup_of(settings, need.shape, settings.train), need.workload(settings)
    return Plan(settings.name, setup, need.lengths, work, peaks, available, advice, rates, seconds, judge)


def _available(settings: RunSettings) -> int:
    vllm = settings.policy.vllm
    return available_memory(settings.policy.device, shared_with_server=vllm is not None and vllm.sleep)


def _need(run: Run, renderer: ChatRenderer | None) -> Need:
    judge = _judge_bytes(run.settings.judge, run.settings.policy.device)
    return Need(_shape(run.settings), lengths_of(run, renderer), tasks_there_are(run), judge)


def _shape(settings: RunSettings) -> ModelShape:
    policy = settings.policy
    if policy.initial is not None:
        return initial_shape(policy.initial)
    if policy.model is None:
        raise PrefloopError(f"run {settings.name}: its policy is served elsewhere; there is nothing to plan here")
    return shape_of(fetch_model(policy.model, weights=False))


def _judge_bytes(judge: JudgeSettings, device: str) -> int:
    """Of a reward model that judges on the policy's device."""
    found = {"reward": judge.reward, "process": judge.process}.get(judge.kind)
    if found is None or found.device != device:
        return 0
    directory = fetch_model(found.model, weights=False)
    members = [path.parent for path in sorted(directory.glob("*/adapter_config.json"))][:1]
    shape = shape_of(members[0] if members and not (directory / "config.json").is_file() else directory)
    return shape.num_parameters * BYTES[found.dtype]


def _renderer(run: Run) -> ChatRenderer | None:
    """The policy's own; None where its tokenizer is yet to be made."""
    policy = run.settings.policy
    if policy.model is None:
        return None
    from transformers import AutoTokenizer

    directory: Path = fetch_model(policy.model, weights=False)
    with readable(f"the tokenizer of {policy.model!r}"):
        return policy.renderer(AutoTokenizer.from_pretrained(directory))
