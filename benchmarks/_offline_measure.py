"""Measuring a case: losses compared and memory taken at the first step, then the engines' steps in turns."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from _common import Measured, Options, Timing, interleaved
from _memory import with_peak
from _offline_engines import OBJECTIVES, Objective, Ours, Padded, never_merged
from _offline_models import SMALL, WIDE, MatmulRate, Shape, Work, needed_work, new_model, noisy_copy
from _offline_rows import MissingDataError, as_records, llmbar_pairs, random_pairs, tau_bench_group, varied_lengths
from _offline_trl import COMPACT, Theirs
from prefloop.batch.examples import Example
from prefloop.batch.packing import pack_group
from prefloop.models.forward import layout_for

REPETITIONS = 5
PACKED_REPETITIONS = 9  # equal work, so that the interval should hold 1: five would miss it once in 16 times
TOLERANCE = {"padded": 5e-5, "installed": 1e-3, "compact": 1e-3, "bf16": 2e-2}
"""Relative differences of losses. The padded loop sums in float64 as prefloop does; TRL sums log-probs in float32,
where one unit in the last place of -4,300 nats is 5e-4; bf16 rounds every product."""

TAU_QUANTILE = 0.1  # a short task: the longest take minutes a step in TRL's padded batches
QUICK_NUM = 2


@dataclass(frozen=True)
class Case:
    """An objective on some rows: PROMPT_COMPLETION lengths, `llmbar` or `tau_bench`; `num` pairs make a step.

    `peers` names the engines beside ours, where not all of them are to be run.
    """

    objective: str
    rows: str
    num: int
    wide: bool = False
    bf16: bool = False
    varied: bool = False
    peers: frozenset[str] | None = None

    @property
    def label(self) -> str:
        flags = {"wide": self.wide, "bf16": self.bf16, "varied": self.varied}
        return "_".join([self.objective, *(flag for flag, on in flags.items() if on)])

    @property
    def name(self) -> str:
        return self.figure("").replace("__", "_")

    def figure(self, what: str) -> str:
        return f"{self.label}_{what}_{self.rows}"

    @property
    def shape(self) -> Shape:
        return WIDE if self.wide else SMALL

    def examples(self, options: Options) -> list[Example]:
        found = OBJECTIVES[self.objective]
        num = min(self.num, QUICK_NUM) if options.quick else self.num
        if self.rows == "tau_bench":
            return list(tau_bench_group(TAU_QUANTILE, num, num_messages=3 if options.quick else None))
        if self.rows == "llmbar":
            return as_records(llmbar_pairs(num, options.seed), found.records, grouped=found.grouped)
        prompt, completion = map(int, self.rows.split("_"))
        fixed = [(prompt, completion, completion)] * num
        lengths = varied_lengths(prompt, completion, num, options.seed) if self.varied else fixed
        pairs = random_pairs(lengths, self.shape.vocab, options.seed)
        return as_records(pairs, found.records, grouped=found.grouped)


Engine = Callable[[], float]


def measure(case: Case, options: Options) -> Measured:
    """Time all engines on a case. Rows that are not there give no figure."""
    try:
        examples = case.examples(options)
    except MissingDataError as missing:
        return Measured({}, [{"engine": f"skipped: {missing}"}])
    objective = OBJECTIVES[case.objective]
    model = new_model(case.shape, options.seed, scores=objective.scores)
    reference = noisy_copy(model, options.seed) if objective.has_reference else None
    engines = new_engines(case, objective, model, reference, examples)
    losses, memory = first_steps(engines)
    check_losses(case, losses)
    policy, flops, visited = needed_work(objective, model, examples)
    rate = MatmulRate(model, policy.tokens, policy.read, torch.bfloat16 if case.bf16 else torch.float32)
    repetitions = 1 if options.quick else REPETITIONS
    timings = interleaved({**engines, "matmul": rate}, repetitions, warm=True)
    del timings["matmul"]
    _, plain_flops, _ = needed_work(objective, model, examples, merge=False)
    return summarise(case, timings, memory, losses, Needed(policy, flops, plain_flops, visited, rate.best))


def new_engines(
    case: Case, objective: Objective, model: nn.Module, reference: nn.Module | None, examples: Sequence[Example]
) -> dict[str, Engine]:
    def build(engine: Any, **options: Any) -> Callable[[], Engine]:
        def new() -> Engine:
            models = copy.deepcopy(model), copy.deepcopy(reference)
            return engine(objective, *models, examples, bf16=case.bf16, **options)

        return new

    builders = {"ours": build(Ours), "installed": build(Theirs)}
    if objective.trainer in COMPACT:
        builders["compact"] = build(Theirs, compact=True)
        if objective.algorithm in ("dpo", "sft"):
            builders["compact_by_one"] = build(Theirs, compact=True, micro=1)
    builders["padded"] = build(Padded)
    if case.rows == "tau_bench":
        builders["plain"] = build(Ours, plain=True)
    return {name: new() for name, new in builders.items() if name == "ours" or case.peers is None or name in case.peers}


def first_steps(engines: Mapping[str, Engine]) -> tuple[dict[str, float], dict[str, float]]:
    """The loss of each engine's first step, and the bytes by which memory rose in it."""
    losses, memory = {}, {}
    for name, step in engines.items():
        losses[name], peak = with_peak(step)
        if peak is not None:
            memory[name] = peak
    return losses, memory


def check_losses(case: Case, losses: Mapping[str, float]) -> None:
    """That all engines compute the same."""
    for name, loss in losses.items():
        tolerance = TOLERANCE["bf16"] if case.bf16 else TOLERANCE.get(name, TOLERANCE["compact"])
        assert abs(loss / losses["ours"] - 1) < tolerance, f"{case.name}: loss {losses['ours']}, {name} {loss}"


@dataclass(frozen=True)
class Needed:
    """What a step needs at least, what it needs where nothing is shared, and the rate of the machine in FLOP/s."""

    work: Work
    flops: float
    plain_flops: float
    num_visits: int
    rate: float

    @property
    def work_ratio(self) -> float:
        """Below the ratio of tokens: what branches share comes early, where attention costs least."""
        return self.plain_flops / self.flops

    @property
    def sharing(self) -> float:
        return self.num_visits / self.work.tokens


def summarise(
    case: Case,
    timings: Mapping[str, Timing],
    memory: Mapping[str, float],
    losses: Mapping[str, float],
    needed: Needed,
) -> Measured:
    """Ratios of medians to ours and what else was found; one row of the table an engine."""
    seconds = {name: timing.median_cpu for name, timing in timings.items()}
    ratios = {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"}
    share = needed.flops / seconds["ours"] / needed.rate
    text = f"{needed.work.tokens} of {needed.num_visits} tokens, {share:.0%} of {needed.rate / 1e9:.0f} GFLOP/s"
    rows = [
        {
            "engine": name,
            **times(timing),
            "× ours": f"{ratios[name]:.2f}" if name in ratios else "",
            "peak MB": f"{memory[name] / 1e6:.0f}" if name in memory else "",
            "distinct": text if name == "ours" else "",
        }
        for name, timing in timings.items()
    ]
    if "installed" in ratios and "compact" not in ratios:  # its head has no compact form
        ratios["compact"] = ratios["installed"]
        rows.append({"engine": "compact", "CPU s": "as installed"})
    figures = {
        **ratios,
        "s": seconds["ours"],
        **{f"mb_{name}": peak / 1e6 for name, peak in memory.items()},
        "visited": float(needed.num_visits),
        "computed": float(needed.work.tokens),
        "matmul_share": share,
    }
    for name, peer in (("loss_rel_diff", "padded"), ("reported_loss_rel_diff", "installed")):
        if peer in losses:
            figures[name] = abs(losses[peer] / losses["ours"] - 1)
    if "plain" in ratios:
        figures |= {"of_sharing": ratios["plain"] / needed.sharing, "of_work": ratios["plain"] / needed.work_ratio}
        rows[-1]["distinct"] = f"tokens {needed.sharing:.2f} times ours, work {needed.work_ratio:.2f}"
    return Measured({case.figure(what): value for what, value in figures.items()}, rows)


def times(timing: Timing) -> dict[str, str]:
    return {"CPU s": Timing.text(timing.cpu), "wall s": Timing.text(timing.wall)}


def measure_packed(options: Options) -> Measured:
    """SFT on rows that share nothing against plain packing: the same code path, so the same time."""
    case = Case("sft", "512_128", 4)
    objective, examples = OBJECTIVES["sft"], case.examples(options)
    model = new_model(case.shape, options.seed)
    check_same_path(model, examples)
    engines = {
        name: Ours(objective, copy.deepcopy(model), None, examples, plain=name == "plain") for name in ("ours", "plain")
    }
    check_losses(case, {name: step() for name, step in engines.items()})
    timings = interleaved(engines, 3 if options.quick else PACKED_REPETITIONS, warm=True)
    ratios = [plain / ours for plain, ours in zip(timings["plain"].cpu, timings["ours"].cpu, strict=True)]
    figures = {"sft_packed": statistics.median(ratios), "sft_packed_min": min(ratios), "sft_packed_max": max(ratios)}
    rows = [{"engine": name, **times(timing)} for name, timing in timings.items()]
    rows[1]["× ours"] = Timing.text(ratios)
    return Measured(figures, rows)


def check_same_path(model: nn.Module, examples: Sequence[Example]) -> None:
    """That the step packs what it packs where it may not merge, and lays it before the model alike."""
    everything = range(len(examples))
    ours = pack_group(examples, everything)
    with never_merged():
        plain = pack_group(examples, everything)
    assert plain.num_tokens == len(plain.visit_token_V), "plain packing merged tokens"
    for name in ("token_T", "parent_T", "end_T", "visit_token_V"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), f"rows that share nothing: {name} differs"
    assert layout_for(model, ours).segments == layout_for(model, plain).segments
