"""What an update of the policy learns from: the iteration's dataset as examples of its objective, and its reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prefloop.losses.registry import objective
from prefloop.records import Dataset, PrefloopError, Split
from prefloop.stages.context import Run
from prefloop.stages.examples import example_of
from prefloop.stages.rollouts import iteration_rollouts
from prefloop.stages.selecting import Corpus, Rows, Skips, read_corpus, rows_of_dataset
from prefloop.training.settings import UpdateSettings

if TYPE_CHECKING:
    from torch import nn

    from prefloop.batch.examples import Demonstration, Example
    from prefloop.models.load import Policy
    from prefloop.training.algorithms import Algorithm


@dataclass(slots=True)
class UpdateData:
    """What a training is given; `reference` is None where none is needed or all examples hold its log-probs.

    `warnings` are what to know of it.
    """

    algorithm: Algorithm
    examples: list[Example]
    held_out: list[Example]
    reference: nn.Module | None = None
    warnings: list[str] = field(default_factory=list)


def rows_to_learn(run: Run, dataset: Dataset, settings: UpdateSettings) -> Rows:
    """The members of a dataset as the objective learns from them: pairs also serve labels and demonstrations.

    Raises:
        PrefloopError: the dataset holds something else.
    """
    skips = Skips("skip")
    rows = rows_of_dataset(run.store, dataset.id, objective(settings.algorithm).records, skips)
    if skips.num:
        raise PrefloopError(f"{settings.algorithm} cannot learn from dataset {dataset.id[:12]}: {skips.listed[0]}")
    return rows


def why_nothing_to_learn(rows: Rows, settings: UpdateSettings) -> str:
    """Why the rows are not enough for the objective; empty where they are."""
    records = objective(settings.algorithm).records
    if not rows.members:
        return f"nothing to train on: no {'pair' if records == 'pairs' else 'trajectory'} met the margin"
    if records == "labelled samples" and len({getattr(member, "desirable", None) for member in rows.members}) == 1:
        return "nothing to train on: all labels are of one class"
    return ""


def update_data(
    run: Run, policy: Policy, iteration: int, before: str, rows: Rows, settings: UpdateSettings
) -> UpdateData:
    """The examples of the rows for a policy, some of them held out, with what the objective needs beside them.

    Raises:
        PrefloopError: samples for a reference point that are not there, or a trajectory that was erased.
    """
    corpus = read_corpus(run.store, rows)
    found = run.policies.paths(policy, list(corpus.trajectories.values()), corpus.tasks)
    paths = dict(zip(corpus.trajectories, found, strict=True))

    def examples(part: Rows) -> list[Example]:
        return [example_of(member, paths, name) for member, name in zip(part.members, part.names, strict=True)]

    train, held_out, warnings = _split(rows, corpus, settings)
    data = UpdateData(_algorithm(run, policy, iteration, settings), examples(train), examples(held_out), None, warnings)
    data.warnings += _weight_advice(train, data.algorithm)
    if data.algorithm.needs_reference:
        _add_reference(run, data, run.checkpoint_before(0) if settings.reference == "start" else before, settings)
    return data


def _split(rows: Rows, corpus: Corpus, settings: UpdateSettings) -> tuple[Rows, Rows, list[str]]:
    """The rows to train on and those held out; an iteration with too few rows for both holds none out, and says so."""
    held = [corpus.place(member, settings.held_out)[0] is Split.HELD_OUT for member in rows.members]
    train, held_out = rows.part([not out for out in held]), rows.part(held)
    if settings.held_out and (not held_out.members or why_nothing_to_learn(train, settings)):
        return rows, rows.part([False] * len(held)), ["too few rows to hold any out: trained without evaluation"]
    return train, held_out, []


def _algorithm(run: Run, policy: Policy, iteration: int, settings: UpdateSettings) -> Algorithm:
    """The objective; KTO's reference point is the KL on the iteration's own rollouts unless `kl` says otherwise."""
    from prefloop.training.algorithms import KTO, make_algorithm

    algorithm = make_algorithm(settings.algorithm, settings)
    if not isinstance(algorithm, KTO) or settings.kl not in (None, "samples"):
        return algorithm
    samples = _fresh_samples(run, policy, iteration)
    if not samples and settings.kl is None:  # of imported rows
        return algorithm
    return replace(algorithm, knobs={**algorithm.knobs, "kl": "samples"}, samples=tuple(samples))


def _fresh_samples(run: Run, policy: Policy, iteration: int) -> list[Demonstration]:
    """What the policy wrote in this iteration, before its update."""
    from prefloop.batch.examples import Demonstration

    rollouts = iteration_rollouts(run, iteration, with_paths=True)
    written = [one for one in rollouts if any(path.loss_mask.any() for path in one.token_paths)]
    tasks = run.store.tasks({one.task_id for one in written})
    paths = run.policies.paths(policy, written, tasks)
    return [Demonstration(own, name=one.id) for own, one in zip(paths, written, strict=True)]


def _weight_advice(rows: Rows, algorithm: Algorithm) -> list[str]:
    """What the paper says of KTO's weights where they are others."""
    from prefloop.losses.kto import weight_advice
    from prefloop.training.algorithms import KTO

    if not isinstance(algorithm, KTO):
        return []
    sums = {True: 0.0, False: 0.0}
    for member in rows.members:
        sums[bool(getattr(member, "desirable", False))] += getattr(member, "weight", 1.0)
    knobs = {key: algorithm.knobs[key] for key in ("desirable_weight", "undesirable_weight")}
    advice = weight_advice(sums[True], sums[False], **knobs)
    return [] if advice.followed else [advice.sentence]


def _add_reference(run: Run, data: UpdateData, checkpoint_id: str, settings: UpdateSettings) -> None:
    """The reference itself where it must be there, else its log-probs with the examples."""
    from prefloop.training.algorithms import KTO
    from prefloop.training.reference import following, precision_of, stored_reference
    from prefloop.training.weights import loaded_hash, weights_hash

    if settings.sync_reference_every is not None:
        data.reference = following(run.policies.reference(checkpoint_id))
        return
    checkpoint = run.store.checkpoint(checkpoint_id)
    assert checkpoint is not None
    model_hash = loaded_hash(weights_hash(checkpoint.path), run.settings.policy.quantization)

    def scored(examples: Any) -> Any:
        return stored_reference(
            run.store,
            lambda: run.policies.reference(checkpoint_id),
            model_hash,
            examples,
            precision=precision_of(run.settings.policy.dtype, settings.precision),
            max_tokens=settings.max_tokens,
        )

    data.examples, data.held_out = scored(data.examples), scored(data.held_out)
    if not isinstance(data.algorithm, KTO):
        return
    if data.algorithm.samples:
        data.algorithm = replace(data.algorithm, samples=tuple(scored(data.algorithm.samples)))
    elif data.algorithm.knobs["kl"] != "none":
        data.reference = run.policies.reference(checkpoint_id)  # completions are dealt to other prompts at each step
