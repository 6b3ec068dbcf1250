"""Completions dealt to other prompts, on which KTO estimates its reference point."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from prefloop.batch.examples import Demonstration, Example
from prefloop.records import PrefloopError, TokenPath

log = logging.getLogger(__name__)


def deranged(examples: Sequence[Example], seed: Sequence[int]) -> list[Demonstration]:
    """Each prompt with the completion of another row, no row with its own: a random derangement.

    The rows are shuffled, those of one prompt put side by side, and each is dealt the completion that lies as many
    places on as the most frequent prompt has rows. So nobody is dealt a completion of its own prompt, unless one prompt
    has more than half of the rows; then as few are as there can be. Where prompts differ, every other row is equally
    likely. It is drawn over the rows in the order of their tokens, so that the order in which a step has them changes
    nothing.

    Raises:
        PrefloopError: fewer than two rows, or rows of several turns, whose completions answer their own tools.
    """
    _check(examples)
    rows = sorted(examples, key=_content)
    prompts = [prompt_of(row) for row in rows]
    drawn = np.random.default_rng(seed).permutation(len(rows)).tolist()
    first = {prompts[i]: place for place, i in reversed([*enumerate(drawn)])}
    grouped = sorted(drawn, key=lambda i: first[prompts[i]])
    most = max(Counter(prompts).values())
    if most == len(rows):
        log.warning("kto: all %d rows of a step have one prompt: each is dealt another completion of it", most)
    shift = most % len(rows) or 1
    dealt_to = dict(zip(grouped, grouped[shift:] + grouped[:shift], strict=True))
    return [_dealt(row, rows[dealt_to[i]]) for i, row in enumerate(rows)]


def prompt_of(example: Example) -> bytes:
    """What tells rows of different prompts apart: the tokens before the first that the policy said."""
    path = example.samples[0][0]
    return path.token[: int(np.argmax(path.loss_mask))].tobytes()


def _content(example: Example) -> tuple[bytes, bytes]:
    path = example.samples[0][0]
    return path.token.tobytes(), path.source.tobytes()


def rotated(examples: Sequence[Example], seed: Sequence[int]) -> list[Demonstration]:
    """Each prompt with the completion of the row before it, as TRL does; the seed is not used.

    Raises:
        PrefloopError: as `deranged`.
    """
    _check(examples)
    return [_dealt(examples[i], examples[i - 1]) for i in range(len(examples))]


def _check(examples: Sequence[Example]) -> None:
    if len(examples) < 2:
        raise PrefloopError("kto estimates its KL term on completions of other rows: a step needs at least 2 rows")
    for i, example in enumerate(examples):
        if has_several_turns(example):
            raise PrefloopError(
                f"row {example.name or i}: a trajectory of several turns makes no sense after another task's prompt; "
                'set kl to "samples" (fresh ones of the policy) or "none"'
            )


def has_several_turns(example: Example) -> bool:
    """Whether something lies between the policy's own tokens, such as an answer of a tool or of a user."""
    paths = example.samples[0]
    sampled = paths[0].loss_mask
    return len(paths) > 1 or not bool(sampled[int(np.argmax(sampled)) :].all())


def _dealt(prompt_of: Example, completion_of: Example) -> Demonstration:
    prompt, completion = prompt_of.samples[0][0], completion_of.samples[0][0]
    start, begin = int(np.argmax(prompt.loss_mask)), int(np.argmax(completion.loss_mask))
    token = np.concatenate([prompt.token[:start], completion.token[begin:]])
    source = np.concatenate([prompt.source[:start], completion.source[begin:]])
    message = np.full(len(token), -1, dtype=np.int32)
    unknown = np.full(len(token), np.nan, dtype=np.float32)
    return Demonstration((TokenPath(token, source, message, unknown),), name=prompt_of.name)
