"""The command line: thin commands; what they need is imported when they run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from prefloop import __version__
from prefloop.cli.plumbing import (
    IgnoreMemoryOption,
    IterationOption,
    RunFile,
    SetOption,
    StoreOption,
    TerminatedError,
    console,
    described_run,
    iteration_of,
    location_of,
    open_stage,
    open_store,
    shown_progress,
)
from prefloop.records import PrefloopError, counted

if TYPE_CHECKING:
    from prefloop.hub import DataFile
    from prefloop.store import Store

NUM_NAMED = 3  # of many

app = App(
    name="prefloop",
    suppress_keyboard_interrupt=False,  # `main` says what to do
    version=__version__,
    help="Preference learning for language-model agents: roll out, judge, curate, train, prove it is better.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error is one line on standard error and exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library to another: no user can act on it
    try:
        _check_objective(sys.argv[1:] if arguments is None else arguments)
        app(arguments, result_action="return_value", exit_on_error=True)
    except PrefloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'operating system'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, TerminatedError) else signal.SIGINT)
    return 0


def _check_objective(arguments: Sequence[str]) -> None:
    """Whether the word after `train`, where it can be nothing else, is an objective: a parser blames its options."""
    if (
        len(arguments) > 1
        and arguments[0] == "train"
        and arguments[1].isidentifier()
        and not Path(arguments[1]).exists()
    ):
        from prefloop.losses.registry import objective

        objective(arguments[1])


# --- the loop and its stages ------------------------------------------------------------------------------------


app.command("prefloop.cli.planning:plan", name="plan", help="Say what a run needs, before it starts.")
app.command("prefloop.cli.advising:advise", name="advise", help="Say which objective fits what the store holds.")


@app.command
def run(
    file: RunFile, *, ignore_memory: IgnoreMemoryOption = False, store: StoreOption = None, overrides: SetOption = None
) -> None:
    """Run the whole loop of a run file, or go on with it where it was killed."""
    from prefloop.loop import run_loop
    from prefloop.planning import check_memory
    from prefloop.report import final_table

    with described_run(file, store, overrides) as opened:
        finished_before = opened.found(opened.settings.iterations, "finish") is not None
        if not (ignore_memory or finished_before):
            check_memory(opened)
        with shown_progress(opened):
            finished = run_loop(opened)
        console.print(final_table(opened.store, opened.id))
        if not finished:
            console.print(
                f"{counted(opened.current_iteration(), 'iteration')} of {opened.settings.iterations} done; the next "
                f"episodes are your agents': `prefloop gateway {file}`, then `prefloop run {file}` again",
                highlight=False,
                soft_wrap=True,
            )
        if finished_before:
            console.print(f"[dim]run {opened.settings.name} was finished before; give it a new name to run again[/dim]")
        _write_report(opened.store, opened.id, opened.directory / "report.html")


@app.command
def rollout(
    file: RunFile,
    *,
    iteration: IterationOption = None,
    ignore_memory: IgnoreMemoryOption = False,
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Roll out the current policy; makes the start policy first where there is none."""
    from prefloop.stages.rollouts import rollout_stage
    from prefloop.stages.start import start_policy

    with open_stage(file, store, overrides, ignore_memory=ignore_memory) as opened:
        number = iteration_of(opened, iteration, "rollout")
        start_policy(opened)
        rollout_stage(opened, number)


@app.command
def judge(
    file: RunFile, *, iteration: IterationOption = None, store: StoreOption = None, overrides: SetOption = None
) -> None:
    """Score an iteration's rollouts with the frozen judge; with rollout.redraws, draw other tasks for flat ones."""
    from prefloop.stages.judging import judge_stage
    from prefloop.stages.redrawing import redraw_stage

    with open_stage(file, store, overrides) as opened:
        number = iteration_of(opened, iteration, "judge")
        judge_stage(opened, number)
        redraw_stage(opened, number)


@app.command
def value(
    file: Annotated[Path | None, Parameter(help="the run file; without one, the store's labels are frozen")] = None,
    *,
    rater: Annotated[
        list[str] | None, Parameter(help="without a run file: id or name of a rater whose labels count", negative=())
    ] = None,
    agree_with: Annotated[str, Parameter(help="without a run file: only steps of which this rater says the same")] = "",
    iteration: IterationOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Estimate what each step of an iteration's rollouts is worth, and freeze labels of steps as a dataset."""
    from prefloop.stages.valuing import freeze_store_steps, value_stage

    if file is None:
        if iteration is not None or overrides:
            raise PrefloopError("--iteration and --set are of a run: name its run file")
        with open_store(store) as opened_store:
            dataset, merged = freeze_store_steps(opened_store, rater or (), agree_with)
        _print_steps(dataset.id, sum(map(len, merged.steps.values())), merged.num_not_agreed, merged.conflicts)
        return
    if rater or agree_with:
        raise PrefloopError("--rater and --agree-with are of a whole store; in a run file the key value.agree says it")
    with open_stage(file, store, overrides) as opened:
        number = iteration_of(opened, iteration, "value")
        value_stage(opened, number)
        found = opened.found(number, "value") or {}
        _print_steps(found["dataset_id"], found["num_kept"], found["num_steps"] - found["num_kept"])


@app.command
def curate(
    file: Annotated[Path | None, Parameter(help="the run file; without one, all of the store is curated")] = None,
    *,
    rater: Annotated[str, Parameter(help="without a run file: id or name of the rater whose scores count")] = "",
    iteration: IterationOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Keep the best trajectories and freeze preference pairs as a dataset."""
    from prefloop.stages.curating import curate_stage, curate_store

    if file is None:
        with open_store(store) as opened_store:
            _print_curated(curate_store(opened_store, rater, overrides or []))
        return
    with open_stage(file, store, overrides) as opened:
        number = iteration_of(opened, iteration, "curate")
        curate_stage(opened, number)
        _print_curated(opened.found(number, "curate") or {})


app.command(
    "prefloop.cli.training:app", name="train", help="Update a run's policy, or train an objective on data of your own."
)


app.command("prefloop.cli.gateway:gateway", name="gateway", help="Serve the policy to agents; their runs are recorded.")


@app.command
def evaluate(
    file: RunFile, *, ignore_memory: IgnoreMemoryOption = False, store: StoreOption = None, overrides: SetOption = None
) -> None:
    """Evaluate the start policy and the current one on the held-out tasks."""
    from prefloop.stages.context import BEFORE
    from prefloop.stages.evaluating import evaluate_stage
    from prefloop.stages.start import start_policy

    with open_stage(file, store, overrides, ignore_memory=ignore_memory) as opened:
        evaluate_stage(opened, BEFORE, start_policy(opened))
        done = opened.current_iteration()
        if done:
            evaluate_stage(opened, done, opened.checkpoint_before(done))


# --- people -----------------------------------------------------------------------------------------------------


@app.command
def annotate(
    *,
    run: Annotated[str, Parameter(help="name of the run whose rollouts are compared; all when left out")] = "",
    rater: Annotated[str, Parameter(help="who votes")] = "me",
    judge: Annotated[str, Parameter(help="id or name of the judge whose scores say what is uncertain")] = "",
    port: int = 8123,
    store: StoreOption = None,
) -> None:
    """Open a local page on which a person compares pairs of trajectories."""
    from prefloop.feedback.queue import QueueSettings
    from prefloop.stages.looking import find_run
    from prefloop.web.app import serve

    with open_store(store) as opened:
        settings = QueueSettings(run_id=find_run(opened, run)["id"] if run else "", judge=judge)
        serve(opened, settings, rater, port=port, announce=console.print)


# --- looking ----------------------------------------------------------------------------------------------------


@app.command
def report(
    run: Annotated[str, Parameter(help="name of the run; the newest when left out")] = "",
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="where to write it")] = None,
    store: StoreOption = None,
) -> None:
    """Write the HTML report of a run."""
    from prefloop.stages.looking import find_run

    with open_store(store) as opened:
        found = find_run(opened, run)
        if "objective" in found["settings"]:
            raise PrefloopError(
                f"{found['name']} is a training of stored rows; what is to be said is in {found['name']}/README.md"
            )
        _write_report(opened, found["id"], output or Path(found["directory"]) / "report.html")


@app.command
def status(*, store: StoreOption = None) -> None:
    """Say what the store holds and how far each run is."""
    from prefloop.stages.looking import status_table

    with open_store(store) as opened:
        console.print(status_table(opened))


@app.command
def chat(
    checkpoint: Annotated[str, Parameter(help="a checkpoint's id (or its beginning), or a model by path or hub id")],
    *,
    temperature: float = 0.0,
    store: StoreOption = None,
) -> None:
    """Talk to a checkpoint, with the tools of its environment if that has some."""
    from prefloop.stages.talking import talk

    with open_store(store, must_exist=not Path(checkpoint).exists()) as opened:
        talk(opened, checkpoint, temperature, console)


@app.command
def doctor(
    *,
    model: Annotated[
        str, Parameter(help="check that the chat template of this model works: a path, or a hub id (@revision)")
    ] = "",
    store: StoreOption = None,
    overrides: Annotated[
        list[str] | None,
        Parameter(name="--set", negative=(), help="how the model speaks: --set policy.tool_format=hermes"),
    ] = None,
) -> int:
    """Say what is installed, which devices, extras, keys and templates work, and whether the store is whole."""
    from prefloop.config import apply_overrides, parse_settings
    from prefloop.doctor import examine
    from prefloop.models.settings import PolicySettings

    given = apply_overrides({"policy": {"model": model, "dtype": "float32"}} if model else {}, overrides or [])
    if given.keys() - {"policy"}:
        raise PrefloopError(f"--set {min(given.keys() - {'policy'})}: doctor looks at keys of policy alone")
    policy = parse_settings(PolicySettings, given["policy"], "prefloop doctor: policy") if given else None
    healthy = examine(location_of(store), policy, console)
    if not healthy:
        raise PrefloopError("not all is well: see the lines marked ✗")
    return 0


# --- data in and out --------------------------------------------------------------------------------------------


@app.command(name="import")
def import_(
    data: Annotated[
        str,
        Parameter(help="JSON Lines, a JSON list or Parquet, plain or gzipped; of a hub org/name@revision:split"),
    ],
    *,
    format: Annotated[  # noqa: A002
        str, Parameter(help="trl, openai-chat, tau-bench, tool-calls, or auto: by the first good row")
    ] = "auto",
    on_error: Annotated[Literal["stop", "skip"], Parameter(help="what to do with a bad row")] = "stop",
    held_out: Annotated[float, Parameter(help="share of the prompts that become held-out tasks")] = 0.0,
    store: StoreOption = None,
) -> None:
    """Read trajectories, preferences and labels from a file into the store."""
    from prefloop.hub import data_files

    files = data_files(data)  # before a store is made
    if held_out == 1:
        raise PrefloopError("held_out is 1: expected a share of the prompts below 1, or nothing is left to train on")
    with open_store(store, must_exist=False) as opened:
        for file in files:
            _import(opened, file, format=format, on_error=on_error, held_out=held_out)


def _import(store: Store, file: DataFile, **options: Any) -> None:
    from prefloop.formats import import_file

    done = import_file(store, file.path, called=file.name, **options)
    for error in done.errors:
        console.print(f"[yellow]skipped[/yellow] {error}", highlight=False, soft_wrap=True)
    console.print(
        f"{done.file} ({done.format}): {counted(done.num_rows, 'row')}, {done.num_skipped} skipped; "
        f"new: {done.num_tasks} tasks, {done.num_trajectories} trajectories, {done.num_judgements} judgements, "
        f"{done.num_comparisons} comparisons, {done.num_step_labels} step labels; {done.num_known} known before",
        highlight=False,
        soft_wrap=True,
    )


@app.command
def export(
    what: Annotated[
        str, Parameter(help="a .jsonl or .parquet file to write a dataset to; or a checkpoint's id or directory")
    ],
    *,
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], help="of a checkpoint: a new directory; exports/NAME when left out"),
    ] = None,
    merge: Annotated[
        bool, Parameter(negative=(), help="of a checkpoint: merge its adapter into the model below it")
    ] = False,
    dataset: Annotated[str, Parameter(help="id of the dataset (or its beginning); the newest when left out")] = "",
    format: Annotated[  # noqa: A002
        Literal["trl-preference", "trl-unpaired", "openai-chat"] | None,
        Parameter(help="what a dataset's rows look like; trl-preference when left out"),
    ] = None,
    force: Annotated[bool, Parameter(negative=(), help="overwrite the file")] = False,
    store: StoreOption = None,
) -> None:
    """Write a frozen dataset in a format that other tools read, or a checkpoint as a directory with its card."""
    from prefloop.formats.exporting import SUFFIXES, TRL_PREFERENCE, export_dataset
    from prefloop.stages.looking import find_dataset

    if not what.endswith(SUFFIXES):
        if Path(what).suffix[1:].isalpha() and not Path(what).exists():
            raise PrefloopError(f"{what} should end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        if dataset or format or force:
            endings = ", ".join(SUFFIXES)
            raise PrefloopError(f"{what} does not end in {endings}: --dataset, --format and --force are of such files")
        _export_model(what, output, merge, location_of(store))
        return
    if merge or output is not None:
        raise PrefloopError(f"{what} is a file of rows: --merge and --output are of checkpoints")
    with open_store(store) as opened:
        found = find_dataset(opened, dataset)
        num_rows = export_dataset(opened, found, Path(what), format=format or TRL_PREFERENCE, force=force)
    console.print(f"{counted(num_rows, 'row')} → {what}", highlight=False)


def _export_model(name: str, output: Path | None, merge: bool, location: str) -> None:
    from prefloop.stages.publishing import found_model, write_model

    with found_model(name, location) as found:
        directory = output or Path("exports") / found.label
        write_model(found, directory, merge=merge)
    console.print(f"{name}{', merged' if merge else ''} → {directory}", highlight=False, soft_wrap=True)


@app.command
def push(
    checkpoint: Annotated[str, Parameter(help="a checkpoint's id (or its beginning), or its directory")],
    repository: Annotated[str, Parameter(help="OWNER/NAME on the hub; made where there is none")],
    *,
    merge: Annotated[bool, Parameter(negative=(), help="merge its adapter into the model below it")] = False,
    private: Annotated[bool, Parameter(negative=(), help="a repository that is made is private")] = False,
    revision: Annotated[str, Parameter(help="the branch; main when left out")] = "",
    store: StoreOption = None,
) -> None:
    """Put a checkpoint with its card into a repository of the hub."""
    from prefloop.stages.publishing import found_model, push_model

    with found_model(checkpoint, location_of(store)) as found:
        url = push_model(found, repository, merge=merge, private=private, revision=revision)
    console.print(f"{checkpoint} → {url}", highlight=False, soft_wrap=True)


@app.command
def init_model(
    output: Annotated[Path, Parameter(help="a new directory, in Hugging Face's layout")],
    *,
    data: Annotated[
        Path | None, Parameter(help="conversations for the tokenizer; the booking task when absent")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], Parameter(help="of the weights")] = "float32",
    overrides: Annotated[
        list[str] | None, Parameter(name="--set", negative=(), help="shape of the model: --set hidden_size=128")
    ] = None,
) -> None:
    """Make a tiny model with random weights, its tokenizer and chat template, from nothing."""
    from prefloop.stages.initial import make_initial_model

    num_parameters, vocabulary = make_initial_model(output, data, overrides or [], dtype)
    console.print(f"{output}: {num_parameters:,} parameters, {vocabulary} tokens", highlight=False)


def _print_steps(dataset_id: str, num_kept: int, num_not_agreed: int, conflicts: Sequence[str] = ()) -> None:
    console.print(
        f"dataset {dataset_id}: {num_kept} labelled steps; {num_not_agreed} left out because nobody agrees",
        highlight=False,
        soft_wrap=True,
    )
    if conflicts:
        named = "; ".join(conflicts[:NUM_NAMED]) + ("; …" if len(conflicts) > NUM_NAMED else "")
        console.print(f"raters contradict each other on {len(conflicts)} of them: {named}", highlight=False)


def _print_curated(detail: dict[str, Any]) -> None:
    """Pairs from how many tasks, how many trajectories took part in the selection, and why others did not."""
    num_tasks, num_without = detail["num_tasks"], detail["num_tasks_without_pair"]
    lines = [
        f"dataset {detail['dataset_id']}: {counted(detail['num_pairs'], 'pair')} from {num_tasks - num_without:,} of "
        f"{counted(num_tasks, 'task')}"
    ]
    if "num_unscored" in detail:  # a dataset of the store that a run took over says no more
        num_all = sum(detail[f"num_{kind}"] for kind in ("scored", "unscored", "duplicates"))
        lines.append(
            f"trajectories: {num_all:,}, of them {detail['num_scored']:,} scored; left out: {detail['num_unscored']:,} "
            f"without a score, {detail['num_duplicates']:,} that say the same as another"
        )
        lines.append(
            f"tasks without a pair: {num_without:,}; pairs left out: {detail['num_unconfirmed']:,} not confirmed, "
            f"{detail['num_contradicted']:,} contradicted by votes"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _write_report(store: Store, run_id: str, path: Path) -> None:
    from prefloop.report import write_report

    console.print(f"report: {write_report(store, run_id, path)}", highlight=False, soft_wrap=True)
