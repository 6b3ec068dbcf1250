"""Finding runs, datasets and checkpoints, and saying how far each run is."""

from __future__ import annotations

from collections import Counter

from rich.console import Group
from rich.table import Table
from sqlalchemy import RowMapping

from prefloop.records import Checkpoint, PrefloopError
from prefloop.stages.context import BEFORE, run_id
from prefloop.store import Store
from prefloop.training.model_card import Ancestor

ID_LENGTH = 12  # of an id as people see it


def find_run(store: Store, name: str) -> RowMapping:
    """The run of this name, or the newest.

    Raises:
        PrefloopError: there is none; the message lists those that are there.
    """
    runs = store.runs()
    if not runs:
        raise PrefloopError(f"there is no run in {store.location}: start one with `prefloop run RUN.toml`")
    if not name:
        return runs[-1]
    found = store.run(run_id(name))
    if found is None:
        known = ", ".join(run["name"] for run in runs)
        raise PrefloopError(f"there is no run {name!r} in {store.location}; it has {known}")
    return found


def find_dataset(store: Store, prefix: str) -> str:
    """The id of the dataset of pairs that begins so, or of the newest one.

    Raises:
        PrefloopError: there is none, or more than one.
    """
    found = [row for row in store.datasets() if row["id"].startswith(prefix) and row["num_members"]]
    datasets = found if prefix else [row for row in found if "of" not in row["recipe"]][-1:]
    if found and not datasets:
        ids = ", ".join(row["id"][:ID_LENGTH] for row in found)
        raise PrefloopError(
            f"{store.location} has no dataset of pairs that was curated; name one of the others by --dataset ID: {ids}"
        )
    if len(datasets) != 1:
        what = f"{len(datasets)} datasets that begin with {prefix!r}" if prefix else "no dataset of pairs"
        raise PrefloopError(f"{store.location} has {what}: see `prefloop status`; `prefloop curate` makes one")
    return str(datasets[0]["id"])


def find_checkpoint(store: Store, prefix: str) -> Checkpoint | None:
    """The checkpoint whose id begins so, or None.

    Raises:
        PrefloopError: more than one begins so.
    """
    found = [checkpoint for checkpoint in store.checkpoints() if checkpoint.id.startswith(prefix)]
    if len(found) > 1:
        raise PrefloopError(f"{len(found)} checkpoints begin with {prefix!r}: give more of the id")
    return found[0] if found else None


def ancestors(store: Store, checkpoint: Checkpoint) -> list[Ancestor]:
    """A checkpoint, its parent and so on, up to the model that nothing here made."""
    known, raters = {one.id: one for one in store.checkpoints()}, store.raters()
    found: list[Ancestor] = []
    one: Checkpoint | None = checkpoint
    while one is not None:
        run = store.run(one.run_id)
        judged = (store.event(one.run_id, one.iteration, "judge") or {}) if one.dataset_id else {}
        rater = raters.get(str(judged.get("rater_id")))
        judge = f"`{rater.name}` ({rater.kind.value}, `{rater.id}`)" if rater is not None else ""
        name = str(run["name"]) if run is not None and "iterations" in run["settings"] else ""
        iteration = one.iteration if name else BEFORE
        found.append(Ancestor(one.id, one.path, one.algorithm, iteration, one.dataset_id, name, judge))
        one = known.get(one.parent_id)
    return found


def status_table(store: Store) -> Group:
    """Tables of what the store holds and how far each run is."""
    counts = {name: number for name, number in store.counts().items() if number}
    held = Table("what", "rows", title=f"store {store.location}", title_justify="left")
    for name, number in counts.items():
        held.add_row(name.replace("_", " "), f"{number:,}")
    runs = Table("run", "iterations done", "last stage", title="runs", title_justify="left")
    runs.add_column("checkpoint", no_wrap=True, min_width=ID_LENGTH)  # to be copied whole from a narrow terminal too
    for run in store.runs():
        runs.add_row(run["name"], *_how_far(store, run))
    datasets = Table("dataset", "of", "members", "iteration", title="datasets", title_justify="left")
    for row in store.datasets():
        if row["num_members"]:
            iteration = "" if row["iteration"] < 0 else str(row["iteration"] + 1)
            datasets.add_row(row["id"][:ID_LENGTH], row["kind"], f"{row['num_members']:,}", iteration)
    return Group(held, *([runs] if runs.row_count else []), *([datasets] if datasets.row_count else []))


def _how_far(store: Store, run: RowMapping) -> tuple[str, str, str]:
    events = store.events(run["id"])
    kinds = Counter(event["kind"] for event in events)
    if kinds["finish"] or not events:
        last = "finished" if events else "–"
    else:
        newest = max(events, key=lambda event: event["created_at"])
        last = newest["kind"] if newest["iteration"] < 0 else f"{newest['kind']} of {newest['iteration'] + 1}"
    checkpoints = store.checkpoints(run_id=run["id"])
    newest_id = checkpoints[-1].id[:ID_LENGTH] if checkpoints else "–"
    # A training of stored data is a run of one update.
    return f"{kinds['train']} of {run['settings'].get('iterations', 1)}", last, newest_id
