"""A plan for people: one table of the stages, and what they rest on."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prefloop.planning.cost import JudgeCost
from prefloop.planning.memory import Peak
from prefloop.planning.plan import Plan, size
from prefloop.records import counted

SHOWN = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "AdamW",
    "activations": "activ.",
    "logits": "logits",
    "cache": "KV",
}
"""Parts and their columns; what else a stage holds (the process, a reference, a judge, a file) is in `other`."""

ONCE = "*"


def plan_table(plan: Plan) -> RenderableType:
    """The plan as it is printed."""
    notes = Table.grid(padding=(0, 2), pad_edge=False)
    notes.add_column(style="bold", no_wrap=True)
    notes.add_column()
    for title, text in _notes(plan):
        notes.add_row(title, Text.from_markup(text))
    lines: list[RenderableType] = [Text.from_markup(_title(plan)), _stages(plan), notes]
    if plan.advice:
        lines += [Text(), _advice(plan)]
    return Group(*lines)


def _title(plan: Plan) -> str:
    setup, shape = plan.setup, plan.setup.shape
    trained = "all weights" if setup.rank is None else f"LoRA of rank {setup.rank}"
    again = ", gradient checkpointing" if setup.checkpointing else ""
    return (
        f"[bold]{plan.name}[/bold]: {_amount(shape.num_parameters)} parameters ({shape.model_type}, {setup.dtype}), "
        f"{trained}{again}, on {setup.device}"
    )


def _stages(plan: Plan) -> Table:
    largest = plan.peak
    unit, scale = ("GiB", 1 << 30) if largest.total >= 1 << 30 else ("MiB", 1 << 20)
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column(f"{unit} in")
    for column in ("peak", *SHOWN.values(), "other", "time"):
        table.add_column(column, justify="right")
    for peak in plan.peaks:
        known = [peak.parts.get(name, 0) for name in SHOWN]
        numbers = [_number(part / scale, unit) for part in (peak.total, *known, peak.total - sum(known))]
        style = ("bold green" if plan.fits else "bold red") if peak is largest else ""
        table.add_row(f"{peak.stage}{ONCE if _is_once(plan, peak) else ''}", *numbers, _time(plan, peak), style=style)
    return table


def _number(value: float, unit: str) -> str:
    if value < 0.005:
        return "–"
    return f"{value:.2f}" if unit == "GiB" else f"{value:.0f}"


def _is_once(plan: Plan, peak: Peak) -> bool:
    return plan.seconds is not None and peak.stage in plan.seconds.once


def _time(plan: Plan, peak: Peak) -> str:
    if plan.seconds is None:
        return ""
    found = (plan.seconds.stages | plan.seconds.once).get(peak.stage)
    return duration(found) if found else ""


def _notes(plan: Plan) -> Iterator[tuple[str, str]]:
    verdict = "[green]fits[/green]" if plan.fits else "[bold red]does not fit[/bold red]"
    yield "memory", f"{verdict}: {size(plan.peak.total)} at the peak, {size(plan.available)} are free"
    lengths, work = plan.lengths, plan.work
    sampled, step = work.num_trajectories * lengths.sampled, work.update
    yield (
        "tokens",
        f"{counted(work.num_trajectories, 'rollout')} an iteration, {_amount(sampled)} tokens sampled; at most "
        f"{counted(step.num_steps, 'step')} of {_amount(step.num_tokens)} tokens",
    )
    if work.num_redrawn:
        more = counted(work.num_redrawn, "rollout")
        yield "", f"rollout.redraws may add up to {more} and their judgements, which time and cost leave out"
    yield "", f"[dim]{lengths.prompt:,} a prompt, {lengths.after:,} after it: {lengths.source}[/dim]"
    context = plan.setup.shape.max_context
    if lengths.longest_prompt >= context:
        yield (
            "",
            f"[bold red]a prompt of {lengths.longest_prompt:,} tokens leaves no room[/bold red] in the {context:,} "
            "that the model reads: attempts at such tasks end before a word",
        )
    if plan.seconds is not None and plan.rates is not None:
        apart = f"; {ONCE} before and after the loop, in all" if plan.seconds.once else ""
        yield "time", f"about {duration(plan.seconds.iteration)} an iteration{apart}"
        rates = f"{plan.rates.pack / 1e9:,.0f} GFLOP/s in packs, {plan.rates.decode / 1e9:,.0f} in decoding"
        yield "", f"[dim]arithmetic at {rates}, measured now; not environments, served judges, the disk[/dim]"
    yield from _judge(plan.judge)


def _judge(cost: JudgeCost | None) -> Iterator[tuple[str, str]]:
    if cost is None:
        yield "judge", "costs nothing"
        return
    once = f", {cost.evaluation_calls:,} for evaluations" if cost.evaluation_calls else ""
    tokens = f"{counted(cost.num_calls, 'call')} an iteration{once}, {cost.input_tokens:,} tokens in"
    how = "counted in earlier calls" if cost.counted else "estimated"
    yield "judge", f"{tokens} and {cost.output_tokens:,} out each [dim]({how})[/dim]"
    if cost.per_iteration is None or cost.remaining is None:
        yield "", "price unknown: set judge.llm.input_price and judge.llm.output_price ($ for a million tokens)"
        return
    budget = "no budget is set" if cost.budget is None else f"the budget is ${cost.budget:,.2f}"
    over = ": [bold red]not enough[/bold red]" if cost.over_budget else ""
    each, rest = f"${cost.per_iteration:,.2f} an iteration", f"${cost.remaining:,.2f} to the end"
    yield "", f"{each}, {rest}, ${cost.spent:,.2f} spent; {budget}{over}"


def _advice(plan: Plan) -> Table:
    table = Table(title="what would make it fit, one after the other", title_justify="left", box=box.SIMPLE_HEAD)
    table.pad_edge = False
    for column in ("set", "peak then", "what it costs"):
        table.add_column(column, justify="right" if column == "peak then" else "left", no_wrap=column == "set")
    for one in plan.advice:
        table.add_row(
            f"--set {one.override}", Text(size(one.peak), "green" if one.peak <= plan.available else ""), one.effect
        )
    return table


def duration(seconds: float) -> str:
    """Seconds in words."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _amount(number: int) -> str:
    for unit, length in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= length:
            return f"{number / length:.3g} {unit}"
    return str(number)
