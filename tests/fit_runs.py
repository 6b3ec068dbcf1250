"""Small models, rows and trainings for tests of `prefloop train OBJECTIVE`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefloop.config import parse_settings
from prefloop.records import JSONObject
from prefloop.stages.fit_settings import WHOLE, FitProgress, FitSettings, work_directory
from prefloop.stages.fitting import Fitted, fit
from prefloop.stages.initial import make_initial_model
from prefloop.store import Store

PEOPLE = ("Ann", "Bob", "Cy", "Dee", "Eve", "Fay", "Gus", "Hal")
THINGS = ("cat", "dog", "tree", "ball")


class Heard(FitProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self.evaluations: list[int] = []
        self.evaluated_by: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, done: int, metrics: Any) -> None:
        self.steps.append(done)

    def evaluated(self, step: int, metrics: Any, name: str = WHOLE) -> None:
        self.evaluations.append(step)
        self.evaluated_by.append(name)


def pair_rows(number: int = 24) -> list[JSONObject]:
    """Preferences: a plain sentence over one that hedges; every prompt differs."""
    rows: list[JSONObject] = []
    for i in range(number):
        who, what = PEOPLE[i % 8], THINGS[i // 8 % 4]
        prompt = f"Say something of {who} and {i} {what}s."
        rows.append({"prompt": prompt, "chosen": f"{who} has {i} {what}s.", "rejected": f"I do not know of {who}."})
    return rows


def chat_rows(number: int = 24) -> list[JSONObject]:
    """Demonstrations: the chosen sides."""
    return [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]}
        for r in pair_rows(number)
    ]


def labelled_rows(number: int = 24) -> list[JSONObject]:
    """Labelled completions: chosen sides of even rows, rejected sides of odd ones."""
    return [
        {"prompt": r["prompt"], "completion": r["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, r in enumerate(pair_rows(number))
    ]


def step_rows(number: int = 24) -> list[JSONObject]:
    """Answers in three labelled steps."""
    return [
        {
            "prompt": r["prompt"],
            "completions": ["Let us see.", r["chosen"], "I do not know."],
            "labels": [True, True, i % 3 > 0],
        }
        for i, r in enumerate(pair_rows(number))
    ]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_model(directory: Path, **shape: Any) -> Path:
    """A model of a few thousand weights whose tokenizer knows the rows."""
    rows = write_rows(directory / "words.jsonl", [*pair_rows(), *step_rows()])
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "max_length": 256, "vocab_size": 400, **shape}
    make_initial_model(directory / "tiny", rows, [f"{key}={value}" for key, value in shape.items()])
    return directory / "tiny"


def settings_of(objective: str, model: Path, **options: Any) -> FitSettings:
    """Settings of a short training."""
    short = {"learning_rate": 1e-2, "batch_size": 8, "num_threads": 1, "device": "cpu"}
    given = {"objective": objective, "model": str(model), **short, **options}
    given = {
        key: [str(file) for file in value] if key in ("data", "eval_data") else value for key, value in given.items()
    }
    return parse_settings(FitSettings, given, "test")


def train_rows(
    objective: str,
    model: Path,
    output: Path,
    rows: Iterable[Any] | None = None,
    *,
    progress: Any = None,
    **options: Any,
) -> Fitted:
    """Train on rows, written to a file beside the output, in the training's own store."""
    if rows is not None:
        options["data"] = [write_rows(output.with_suffix(".jsonl"), rows)]
    with Store(str(work_directory(output) / "prefloop.db")) as store:
        return fit(settings_of(objective, model, **options), store, output, progress)
