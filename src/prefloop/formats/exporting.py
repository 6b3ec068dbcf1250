"""Exporting pairs and trajectories, labelled or not, as JSON Lines or Parquet that TRL and others load unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefloop.formats.atomic import whole_file
from prefloop.formats.parquet import write_parquet
from prefloop.formats.rows import shared_beginning
from prefloop.records import (
    Dataset,
    JSONObject,
    Labelled,
    Message,
    Pair,
    PrefloopError,
    Role,
    Task,
    Thread,
    ToolCall,
    Trajectory,
    canonical_json,
)
from prefloop.store import Store

CHUNK = 500
SUFFIXES = (".jsonl", ".json", ".parquet")
TRL_PREFERENCE, TRL_UNPAIRED, OPENAI_CHAT = "trl-preference", "trl-unpaired", "openai-chat"

Rows = Callable[[], Iterator[JSONObject]]


def export_dataset(
    store: Store,
    dataset: str | Dataset | Sequence[Pair],
    path: str | Path,
    *,
    format: str = TRL_PREFERENCE,  # noqa: A002  (the name that users type)
    force: bool = False,
) -> int:
    """Write a frozen dataset (or its id, or pairs) to a `.parquet`, `.jsonl` or `.json` (also lines) file.

    `trl-preference`: conversational rows with an explicit prompt, which is the shared beginning of both sides;
    `trl-unpaired`: two labelled rows a pair, one a labelled trajectory; `openai-chat`: one chat a trajectory (of pairs,
    the chosen ones). What a format has no column for, such as weights and probabilities, is not written.
    Arguments of tool calls and the `tools` column are JSON texts: as objects, Arrow would fill the keys of one call
    into all others with nulls. Returns the number of rows.

    Raises:
        PrefloopError: the dataset is empty or not in the store, its members cannot be of this format, a trajectory was
            erased, both sides of a pair are the same, the file exists and `force` is off, or it cannot be written.
    """
    found = store.dataset(dataset) if isinstance(dataset, str) else dataset
    held = found if isinstance(found, Dataset) else Dataset({}, tuple(found))
    if held.pairs:
        rows = _pair_rows(store, held.pairs, format)
    elif held.labelled:
        _check_labelled(held.labelled, format)
        rows = _labelled_rows(store, held.labelled)
    else:
        if format != OPENAI_CHAT and held.trajectory_ids:
            raise PrefloopError(f"the dataset holds no pairs, so it cannot be {format}: use the format {OPENAI_CHAT}")
        rows = _chat_rows(store, held.trajectory_ids)
    return _write(rows, Path(path), force)


def _check_labelled(labelled: Sequence[Labelled], format_name: str) -> None:
    """Which format says what the labels say."""
    if any(each.desirable is None for each in labelled):
        raise PrefloopError(f"the dataset holds labels of steps, so it cannot be {format_name}, nor another format")
    if format_name != TRL_UNPAIRED:
        raise PrefloopError(
            f"the dataset holds labelled trajectories, so it cannot be {format_name}: use the format {TRL_UNPAIRED}"
        )


def export_trajectories(store: Store, ids: Iterable[str], path: str | Path, *, force: bool = False) -> int:
    """Write trajectories as OpenAI chats (`messages`, `tools`); returns how many.

    Raises:
        PrefloopError: there are none, one is not in the store, or the file cannot be written.
    """
    return _write(_chat_rows(store, tuple(ids)), Path(path), force)


def _write(rows: Rows, path: Path, force: bool) -> int:
    if path.suffix not in SUFFIXES:
        raise PrefloopError(f"{path} should end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    with whole_file(path, force=force) as temporary:
        write = write_parquet if path.suffix == ".parquet" else _write_lines
        num_rows = write(rows, temporary)
        if num_rows == 0:
            raise PrefloopError("there is nothing to export: the selection is empty")
    return num_rows


def _write_lines(rows: Rows, path: Path) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows():
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            num_rows += 1
    return num_rows


def _chat_rows(store: Store, ids: Sequence[str]) -> Rows:
    def rows() -> Iterator[JSONObject]:
        for start in range(0, len(ids), CHUNK):
            wanted = ids[start : start + CHUNK]
            found, tasks = _load(store, wanted)
            for trajectory_id in wanted:
                trajectory = found[trajectory_id]
                for thread in trajectory.conversations(tasks[trajectory.task_id].tools):
                    yield {"messages": _messages(trajectory.messages[thread.start : thread.stop]), **_tools(thread)}

    return rows


def _labelled_rows(store: Store, labelled: Sequence[Labelled]) -> Rows:
    def rows() -> Iterator[JSONObject]:
        for start in range(0, len(labelled), CHUNK):
            chunk = labelled[start : start + CHUNK]
            found, tasks = _load(store, [each.trajectory_id for each in chunk])
            for each in chunk:
                trajectory = found[each.trajectory_id]
                thread = _only_thread(trajectory, tasks[trajectory.task_id])
                yield {
                    "prompt": _messages(trajectory.messages[: trajectory.num_prompt_messages]),
                    "completion": _messages(trajectory.completion),
                    "label": each.desirable,
                    **_tools(thread),
                }

    return rows


def _pair_rows(store: Store, pairs: Sequence[Pair], format_name: str) -> Rows:
    makers = {TRL_PREFERENCE: _preference, TRL_UNPAIRED: _unpaired}
    if format_name == OPENAI_CHAT:
        return _chat_rows(store, tuple(dict.fromkeys(pair.chosen_id for pair in pairs)))
    if format_name not in makers:
        raise PrefloopError(f"format {format_name!r} is not one of {', '.join((*makers, OPENAI_CHAT))}")
    make = makers[format_name]

    def rows() -> Iterator[JSONObject]:
        for start in range(0, len(pairs), CHUNK):
            chunk = pairs[start : start + CHUNK]
            found, tasks = _load(store, [i for pair in chunk for i in (pair.chosen_id, pair.rejected_id)])
            for pair in chunk:
                chosen, rejected = found[pair.chosen_id], found[pair.rejected_id]
                thread, _ = (_only_thread(side, tasks[side.task_id]) for side in (chosen, rejected))
                yield from make(chosen, rejected, _tools(thread))

    return rows


def _load(store: Store, ids: Sequence[str]) -> tuple[dict[str, Trajectory], dict[str, Task]]:
    found = {trajectory.id: trajectory for trajectory in store.trajectories(dict.fromkeys(ids))}
    if missing := [i for i in ids if i not in found]:
        raise PrefloopError(f"trajectory {missing[0]} is not in {store.location} (or was erased): curate again")
    return found, store.tasks({trajectory.task_id for trajectory in found.values()})


def _preference(chosen: Trajectory, rejected: Trajectory, tools: JSONObject) -> Iterator[JSONObject]:
    start = prompt_length(chosen, rejected)
    yield {
        "prompt": _messages(chosen.messages[:start]),
        "chosen": _messages(chosen.messages[start:]),
        "rejected": _messages(rejected.messages[start:]),
        **tools,
    }


def _unpaired(chosen: Trajectory, rejected: Trajectory, tools: JSONObject) -> Iterator[JSONObject]:
    start = prompt_length(chosen, rejected)
    for trajectory in (chosen, rejected):
        yield {
            "prompt": _messages(chosen.messages[:start]),
            "completion": _messages(trajectory.messages[start:]),
            "label": trajectory is chosen,
            **tools,
        }


def prompt_length(chosen: Trajectory, rejected: Trajectory) -> int:
    """The number of messages in the shared beginning of a pair; at least one message is left on each side.

    Raises:
        PrefloopError: both are the same, they are of two tasks, or they share no message.
    """
    if chosen.messages == rejected.messages:
        raise PrefloopError(f"trajectories {chosen.id} and {rejected.id} say the same: a pair of them teaches nothing")
    if chosen.task_id != rejected.task_id:
        raise PrefloopError(f"trajectories {chosen.id} and {rejected.id} belong to different tasks: curate again")
    shared = shared_beginning(chosen.messages, rejected.messages)
    shared = min(shared, len(chosen.messages) - 1, len(rejected.messages) - 1)
    if shared == 0:
        raise PrefloopError(f"trajectories {chosen.id} and {rejected.id} share no message: such pairs have no prompt")
    return shared


def _only_thread(trajectory: Trajectory, task: Task) -> Thread:
    """The one conversation of a trajectory, which is all that a row of TRL can hold."""
    threads = trajectory.conversations(task.tools)
    if len(threads) > 1:
        raise PrefloopError(
            f"trajectory {trajectory.id} holds {len(threads)} conversations of an agent, and a row of TRL only one: "
            f"export it as {OPENAI_CHAT}, which gives each a row, or train on it here"
        )
    return threads[0]


def _tools(thread: Thread) -> JSONObject:
    return {"tools": canonical_json(list(thread.tools))} if thread.tools else {}


def _messages(messages: Sequence[Message]) -> list[JSONObject]:
    return [_message(message) for message in messages]


def _message(message: Message) -> JSONObject:
    raw = message.to_dict()
    if message.role is Role.ASSISTANT and message.tool_calls:
        raw["tool_calls"] = [_call(call) for call in message.tool_calls]
    return raw


def _call(call: ToolCall) -> JSONObject:
    raw: dict[str, Any] = call.to_dict()
    if not isinstance(call.arguments, str):
        raw["function"]["arguments"] = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    return raw
