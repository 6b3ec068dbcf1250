"""From the members of a dataset to what a batch is made of: rendered for one model, checked, and within its length.

Nothing is cut or left out in silence: what is goes into `Prepared`, by number and name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from prefloop.chat import ChatRenderer, StepFinder, trajectory_paths
from prefloop.chat.steps import SEPARATOR
from prefloop.curation.steps import merge_step_labels
from prefloop.formats.importing import MAX_LISTED_ERRORS
from prefloop.formats.limits import RowProblemError
from prefloop.formats.trl import PLAIN_TEXT
from prefloop.records import (
    JSONObject,
    Labelled,
    Pair,
    PrefloopError,
    Source,
    StepLabel,
    TokenPath,
    Trajectory,
    Valued,
)
from prefloop.stages.selecting import Corpus, Member, Rows, Skips, nothing_left
from prefloop.training.kl_samples import has_several_turns

if TYPE_CHECKING:
    from prefloop.batch.examples import Example

Paths = tuple[TokenPath, ...]
Truncate = Literal["stop", "drop", "keep_start"]


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How long a path may be, in tokens (None: as long as it is), and what is done about a longer one.

    `stop` is an error, `drop` leaves the row out, `keep_start` cuts its end off; the beginning always stays.
    """

    max_length: int | None
    truncate: Truncate = "stop"


@dataclass(frozen=True, slots=True)
class LabelledSteps:
    """Labels of steps by their ids, and what ends a step of text."""

    labels: Mapping[str, StepLabel]
    separator: str = SEPARATOR


@dataclass(slots=True)
class Prepared:
    """Examples, and what became of the rows that they were made of.

    Of `num_rows`, `num_dropped` were too long and `num_cut` were cut; the first 1000 of both are named in `too_long`.
    `longest` is the longest path in tokens before any cut. `num_tokens` counts the tokens of all paths that are left,
    `num_own_tokens` those of them that enter losses.
    """

    examples: list[Example] = field(default_factory=list)
    num_rows: int = 0
    num_dropped: int = 0
    num_cut: int = 0
    longest: int = 0
    num_tokens: int = 0
    num_own_tokens: int = 0
    too_long: list[str] = field(default_factory=list)

    def to_dict(self) -> JSONObject:
        """The counts, and the names of the rows that were too long."""
        counts = ("num_rows", "num_dropped", "num_cut", "longest", "num_tokens", "num_own_tokens", "too_long")
        return {"num_examples": len(self.examples), **{name: getattr(self, name) for name in counts}}


def prepare(
    rows: Rows,
    corpus: Corpus,
    renderer: ChatRenderer,
    limit: LengthLimit,
    skips: Skips,
    steps: LabelledSteps | None = None,
    *,
    one_turn: bool = False,
) -> Prepared:
    """The examples of rows, rendered for a model.

    A bad row goes to `skips`: an empty completion, sides that are equal (as tokens), a margin that is not finite, a
    prompt that leaves nothing of the completion within the limit (but where too long rows are dropped, or listed by an
    error), messages that the template refuses or drops, or, where `one_turn` is all that the objective can use, several
    turns. `steps` where these are labelled.

    Raises:
        PrefloopError: a bad row that is not to be skipped, rows that are too long where that stops, labels of one
            class only, or no row that is left.
    """
    steps = steps or LabelledSteps({})
    finder, skipping = StepFinder(renderer, steps.separator), skips.on_error == "skip"
    preparing = _Preparing(corpus, renderer, limit, finder, steps.labels, one_turn, skipping)
    for member, name in zip(rows.members, rows.names, strict=True):
        preparing.found.num_rows += 1
        try:
            preparing.add(member, name)
        except (RowProblemError, PrefloopError) as problem:
            skips.add(name, str(problem))
    preparing.check_lengths()
    found = preparing.found
    if not found.examples:
        raise nothing_left(rows.num_bad + found.num_rows - found.num_dropped, found.num_dropped, skips)
    return found


@dataclass(slots=True)
class _Preparing:
    """Rendering of members, each trajectory once."""

    corpus: Corpus
    renderer: ChatRenderer
    limit: LengthLimit
    finder: StepFinder
    step_labels: Mapping[str, StepLabel]
    one_turn: bool
    skipping: bool
    found: Prepared = field(default_factory=Prepared)
    rendered: dict[str, Paths | PrefloopError] = field(default_factory=dict)

    def add(self, member: Member, name: str) -> None:
        """Add the example of a member, unless it is too long and such are dropped.

        Raises:
            RowProblemError: what is wrong with it.
            PrefloopError: its messages cannot be rendered.
        """
        whole = {i: self._paths(i) for i in trajectory_ids_of(member)}
        if isinstance(member, Pair):
            _check_pair(member, whole)
        longest = max(len(path.token) for paths in whole.values() for path in paths)
        self.found.longest = max(self.found.longest, longest)
        if self.limit.max_length is not None and longest > self.limit.max_length:
            cut = {}
            if self.limit.truncate == "keep_start" or (self.limit.truncate == "stop" and self.skipping):
                # Also where nothing is to be cut: a prompt that leaves room for nothing is a bad row.
                cut = {i: _cut(paths, self.limit.max_length) for i, paths in whole.items()}
            if self.limit.truncate != "keep_start":
                self._too_long(name, longest)
                self.found.num_dropped += 1
                return
            whole = cut
            if isinstance(member, Pair):
                _check_sides(member, whole, f" in their first {self.limit.max_length} tokens")
            example = self._example(member, whole, name)
            self._too_long(name, longest)
            self.found.num_cut += 1
        else:
            example = self._example(member, whole, name)
        self.found.examples.append(example)
        for paths in whole.values():
            self.found.num_tokens += sum(len(path.token) for path in paths)
            self.found.num_own_tokens += sum(int(path.loss_mask.sum()) for path in paths)

    def check_lengths(self) -> None:
        """Raise the error of rows that are too long, where that stops."""
        found, limit = self.found, self.limit
        if limit.truncate == "stop" and found.too_long:
            listed = ", ".join(found.too_long[:3]) + (", …" if len(found.too_long) > 3 else "")
            raise PrefloopError(
                f"{found.num_dropped} of {found.num_rows} rows are longer than {limit.max_length} tokens: {listed}; "
                "--truncate drop leaves such rows out, --truncate keep_start cuts their ends off, or raise --max-length"
            )

    def _too_long(self, name: str, length: int) -> None:
        if len(self.found.too_long) < MAX_LISTED_ERRORS:
            self.found.too_long.append(f"{name} ({length} tokens)")

    def _paths(self, trajectory_id: str) -> Paths:
        if trajectory_id not in self.rendered:
            trajectory = self.corpus.trajectories[trajectory_id]
            try:
                _check_said(trajectory)
                tools = self.corpus.tasks[trajectory.task_id].tools
                plain = trajectory.extra.get(PLAIN_TEXT)
                self.rendered[trajectory_id] = (
                    (text_path(self.renderer, trajectory.messages[0].content),)
                    if plain
                    else trajectory_paths(self.renderer, trajectory, tools)
                )
            except PrefloopError as error:
                self.rendered[trajectory_id] = error
        found = self.rendered[trajectory_id]
        if isinstance(found, PrefloopError):
            raise found
        return found

    def _example(self, member: Member, paths: Mapping[str, Paths], name: str) -> Example:
        if not isinstance(member, Labelled) or member.desirable is not None:
            example = example_of(member, paths, name)
            if self.one_turn and has_several_turns(example):
                raise RowProblemError("", "several turns make no sense after another task's prompt: set --kl none")
            return example
        return self._stepped(member, paths[member.trajectory_id], name)

    def _stepped(self, member: Labelled, paths: Paths, name: str) -> Example:
        """A sample with the labels of its steps; those that were cut off are left out."""
        from prefloop.batch.stepped import stepped_samples

        trajectory, whole = self.corpus.trajectories[member.trajectory_id], self._paths(member.trajectory_id)
        merged = merge_step_labels(self.step_labels[i] for i in member.evidence).steps
        (sample,) = stepped_samples([trajectory], [whole], merged, self.finder)
        left = {_begin(path): index for index, path in enumerate(paths)}
        steps = [step._replace(path=left.get(_begin(whole[step.path]), -1)) for step in sample.steps]
        kept = tuple(step for step in steps if step.path >= 0 and step.token < len(paths[step.path].token))
        if not kept:
            raise RowProblemError("", f"no labelled step lies in its first {self.limit.max_length} tokens")
        return replace(sample, paths=paths, steps=kept, weight=member.weight, name=name)


def example_of(member: Member, paths: Mapping[str, Paths], name: str) -> Example:
    """The example of a pair, a demonstration or a labelled trajectory, given the paths of its trajectories."""
    from prefloop.batch.examples import Demonstration, LabelledSample, PreferencePair

    if isinstance(member, str):
        return Demonstration(paths[member], name=name)
    if isinstance(member, Labelled):
        return LabelledSample(paths[member.trajectory_id], bool(member.desirable), member.weight, name)
    assert not isinstance(member, Valued)  # rollouts are learned from in groups: `prefloop.stages.update_data`
    return PreferencePair(
        paths[member.chosen_id],
        paths[member.rejected_id],
        probability=member.probability,
        margin=member.margin,
        tied=member.tied,
        weight=member.weight,
        name=name,
    )


def text_path(renderer: ChatRenderer, text: str) -> TokenPath:
    """A plain text as a language model reads it: a start token, the text and the tokenizer's end token, no template.

    All but the start token enter the loss (the format "language modeling" of TRL).

    Raises:
        PrefloopError: the tokenizer has neither a start nor an end token.
    """
    start, _, _ = renderer.prompt_tokens(())
    own = [*renderer.encoder.encode(text).ids, *renderer.end_ids]
    source = [int(Source.TEMPLATE)] * len(start) + [int(Source.SAMPLED)] * len(own)
    message = [-1] * len(start) + [0] * len(own)
    return TokenPath(
        np.array([*start, *own], np.int32),
        np.array(source, np.uint8),
        np.array(message, np.int32),
        np.full(len(start) + len(own), np.nan, np.float32),
        renderer.tokenizer_hash,
        renderer.template_hash,
    )


def _check_said(trajectory: Trajectory) -> None:
    """Whether the assistant said anything at all."""
    turns = [trajectory.messages[i] for i in trajectory.own_turns]
    if not any(turn.content.strip() or turn.tool_calls or turn.reasoning_content.strip() for turn in turns):
        raise PrefloopError("the completion is empty: there is nothing to learn")


def _check_pair(pair: Pair, paths: Mapping[str, Paths]) -> None:
    if not math.isfinite(pair.margin):
        raise RowProblemError("", f"the margin {pair.margin} is not finite")
    _check_sides(pair, paths, " for this model")


def _check_sides(pair: Pair, paths: Mapping[str, Paths], where: str) -> None:
    if [p.token.tolist() for p in paths[pair.chosen_id]] == [p.token.tolist() for p in paths[pair.rejected_id]]:
        raise RowProblemError("", f"both sides are the same{where}: there is no preference to learn")


def _cut(paths: Paths, max_length: int) -> Paths:
    """Paths up to a length, each to its last sampled token within it; those without one are left out."""
    cut = [_cut_path(path, max_length) for path in paths]
    left = tuple(path for path in cut if path is not None)
    if not left:
        prompt = int(np.argmax(paths[0].loss_mask))
        raise RowProblemError(
            "", f"its prompt has {prompt} tokens: within {max_length} nothing of the completion is left"
        )
    return left


def _cut_path(path: TokenPath, max_length: int) -> TokenPath | None:
    own = np.flatnonzero(path.loss_mask[:max_length])
    if not len(own):
        return None
    end = int(own[-1]) + 1
    return replace(
        path, token=path.token[:end], source=path.source[:end], message=path.message[:end], logprob=path.logprob[:end]
    )


def _begin(path: TokenPath) -> int:
    """The message of a path's first sampled token, which no other path of its trajectory samples."""
    return int(path.message[int(np.argmax(path.loss_mask))])


def trajectory_ids_of(member: Member) -> Sequence[str]:
    """The trajectories that a member names, chosen before rejected."""
    if isinstance(member, Pair):
        return (member.chosen_id, member.rejected_id)
    return (member if isinstance(member, str) else member.trajectory_id,)
