"""The rows of one training: selected, held out, rendered for its model, checked, and frozen as datasets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefloop.curation.steps import kind_of_steps
from prefloop.hub import DataFile, data_files
from prefloop.losses.registry import Records, objective, resolve_knobs
from prefloop.records import Dataset, JSONObject, Labelled, PrefloopError, counted
from prefloop.stages.curating import rater_with_scores
from prefloop.stages.fit_settings import FitSettings
from prefloop.stages.looking import find_dataset
from prefloop.stages.selecting import (
    Corpus,
    Rows,
    Skips,
    count_shared,
    nothing_left,
    read_corpus,
    rows_of_dataset,
    rows_of_files,
    rows_of_top_k,
    split_rows,
    told_reasons,
)
from prefloop.store import Store
from prefloop.training.model_card import CARD

DEALS = "kto deals each row's completion to another row"

if TYPE_CHECKING:
    from prefloop.batch.examples import Example
    from prefloop.chat import ChatRenderer, StepKind
    from prefloop.stages.examples import LabelledSteps


@dataclass(slots=True)
class Selected:
    """Rows to train on and rows held out (None: none are), with all that they name, and those that were bad.

    `unused` counts the rows that have something which the objective does not use, by its name.
    """

    rows: Rows
    held_out: Rows | None
    corpus: Corpus
    skips: Skips
    unused: Counter[str]


@dataclass(frozen=True, slots=True)
class FitData:
    """Examples to train on and examples held out, their frozen datasets, and what was done to the rows.

    `datasets` are those that the store is yet to be given, the one to train on first. `step` says what is a step where
    steps are labelled.
    """

    examples: list[Example]
    held_out: list[Example]
    datasets: list[Dataset]
    detail: JSONObject
    step: StepKind | None = None

    @property
    def dataset(self) -> Dataset:
        """The rows to train on, frozen."""
        return self.datasets[0]

    def notes(self) -> Iterator[str]:
        """What the training learns from, and what was cut or left out, in words."""
        train, held = self.detail["train"], self.detail.get("held_out", {"num_examples": 0})
        yield (
            f"{counted(train['num_examples'], 'row')} to train on ({counted(train['num_tokens'], 'token')}, "
            f"{train['num_own_tokens']:,} of them the assistant's), {held['num_examples']:,} held out"
        )
        for part, name in (("train", "training"), ("held_out", "held-out")):
            counts = self.detail.get(part)
            if counts and counts["num_dropped"]:
                yield f"{counts['num_dropped']} of {counts['num_rows']} {name} rows are too long and were left out"
            if counts and counts["num_cut"]:
                yield f"{counts['num_cut']} of {counts['num_rows']} {name} rows are too long: their ends were cut off"
        if self.detail["unused"]:
            listed = ", ".join(f"{name} (of {counted(num, 'row')})" for name, num in self.detail["unused"].items())
            yield f"not used by {self.detail['objective']}: {listed}"
        if self.detail["num_skipped"]:
            yield (
                f"bad rows that were left out: {self.detail['num_skipped']}, named in the model's {CARD}: "
                f"{told_reasons(self.detail['skip_reasons'])}"
            )
        if self.detail.get("num_shared_prompts"):
            yield f"held-out rows whose prompt is also trained on: {self.detail['num_shared_prompts']}"


def select(settings: FitSettings, store: Store) -> Selected:
    """The rows that the settings name, from files (imported into the store) or from the store.

    Raises:
        PrefloopError: a file, dataset or rater that is not there, a bad row that is not to be skipped, or none is left.
    """
    about, skips = objective(settings.objective), Skips(settings.on_error)
    records = about.records
    files, eval_files = (files_of(given) for given in (settings.data, settings.eval_data))
    if files:
        rows = rows_of_files(store, files, records, skips, settings.held_out, beside=eval_files)
    else:
        rows = _rows_of_store(settings, store, records, skips)
    held_out = rows_of_files(store, eval_files, records, skips, 1.0, beside=files) if eval_files else None
    corpus = read_corpus(store, rows, *([held_out] if held_out else []))
    unused = rows.unread + (held_out.unread if held_out else Counter())
    if about.margins:
        del unused["margin"]
    if not rows.members:
        raise nothing_left(rows.num_bad, 0, skips)
    if settings.held_out:
        rows, held_out = split_rows(rows, corpus, settings.held_out)
    return Selected(rows, held_out, corpus, skips, unused)


def files_of(names: Sequence[str]) -> list[DataFile]:
    """The files that names of data mean.

    Raises:
        PrefloopError: as `data_files`.
    """
    return [file for name in names for file in data_files(name)]


def _rows_of_store(settings: FitSettings, store: Store, records: Records, skips: Skips) -> Rows:
    if settings.dataset:
        return rows_of_dataset(store, find_dataset(store, settings.dataset), records, skips)
    assert settings.top_k is not None  # the settings see to it
    rater = rater_with_scores(store, {judgement.rater_id for judgement in store.judgements()}, settings.rater)
    if rater is None:
        raise PrefloopError(f"--top-k: nobody has scored trajectories in {store.location}")
    return rows_of_top_k(store, rater, settings.top_k, settings.min_score)


def ready(
    selected: Selected, settings: FitSettings, store: Store, renderer: ChatRenderer, context: int | None, run_id: str
) -> FitData:
    """The examples of the rows for a model of this tokenizer and context length.

    Raises:
        PrefloopError: as `prepare`; `max_length` is more than the model can read; labels of one class only; a
            warm-up longer than the training; a step or held-out rows of one row whose completion must be dealt to
            another.
    """
    from prefloop.stages.examples import LengthLimit, prepare
    from prefloop.training.trainer import check_warm_up

    if settings.max_length and context and settings.max_length > context:
        raise PrefloopError(f"--max-length {settings.max_length}: {settings.model} reads {context} tokens at most")
    limit = LengthLimit(settings.max_length or context, settings.truncate)
    steps = _steps(selected, settings, store)
    skips, dealt = selected.skips, resolve_knobs(settings.objective, settings).get("kl") in ("derangement", "rotation")
    train = prepare(selected.rows, selected.corpus, renderer, limit, skips, steps, one_turn=dealt)
    _check_classes(train.examples)
    check_warm_up(settings, len(train.examples))  # before the reference is read
    if dealt:
        _check_dealt(train.examples, settings)
    datasets = [selected.rows.freeze(run_id, part="train", held_out=settings.held_out)]
    detail: JSONObject = {"dataset_id": datasets[0].id, "train": train.to_dict()}
    held: list[Example] = []
    if selected.held_out is not None:
        prepared = prepare(selected.held_out, selected.corpus, renderer, limit, skips, steps, one_turn=dealt)
        if dealt and len(prepared.examples) == 1:
            raise PrefloopError(
                f"{prepared.examples[0].name} is the only held-out row, and {DEALS}; hold out more, or set --kl none"
            )
        datasets.append(selected.held_out.freeze(run_id, part="held_out", held_out=settings.held_out))
        detail |= {"held_out_id": datasets[1].id, "held_out": prepared.to_dict()}
        detail["num_shared_prompts"] = count_shared(selected.corpus, selected.rows, selected.held_out)
        held = prepared.examples
    detail |= {"num_skipped": skips.num, "skipped": skips.listed, "max_length": limit.max_length}
    detail |= {
        "skip_reasons": dict(skips.reasons),
        "objective": settings.objective,
        "unused": dict(sorted(selected.unused.items())),
    }
    detail |= {"truncate": limit.truncate, "source": selected.rows.source}
    return FitData(train.examples, held, datasets, detail, kind_of_steps(steps.labels.values()) if steps else None)


def _steps(selected: Selected, settings: FitSettings, store: Store) -> LabelledSteps | None:
    """The labels that the members name, where they are of steps."""
    from prefloop.stages.examples import LabelledSteps

    if selected.rows.source["records"] != "steps":
        return None
    parts = [selected.rows, *([selected.held_out] if selected.held_out else [])]
    named = {i for rows in parts for member in rows.members if isinstance(member, Labelled) for i in member.evidence}
    found = store.step_labels(trajectory_ids=selected.corpus.trajectories)
    return LabelledSteps({label.id: label for label in found if label.id in named}, settings.separator)


def _check_dealt(examples: Sequence[Example], settings: FitSettings) -> None:
    """A step of one row, where the training comes to it, has no other row to deal to, and one prompt has no other."""
    from prefloop.training.kl_samples import prompt_of

    num, rows, batch_size = len(examples), f"{examples[0].name} to {examples[-1].name}", settings.batch_size
    comes_to_last = settings.num_steps is None or settings.num_steps >= math.ceil(num / batch_size)
    if batch_size == 1 or num == 1:
        what = f"each step of the {num} rows, {rows}," if num > 1 else f"the only step, of {examples[0].name},"
    elif num % batch_size == 1 and comes_to_last:
        what = f"of {num} rows, {rows}, the last step"
    elif len({prompt_of(example) for example in examples}) == 1:
        raise PrefloopError(f"all {num} rows, {rows}, have one prompt, and {DEALS} of another prompt: set --kl none")
    else:
        return
    raise PrefloopError(
        f"--batch-size {batch_size}: {what} would have one row, and {DEALS} of its step; give "
        f"{'more rows' if num == 1 else 'another batch size'}, or set --kl none"
    )


def _check_classes(examples: Sequence[Example]) -> None:
    """Labels of one class only teach nothing of what tells the classes apart."""
    from prefloop.batch.examples import LabelledSample

    labelled = [example for example in examples if isinstance(example, LabelledSample)]
    if len({example.desirable for example in labelled}) == 1:
        said = "true (desirable)" if labelled[0].desirable else "false (undesirable)"
        raise PrefloopError(
            f"all {len(labelled)} rows, {labelled[0].name} to {labelled[-1].name}, have the label {said}: this "
            "objective needs rows of both labels"
        )
