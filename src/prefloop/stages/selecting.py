"""Which rows a training learns from: those of files, of a frozen dataset or the best of a store; each has a name.

Whatever they come from, they become a frozen dataset in the store, and each member keeps the name (file and line, or
id) by which errors speak of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from prefloop.formats import import_file
from prefloop.formats.importing import MAX_LISTED_ERRORS
from prefloop.formats.limits import RowProblemError
from prefloop.formats.rows import Bundle, place_prompt
from prefloop.hub import DataFile
from prefloop.losses.registry import Records
from prefloop.records import (
    Comparison,
    Dataset,
    JSONObject,
    Judgement,
    Labelled,
    Pair,
    PrefloopError,
    Split,
    StepLabel,
    Task,
    Trajectory,
    Valued,
    Verdict,
    counted,
)
from prefloop.stages.looking import ID_LENGTH
from prefloop.store import Store

Member: TypeAlias = Pair | Labelled | Valued | str
OnError = Literal["stop", "skip"]
NUM_REASONS = 3  # of many
DESIRABLE_FROM = 0.5  # the score from which a judged trajectory counts as good


@dataclass(slots=True)
class Skips:
    """Rows that were left out, or the error that the first of them is.

    The first 1000 are `listed`, and counted by their `reasons`.
    """

    on_error: OnError
    num: int = 0
    listed: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str) -> None:
        """Leave a row out.

        Raises:
            PrefloopError: rows are not to be skipped.
        """
        if self.on_error == "stop":
            raise PrefloopError(f"{where}: {reason} (--on-error skip leaves bad rows out)")
        self.num += 1
        if len(self.listed) < MAX_LISTED_ERRORS:
            self.listed.append(f"{where}: {reason}")
            self.reasons[reason] += 1


def told_reasons(reasons: Mapping[str, int]) -> str:
    """Why rows were left out: the most frequent reasons, each with the number of its rows."""
    told = [f"{reason} ({counted(num, 'row')})" for reason, num in Counter(reasons).most_common(NUM_REASONS)]
    return "; ".join([*told, *([f"{len(reasons) - NUM_REASONS} more reasons"] if len(reasons) > NUM_REASONS else [])])


def nothing_left(num_bad: int, num_too_long: int, skips: Skips) -> PrefloopError:
    """The error of a training to which no row is left, with the reasons."""
    why = f". The bad ones: {told_reasons(skips.reasons)}" if skips.reasons else ""
    what = f"none of the {num_bad + num_too_long} rows is left to train on"
    return PrefloopError(f"{what}: {num_bad} were bad, {num_too_long} too long{why}")


@dataclass(slots=True)
class Rows:
    """Members with their names, in order, and where they come from; `num_bad` rows were left out before.

    `unread` counts the rows that have something which objectives of these records do not read, by its name; margins
    among them, which `reward` does.
    """

    source: JSONObject
    members: list[Member] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    num_bad: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, members: Iterable[Member], unread: Iterable[str]) -> None:
        """Add the members of one row, and the names of what nobody reads of it."""
        self.unread.update(unread)
        for member in members:
            self.members.append(member)
            self.names.append(name)

    def part(self, keep: Sequence[bool]) -> Rows:
        """The rows that are kept."""
        kept = [i for i, wanted in enumerate(keep) if wanted]
        return Rows(self.source, [self.members[i] for i in kept], [self.names[i] for i in kept])

    def freeze(self, run_id: str, **recipe: object) -> Dataset:
        """The dataset of these members."""
        source = dict(self.source)
        if "files" in source:  # where they lie decides nothing
            source["files"] = [{**file, "name": Path(file["name"]).name} for file in source["files"]]
        return Dataset(
            {"of": "train", **source, **recipe},
            tuple(member for member in self.members if isinstance(member, Pair)),
            tuple(member for member in self.members if isinstance(member, str)),
            run_id,
            0,
            tuple(member for member in self.members if isinstance(member, Labelled)),
        )


# --- files ------------------------------------------------------------------------------------------------------


def rows_of_files(
    store: Store,
    files: Sequence[DataFile],
    records: Records,
    skips: Skips,
    held_out: float,
    beside: Iterable[DataFile] = (),
) -> Rows:
    """Import files, and take from each row what an objective of these records learns from.

    `held_out` is the share of the prompts that become held-out tasks of the store. A file is called by its name, or by
    its path as given where another of these, or of those `beside` them, has that name; one of a hub by its whole name.

    Raises:
        PrefloopError: a file that is not there or holds no rows, or a bad row that is not to be skipped.
    """
    rows, num_before, opposites = Rows({"records": records, "files": []}), skips.num, _Opposites()
    names = Counter(file.name for file in {*files, *beside})
    for file in files:
        called = file.name if names[file.name] == 1 else file.called
        rows.source["files"].append({"name": called, "sha256": sha256_of(file.path)})

        def take(line: int, bundle: Bundle, called: str = called) -> None:
            where = f"{called}:{line}"
            if records == "pairs" and _makes_pairs(bundle):
                opposites.add(where, bundle)
                return
            try:
                rows.add(where, members_of_row(bundle, records), _unread_of_row(bundle, records))
            except RowProblemError as problem:
                skips.add(where, problem.reason)

        report = import_file(store, file.path, on_error=skips.on_error, held_out=held_out, on_row=take, called=called)
        for error in report.errors:
            skips.add(f"{error.file}:{error.line}", f"{error.key}: {error.reason}".removeprefix(": "))
        skips.num += report.num_skipped - len(report.errors)
        rows.source["files"][-1]["format"] = report.format
    opposites.pair(rows, skips)
    rows.num_bad = skips.num - num_before
    return rows


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        PrefloopError: there is no such file.
    """
    if not file.exists():
        raise PrefloopError(f"there is no file {file}")
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def members_of_row(bundle: Bundle, records: Records) -> list[Member]:
    """What the records of one row are for an objective that learns from `records`.

    Preferences also serve labels (chosen is desirable, rejected is not) and demonstrations (chosen).

    Raises:
        RowProblemError: the row does not say what the objective needs to know.
    """
    take = {
        "pairs": _pairs,
        "labelled samples": _labelled,
        "steps": _steps,
        "demonstrations": _demonstrations,
    }
    if not bundle.trajectories:
        raise RowProblemError("", "there is only a prompt: nobody has answered it")
    return take[records](bundle)


def _unread_of_row(bundle: Bundle, records: Records) -> set[str]:
    """The columns of a row that are not read: those that its format does not know, and what a preference says more."""
    unknown = {name for trajectory in bundle.trajectories for name in trajectory.extra.get("columns", ())}
    return unknown.union(*(_unread(each.strength is not None, records) for each in bundle.comparisons))


def _unread(has_margin: bool, records: Records) -> set[str]:
    """What is not read of a preference."""
    found = {"margin": has_margin, "rejected": records == "demonstrations"}
    return {name for name, there in found.items() if there}


def _makes_pairs(bundle: Bundle) -> bool:
    """Whether a row is a labelled answer that may be held against another: what differs is the answer alone."""
    return bool(bundle.judgements) and not bundle.comparisons and all(t.group_seeded for t in bundle.trajectories)


class _Opposites:
    """Labelled answers, of which those to one prompt make pairs: each good one over each bad one, in turn."""

    def __init__(self) -> None:
        self.by_task: dict[str, tuple[list[tuple[str, Labelled]], list[tuple[str, Labelled]]]] = {}

    def add(self, where: str, bundle: Bundle) -> None:
        """Take the labelled answers of one row."""
        good, bad = self.by_task.setdefault(bundle.tasks[0].id, ([], []))
        for judgement in bundle.judgements:
            label = _label(judgement)
            (good if label.desirable else bad).append((where, label))

    def pair(self, rows: Rows, skips: Skips) -> None:
        """Add the pairs: every answer to a prompt with both kinds is in one, the fewer kind in several.

        An answer with labels of both kinds is in none, whatever the order of its rows.

        Raises:
            PrefloopError: such an answer, or one whose prompt has no other of the opposite label, unless such rows are
                to be skipped.
        """
        for task_id, (good, bad) in self.by_task.items():
            liked, disliked = ({label.trajectory_id for _, label in side} for side in (good, bad))
            for where, label in (*good, *bad):
                if label.trajectory_id in liked & disliked:
                    skips.add(where, "its answer is labelled as good in one row and as bad in another")
            good = [one for one in good if one[1].trajectory_id not in disliked]
            bad = [one for one in bad if one[1].trajectory_id not in liked]
            if not good or not bad:
                for where, label in good or bad:
                    other = "bad" if label.desirable else "good"
                    skips.add(where, f"no answer to its prompt is labelled as {other}: kto learns from such rows")
                continue
            for i in range(max(len(good), len(bad))):
                (where, chosen), (_, rejected) = good[i % len(good)], bad[i % len(bad)]
                evidence = (*chosen.evidence, *rejected.evidence)
                rows.add(where, [Pair(task_id, chosen.trajectory_id, rejected.trajectory_id, evidence=evidence)], ())


def _pairs(bundle: Bundle) -> list[Member]:
    if not bundle.comparisons:
        raise RowProblemError(
            "",
            "it holds no preference: this objective learns from 'chosen' and 'rejected', or from answers with a "
            "'thumb' or 'label'",
        )
    task_id = bundle.tasks[0].id
    return [pair_of(comparison, task_id) for comparison in bundle.comparisons]


def pair_of(comparison: Comparison, task_id: str) -> Pair:
    """The pair of a comparison whose verdict is `a` or a tie."""
    tied = comparison.verdict is Verdict.TIE
    probability = 0.5 if tied else 1.0 if comparison.probability is None else comparison.probability
    return Pair(
        task_id,
        comparison.trajectory_a,
        comparison.trajectory_b,
        probability=probability,
        evidence=(comparison.id,),
        margin=comparison.strength or 0.0,
        tied=tied,
    )


def _labelled(bundle: Bundle) -> list[Member]:
    if bundle.comparisons:
        return [label for pair in _pairs(bundle) if isinstance(pair, Pair) for label in labels_of(pair)]
    if not bundle.judgements:
        raise RowProblemError("", "it holds no label: this objective learns from answers with a 'label' or 'thumb'")
    return [_label(judgement) for judgement in bundle.judgements]


def _label(judgement: Judgement) -> Labelled:
    if judgement.score is None:
        raise RowProblemError("", f"its judgement failed ({judgement.status.value}): there is no label")
    return Labelled(judgement.trajectory_id, judgement.score >= DESIRABLE_FROM, evidence=(judgement.id,))


def labels_of(pair: Pair) -> tuple[Labelled, Labelled]:
    """Both sides of a sure preference: chosen is desirable, rejected is not.

    Raises:
        RowProblemError: the preference is unsure or a tie, which a label cannot say.
    """
    _check_sure(pair)
    weight, evidence = pair.weight, pair.evidence
    return Labelled(pair.chosen_id, True, weight, evidence), Labelled(pair.rejected_id, False, weight, evidence)


def _check_sure(pair: Pair) -> None:
    if pair.tied or pair.probability != 1.0:
        what = "a tie" if pair.tied else f"a preference of probability {pair.probability}"
        raise RowProblemError("", f"{what} neither labels its sides nor says which to imitate: train on pairs")


def _steps(bundle: Bundle) -> list[Member]:
    if not bundle.step_labels:
        raise RowProblemError("", "it holds no labels of steps: this objective learns from 'completions' and 'labels'")
    by_trajectory: dict[str, list[StepLabel]] = {}
    for label in bundle.step_labels:
        by_trajectory.setdefault(label.trajectory_id, []).append(label)
    return [Labelled(i, None, evidence=tuple(each.id for each in labels)) for i, labels in by_trajectory.items()]


def _demonstrations(bundle: Bundle) -> list[Member]:
    if bundle.comparisons:
        return [demonstration_of(pair) for pair in _pairs(bundle) if isinstance(pair, Pair)]
    bad = any(each.score is None or each.score < DESIRABLE_FROM for each in bundle.judgements)
    if bad or any(label.label < DESIRABLE_FROM for label in bundle.step_labels):
        raise RowProblemError("", "it is labelled as bad, and sft would imitate it: leave it out, or train kto on it")
    return [trajectory.id for trajectory in bundle.trajectories]


def demonstration_of(pair: Pair) -> str:
    """The side of a sure preference that is to be imitated.

    Raises:
        RowProblemError: the preference is unsure or a tie.
    """
    _check_sure(pair)
    return pair.chosen_id


# --- the store --------------------------------------------------------------------------------------------------


def rows_of_dataset(store: Store, dataset_id: str, records: Records, skips: Skips) -> Rows:
    """The members of a frozen dataset, as an objective of these records learns from them.

    Raises:
        PrefloopError: the dataset holds other records, or a bad row that is not to be skipped.
    """
    dataset = store.dataset(dataset_id)
    rows, num_before = Rows({"records": records, "dataset": dataset.id}), skips.num
    held: list[Member] = [*dataset.pairs, *dataset.trajectory_ids, *dataset.labelled, *dataset.valued]
    names = _names(store, dataset.all_trajectory_ids)
    for member in held:
        where = names(member)
        try:
            unread = _unread(member.margin != 0, records) if isinstance(member, Pair) else ()
            rows.add(where, _as_records(member, records), unread)
        except RowProblemError as problem:
            skips.add(where, problem.reason)
    rows.num_bad = skips.num - num_before
    return rows


def _as_records(member: Member, records: Records) -> list[Member]:
    if isinstance(member, Pair) and records == "pairs":
        return [member]
    if isinstance(member, Pair) and records == "labelled samples":
        return [*labels_of(member)]
    if isinstance(member, Pair) and records == "demonstrations":
        return [demonstration_of(member)]
    if isinstance(member, str) and records == "demonstrations":
        return [member]
    if isinstance(member, Labelled) and records == ("steps" if member.desirable is None else "labelled samples"):
        return [member]
    if isinstance(member, Valued) and records == "rollouts":
        return [member]
    kinds = {Pair: "a pair", str: "a demonstration", Labelled: "a labelled trajectory", Valued: "a rollout"}
    kind = kinds[type(member)]
    raise RowProblemError("", f"the dataset holds {kind}, and this objective learns from {records}")


def rows_of_top_k(store: Store, rater_id: str, k: int, min_score: float) -> Rows:
    """The k trajectories of each training task that a rater scores best: rejection sampling.

    Raises:
        PrefloopError: no trajectory of a training task has a score that reaches `min_score`.
    """
    trained_on = store.tasks(split=Split.TRAIN)
    found = [(task, i, score) for task, i, score in store.top_k(rater_id, k) if task in trained_on]
    kept = [i for _, i, score in found if score >= min_score]
    if not kept:
        raise PrefloopError(
            f"none of the {len(found)} best trajectories of training tasks in {store.location} has a score of "
            f"{min_score} or more"
        )
    rows = Rows({"records": "demonstrations", "rater": rater_id, "top_k": k, "min_score": min_score})
    names = _names(store, kept)
    for trajectory_id in kept:
        rows.add(names(trajectory_id), [trajectory_id], ())
    return rows


def _names(store: Store, trajectory_ids: Sequence[str]) -> Callable[[Member], str]:
    """What errors call a member: the file and line that its trajectory was imported from, else its id."""
    found = {t.id: t.extra for t in store.trajectories(trajectory_ids)}

    def of(trajectory_id: str) -> str:
        extra = found.get(trajectory_id, {})
        return f"{extra['file']}:{extra['line']}" if {"file", "line"} <= set(extra) else trajectory_id[:ID_LENGTH]

    def name(member: Member) -> str:
        if not isinstance(member, Pair):
            return of(member if isinstance(member, str) else member.trajectory_id)
        return " over ".join(dict.fromkeys((of(member.chosen_id), of(member.rejected_id))))

    return name


# --- holding out ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Corpus:
    """The trajectories that members name, and their tasks."""

    trajectories: dict[str, Trajectory]
    tasks: dict[str, Task]

    def place(self, member: Member, share: float) -> tuple[Split, str]:
        """On which side of the split a member's prompt lies, and in which cluster of near-equal prompts."""
        first = member.chosen_id if isinstance(member, Pair) else _trajectory_id(member)
        trajectory = self.trajectories[first]
        return place_prompt(self.tasks[trajectory.task_id].messages or trajectory.messages, share)


def _trajectory_id(member: Labelled | Valued | str) -> str:
    return member if isinstance(member, str) else member.trajectory_id


def read_corpus(store: Store, *parts: Rows) -> Corpus:
    """All that the members of these rows name.

    Raises:
        PrefloopError: a trajectory is not there, or was erased on request.
    """
    named: dict[str, str] = {}
    for rows in parts:
        for member, name in zip(rows.members, rows.names, strict=True):
            sides = (member.chosen_id, member.rejected_id) if isinstance(member, Pair) else (_trajectory_id(member),)
            for trajectory_id in sides:
                named.setdefault(trajectory_id, name)
    trajectories = {t.id: t for t in store.trajectories(named, with_paths=True)}
    if gone := [name for i, name in named.items() if i not in trajectories]:
        raise PrefloopError(
            f"{gone[0]}: its trajectory was erased on request; freeze a dataset without it"
            + (f" (and {len(gone) - 1} more)" if len(gone) > 1 else "")
        )
    return Corpus(trajectories, store.tasks({t.task_id for t in trajectories.values()}))


def split_rows(rows: Rows, corpus: Corpus, share: float) -> tuple[Rows, Rows]:
    """The rows to train on, and those held out: near-equal prompts are all on one side.

    Raises:
        PrefloopError: one side would be empty.
    """
    places = [corpus.place(member, share) for member in rows.members]
    held = [split is Split.HELD_OUT for split, _ in places]
    if not any(held) or all(held):
        raise PrefloopError(
            f"--held-out {share}: of {len({cluster for _, cluster in places})} different prompts "
            f"{'all' if any(held) else 'none'} would be held out; give another share, or a file by --eval-data"
        )
    return rows.part([not out for out in held]), rows.part(held)


def count_shared(corpus: Corpus, train: Rows, held_out: Rows) -> int:
    """How many held-out rows have a prompt that is also trained on, but for case, spaces and punctuation."""
    trained = {corpus.place(member, 0.0)[1] for member in train.members}
    return sum(corpus.place(member, 0.0)[1] in trained for member in held_out.members)
