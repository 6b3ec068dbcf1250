"""`prefloop init-model`: a tiny model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from prefloop.config import apply_overrides, parse_settings
from prefloop.environments.booking import Booking
from prefloop.models.settings import InitialModelSettings
from prefloop.records import JSONObject, Message, PrefloopError, Split
from prefloop.store import Store

NUM_CONVERSATIONS = 2000


def make_initial_model(
    output: Path, data: Path | None, overrides: list[str], dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[int, int]:
    """Write a model with random weights to a new directory; returns (number of parameters, of tokens).

    The tokenizer is trained on the conversations in `data` (any format that `prefloop import` reads), or on
    demonstrations of the booking task.

    Raises:
        PrefloopError: the directory is there already, an unknown setting, or no conversations.
    """
    import torch

    from prefloop.models.initial import initial_model, train_tokenizer
    from prefloop.models.load import Policy
    from prefloop.training.checkpoint import save_atomically

    if output.exists():
        raise PrefloopError(f"{output} exists already: name a new directory")
    settings = parse_settings(InitialModelSettings, apply_overrides({}, overrides), "--set")
    conversations = _booking() if data is None else _of_file(data)
    tokenizer = train_tokenizer(conversations, settings.vocab_size)
    model = initial_model(tokenizer, settings, getattr(torch, dtype))
    output.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(output, Policy(model, tokenizer).save)
    return sum(parameter.numel() for parameter in model.parameters()), len(tokenizer)


def _booking() -> list[tuple[tuple[Message, ...], tuple[JSONObject, ...]]]:
    environment = Booking()
    tasks = environment.tasks(Split.TRAIN, NUM_CONVERSATIONS)
    return [(environment.demonstrate(task, 0)[0], task.tools) for task in tasks]


def _of_file(path: Path) -> list[tuple[tuple[Message, ...], tuple[JSONObject, ...]]]:
    from prefloop.formats import import_file

    with Store(":memory:") as store:
        import_file(store, path)
        tasks = store.tasks()
        return [(t.messages, tasks[t.task_id].tools) for t in store.trajectories()]
