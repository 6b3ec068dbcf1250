"""What a training of its own (`prefloop train OBJECTIVE`) needs, held against what there is before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefloop.hub import fetch_model
from prefloop.losses.registry import needs_reference, objective, resolve_knobs
from prefloop.planning.budget import SCORED_TOKENS, Lever, adapts, advise, available_memory, halved
from prefloop.planning.memory import Peak, Setup, Update, largest, load_peak, scoring_peak, update_peak
from prefloop.planning.plan import size, too_little
from prefloop.planning.shapes import ModelShape, shape_of
from prefloop.planning.workload import characters
from prefloop.records import Pair, PrefloopError
from prefloop.stages.fit_data import Selected
from prefloop.stages.fit_settings import FitSettings
from prefloop.stages.selecting import Member

NUM_ROWS = 512
"""Rows whose text is measured."""

LEVERS: tuple[Lever[FitSettings], ...] = (
    Lever("max_tokens", "smaller packs: the same result", lambda s: halved(s.max_tokens, 512)),
    Lever(
        "gradient_checkpointing",
        "layers are computed twice: a third longer",
        lambda s: [] if s.gradient_checkpointing else ["true"],
    ),
    Lever(
        "lora.rank",
        "an adapter is trained in place of all weights",
        lambda s: [] if _adapts(s) else ["32"],
    ),
    Lever(
        "dtype",
        "weights below the adapter in bfloat16: rounded",
        lambda s: ['"bfloat16"'] if s.dtype == "float32" and _adapts(s) else [],
    ),
    Lever(
        "quantization",
        "weights below the adapter in 4 bits",
        lambda s: ['"4bit"'] if s.quantization != "4bit" and _adapts(s) and objective(s.objective).of_policy else [],
    ),
    Lever("batch_size", "fewer rows in a step", lambda s: halved(s.batch_size, 4)),
)


@dataclass(frozen=True, slots=True)
class FitNeed:
    """What a training asks of a machine: its model, and the mean tokens of a row with those that enter the loss.

    `longest` are the tokens of the longest path, a row of demonstrations or a side of a pair.
    """

    shape: ModelShape
    device: str
    num_rows: int
    tokens: int
    own_tokens: int
    longest: int = 0

    @property
    def levers(self) -> Sequence[Lever[FitSettings]]:
        """What may be changed."""
        return LEVERS

    def peaks(self, settings: FitSettings) -> list[Peak]:
        """The peaks of loading, of the reference's log-probs where there is one, and of the training."""
        setup = self._setup(settings)
        batch = min(settings.batch_size, self.num_rows)
        steps = settings.num_steps or settings.num_epochs * math.ceil(self.num_rows / batch)
        of_policy = objective(settings.objective).of_policy  # a reward model has no logits
        longest = min(self.longest, settings.max_length or self.shape.max_context)
        update = Update(batch * self.tokens, batch * self.own_tokens if of_policy else 0, steps, longest)
        peaks = [load_peak(setup, 0)]
        if needs_reference(settings.objective, settings):
            packs = min(settings.max_tokens, SCORED_TOKENS)
            scored = replace(setup, reference=bool(settings.reference) or setup.reference, max_tokens=packs)
            peaks.append(scoring_peak(scored, "reference", self.num_rows * self.tokens, 0, 0, longest))
        return [*peaks, update_peak(setup, "train", update, 0, 0)]

    def _setup(self, settings: FitSettings) -> Setup:
        """How the training holds its model; a reference is held where its log-probs cannot be had beforehand."""
        follows = settings.sync_reference_every is not None
        needs = needs_reference(settings.objective, settings)
        live = needs and resolve_knobs(settings.objective, settings).get("kl", "none") != "none"
        of_policy = objective(settings.objective).of_policy  # a reward model is made of the whole, the adapter merged
        kept = self.shape.adapter_rank if of_policy else None
        return Setup(
            self.shape,
            settings.dtype,
            settings.lora.rank if settings.lora is not None else kept,
            self.device,
            settings.precision,
            settings.gradient_checkpointing,
            settings.max_tokens,
            follows or live,
            settings.quantization,
            follows,
        )


def _adapts(settings: FitSettings) -> bool:
    of_policy = objective(settings.objective).of_policy
    return adapts(settings.model if of_policy else None, settings.lora)


def check_fit(settings: FitSettings, selected: Selected) -> None:
    """See that a training fits into memory before its model is loaded; its rows are counted by their characters.

    Raises:
        PrefloopError: it does not, with what would make it fit.
    """
    from prefloop.stages.fit_models import device_of

    try:
        shape = shape_of(fetch_model(settings.model, weights=False))
    except PrefloopError:
        return  # loading it says what is wrong
    device = device_of(settings)
    need = FitNeed(shape, device, len(selected.rows.members), *_tokens(selected))
    available = available_memory(device)
    peak = largest(need.peaks(settings))
    if peak.total <= available:
        return
    changes = advise(need, settings, available)
    options = " ".join(_option(one.key, one.value) for one in changes)
    advice = too_little(options, changes, peak, available, "its options")
    where = "on " + device if device.startswith("cuda") else "of memory"
    raise PrefloopError(
        f"training {settings.model} needs about {size(peak.total)} {where} in the stage {peak.stage!r}, and "
        f"{size(available)} are free: {advice}; --ignore-memory goes on anyway"
    )


def _option(key: str, value: str) -> str:
    name = "--" + key.replace(".", "-").replace("_", "-")
    return name if value == "true" else f"{name} {value.strip(chr(34))}"


def _tokens(selected: Selected) -> tuple[int, int, int]:
    """Mean tokens of a row (a prompt that both sides of a pair share once) and of its own; of the longest path."""
    counts = [_counts(member, selected) for member in selected.rows.members[:NUM_ROWS]]
    prompt = math.ceil(sum(first for first, _ in counts) / len(counts))
    own = math.ceil(sum(sum(sides) for _, sides in counts) / len(counts))
    return prompt + own, own, max(first + max(sides) for first, sides in counts)


def _counts(member: Member, selected: Selected) -> tuple[int, list[int]]:
    """Tokens of the prompt, and of what follows it on each side."""
    if isinstance(member, Pair):
        names = [member.chosen_id, member.rejected_id]
    else:
        names = [member if isinstance(member, str) else member.trajectory_id]
    sides = [selected.corpus.trajectories[name] for name in names]
    messages, num = sides[0].messages, sides[0].num_prompt_messages
    prompt = characters(messages[:num], selected.corpus.tasks[sides[0].task_id].tools)
    return prompt, [characters(side.messages[side.num_prompt_messages :], ()) for side in sides]
