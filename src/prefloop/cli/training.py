"""`prefloop train`: the update of a run's iteration, and one command for each objective on stored data.

The options of an objective's command are the fields of the settings, so that a knob exists once; those of other
objectives are taken, too, so that the error can say whose they are.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter
from pydantic.fields import FieldInfo

from prefloop.cli.plumbing import (
    IgnoreMemoryOption,
    IterationOption,
    RunFile,
    SetOption,
    StoreOption,
    console,
    iteration_of,
    open_stage,
    training_store,
)
from prefloop.config import BY_RECIPE, apply_overrides, parse_settings, read_run_file
from prefloop.losses.registry import OBJECTIVES, Objective, objective
from prefloop.losses.settings import LossSettings
from prefloop.models.settings import LoraSettings
from prefloop.records import DivergedError, PrefloopError
from prefloop.stages.fit_settings import FitSettings, reads
from prefloop.training.recipes import learning_rate
from prefloop.training.settings import TrainingSettings

app = App(
    name="train",
    help="Update the policy on an iteration's dataset, guarded; or train an objective on data of your own.",
)

ROWS, MODEL, OBJECTIVE, TRAINING = (
    Group(name, sort_key=i) for i, name in enumerate(("Rows", "Model", "Objective", "Training"))
)
OF_MODEL = (
    "model",
    "reference",
    "chat_template",
    "num_heads",
    "num_adapters",
    "dtype",
    "quantization",
    "device",
    "seed",
    "num_threads",
)


@app.default
def update(
    file: RunFile,
    *,
    dataset: Annotated[str, Parameter(help="id (or its beginning) of a dataset of the store to train on instead")] = "",
    iteration: IterationOption = None,
    ignore_memory: IgnoreMemoryOption = False,
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Update the policy on an iteration's dataset, guarded; or train an objective on data of your own."""
    if file.name in OBJECTIVES and not file.exists():
        raise PrefloopError(
            f'{file.name} learns from fresh rollouts, not from rows: set algorithm = "{file.name}" in the table '
            "[train] of a run file, and `prefloop run` it"
        )
    given = read_run_file(file)
    if "objective" in given:
        if dataset or iteration is not None:
            raise PrefloopError(f"{file} is a training of its own: --iteration and --dataset are of run files")
        _fit_file(file, apply_overrides(given, overrides or []), store, ignore_memory=ignore_memory)
        return
    from prefloop.stages.curating import adopt_dataset
    from prefloop.stages.looking import find_dataset
    from prefloop.stages.start import start_policy
    from prefloop.stages.updating import train_stage

    with open_stage(file, store, overrides, ignore_memory=ignore_memory) as opened:
        start_policy(opened)
        number = iteration_of(opened, iteration, "train")
        if dataset:
            adopt_dataset(opened, number, find_dataset(opened.store, dataset))
        train_stage(opened, number)


def _fit_file(file: Path, given: dict[str, Any], store: str | None, *, ignore_memory: bool) -> None:
    """Train as a file says: the options of an objective's command as keys, and the table `lora`."""
    name, output = given.pop("objective"), given.pop("output", None)
    if not isinstance(name, str) or not isinstance(output, str | None):
        raise PrefloopError(f"{file}: objective and output should be texts")
    if output == "":
        raise PrefloopError(f"{file}: output is empty: name a new directory, or leave it out for runs/{name}")
    objective(name)
    try:
        _fit(name, Path(output) if output else None, store, given, str(file), ignore_memory=ignore_memory)
    except PrefloopError as error:
        raise PrefloopError(_in_keys(str(error))) from None


def _in_keys(error: str) -> str:
    """What an error calls options as the keys of a file."""

    def key(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        name = name.replace("lora_", "lora.") if name.removeprefix("lora_") in LoraSettings.model_fields else name
        return name if name.partition(".")[0] in {*FitSettings.model_fields, "output"} else option[0]

    return re.sub(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)", key, error)


def _fit(
    name: str,
    output: Path | None,
    store: str | None,
    options: dict[str, Any],
    source: str = "",
    *,
    ignore_memory: bool = False,
) -> None:
    """Train an objective on data of your own."""
    from prefloop.live import LiveTraining
    from prefloop.planning import check_fit
    from prefloop.stages.fit_data import files_of
    from prefloop.stages.fitting import fit

    settings = _settings(name, options, source or f"prefloop train {name}")
    output = output or Path("runs") / name
    files_of([*settings.data, *settings.eval_data])  # before a store is made
    with training_store(store, output, own=bool(settings.data)) as opened, LiveTraining(console) as progress:
        try:
            fitted = fit(settings, opened, output, progress, None if ignore_memory else check_fit)
        except DivergedError as error:  # the run that began stays, and has one recipe
            raise PrefloopError(f"{error}. With other settings give another --output than {output}") from None
        progress.finish(fitted, output)


def _settings(name: str, options: dict[str, Any], source: str) -> FitSettings:
    """The settings that options say; what was left out has its default."""
    given = {key: value for key, value in options.items() if value is not None}
    lora = {key: given.pop(f"lora_{key}") for key in LoraSettings.model_fields if f"lora_{key}" in given}
    if lora and "rank" not in lora:
        raise PrefloopError("--lora-alpha and --lora-seed are of an adapter: give --lora-rank, too")
    if lora and "lora" in given:  # of a file, whose keys of an adapter are in a table
        raise PrefloopError(f"{source}: lora_{next(iter(lora))} stands beside a table lora: set it there")
    if lora:
        given["lora"] = lora
    return parse_settings(FitSettings, {"objective": name, **given}, source)


# --- options from settings --------------------------------------------------------------------------------------


def _command(name: str, found: Objective) -> Callable[..., None]:
    """The command of an objective."""
    parameters = list(_parameters(name, found))

    def command(
        *, output: Path | None = None, store: str | None = None, ignore_memory: bool = False, **options: Any
    ) -> None:
        _fit(name, output, store, options, ignore_memory=ignore_memory)

    rows = "" if found.records in found.summary else f"; learns from {found.records}"
    command.__doc__ = f"{found.summary[0].upper()}{found.summary[1:]}{rows}."
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(name: str, found: Objective) -> Iterator[inspect.Parameter]:
    output_help = f"a new directory for the model; runs/{name} when left out"
    yield _parameter("output", Path | None, None, Parameter(name=["--output", "-o"], help=output_help, group=MODEL))
    store_help = "path or database URL of the store; OUTPUT.run/prefloop.db for files (else PREFLOOP_STORE)"
    yield _parameter("store", str | None, None, Parameter(name="--store", help=store_help, group=ROWS))
    ignore_help = "start even where memory seems too short"
    group = Parameter(name="--ignore-memory", negative=(), help=ignore_help, group=MODEL)
    yield _parameter("ignore_memory", bool, False, group)
    inherited = {*TrainingSettings.model_fields} - {"held_out"}
    for key, field in sorted(FitSettings.model_fields.items(), key=lambda item: item[0] in inherited):
        if key == "lora":
            yield from _lora_parameters()
        elif key in LossSettings.model_fields:
            yield _knob(key, field, found)
        elif key != "objective":
            yield _field(name, key, field, found)


def _lora_parameters() -> Iterator[inspect.Parameter]:
    said = {"rank": "train a LoRA adapter of this rank", "alpha": "updates are scaled by alpha / rank; twice the rank"}
    for key in LoraSettings.model_fields:
        text = said.get(key, "of the adapter's first weights")
        yield _parameter(f"lora_{key}", int | None, None, Parameter(help=text, group=MODEL))


def _knob(key: str, field: FieldInfo, found: Objective) -> inspect.Parameter:
    default = found.knobs.get(key)
    text = f"{field.description} (default {default})" if default not in (None, {}) else field.description
    return _parameter(key, field.annotation, None, Parameter(help=text, group=OBJECTIVE, show=key in found.knobs))


def _field(name: str, key: str, field: FieldInfo, found: Objective) -> inspect.Parameter:
    group = TRAINING if key in TrainingSettings.model_fields and key != "held_out" else ROWS
    group = MODEL if key in OF_MODEL else group
    text, annotation = field.description or "", field.annotation
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if field.json_schema_extra == BY_RECIPE:
        text, annotation, default = f"{text} ({_by_recipe(name, key)})", annotation | None, None  # type: ignore[assignment, operator]
    many = isinstance(default, list)
    parameter = Parameter(
        help=text, group=group, show=reads(name, key, has_reference=found.reference), show_default=_shown(default),
        consume_multiple=many, negative=() if many else None,
    )  # fmt: skip
    return _parameter(key, annotation, inspect.Parameter.empty if key == "model" else default, parameter)


def _by_recipe(name: str, key: str) -> str:
    """What a recipe says where an option is left out."""
    if key == "learning_rate":
        rates = [learning_rate(name, lora=lora) for lora in (False, True)]
        return f"default {rates[0]:g}, with LoRA {rates[1]:g}"
    usual = {"dtype": "bfloat16 below an adapter", "precision": "bfloat16", "gradient_checkpointing": "on"}
    others = {"gradient_checkpointing": "off"}
    return f"default on a GPU {usual[key]}, else {others.get(key, 'float32')}"


def _shown(default: Any) -> Callable[[Any], str] | bool | None:
    """How help shows a default: not where it is empty, and a text that does not print, such as a line end, escaped."""
    if isinstance(default, str) and not default.isprintable():
        return json.dumps
    return False if default in ("", []) else None


def _parameter(name: str, annotation: Any, default: Any, parameter: Parameter) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, parameter]
    )


for _name, _found in OBJECTIVES.items():
    if not _found.fresh:
        app.command(_command(_name, _found), name=_name)
