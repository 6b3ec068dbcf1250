"""Checkpoints for others: as a directory with its card, an adapter merged into its model, or on a hub."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefloop.config import parse_settings
from prefloop.hub import check_repository, fetch_model, model_name, pinned_model, readable, upload
from prefloop.losses.registry import resolve_knobs
from prefloop.records import Checkpoint, JSONObject, PrefloopError
from prefloop.stages.context import BEFORE
from prefloop.stages.fit_settings import work_directory
from prefloop.stages.looking import ancestors, find_checkpoint
from prefloop.stages.selecting import sha256_of
from prefloop.stages.start import SERVED
from prefloop.store import Store
from prefloop.training.checkpoint import MANIFEST, save_atomically, verify
from prefloop.training.model_card import CARD, bare_card, model_card, run_card
from prefloop.training.settings import UpdateSettings

FIRST = 0  # the iteration of a training that is no run's


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint by its id, directory or hub id: where its files lie, and the store's row where there is one."""

    name: str
    directory: Path
    checkpoint: Checkpoint | None = None
    store: Store | None = None

    @property
    def label(self) -> str:
        """A name for a directory."""
        return Path(self.checkpoint.path if self.checkpoint is not None else self.name).name


@contextlib.contextmanager
def found_model(name: str, location: str) -> Iterator[Found]:
    """A checkpoint of the store at `location` or of the training's own beside it, or a model of no store.

    Raises:
        PrefloopError: there is none, it is damaged, or its weights are behind a server.
    """
    here = Path(name)
    for place in ([str(work_directory(here) / "prefloop.db")] if here.is_dir() else []) + [location]:
        if "://" not in place and not Path(place).exists():
            continue
        with Store(place, must_exist=True) as store:
            checkpoint = _by_directory(store, here) if here.is_dir() else find_checkpoint(store, name)
            if checkpoint is not None:
                yield Found(
                    name, _whole(checkpoint, here if here.is_dir() else Path(checkpoint.path)), checkpoint, store
                )
                return
    if not here.exists() and model_name(name) is not None and "/" not in name:
        raise PrefloopError(f"there is no checkpoint {name} in {location}, nor such a directory: see `prefloop status`")
    yield Found(name, fetch_model(name))


def _by_directory(store: Store, directory: Path) -> Checkpoint | None:
    """The checkpoint of a directory: of this path, or of this content (called from elsewhere, or moved)."""
    known = [one for one in store.checkpoints() if one.manifest_hash]
    there = (one for one in known if Path(one.path).is_dir() and directory.samefile(one.path))
    manifest = directory / MANIFEST
    digest = sha256_of(manifest) if manifest.is_file() else ""
    return next(there, None) or next((one for one in known if one.manifest_hash == digest), None)


def _whole(checkpoint: Checkpoint, directory: Path) -> Path:
    if checkpoint.algorithm == SERVED:
        raise PrefloopError(f"checkpoint {checkpoint.path} is behind a server: its weights are not here")
    if checkpoint.manifest_hash and verify(directory) != checkpoint.manifest_hash:
        raise PrefloopError(f"checkpoint {directory} is not the one that was recorded: restore it")
    return fetch_model(str(directory) if checkpoint.manifest_hash else checkpoint.path)


def write_model(found: Found, output: Path, *, merge: bool, called: str = "") -> None:
    """Write a checkpoint as a directory that transformers or peft open, with its tokenizer, template and card.

    With `merge` its adapter is merged into the model below: in float32, then rounded to that model's own type.
    `called` is how the card's lines load it, else by its directory.

    Raises:
        PrefloopError: the output is there already; with `merge`, there is no adapter or it is a reward model's; as
            `load_policy`.
    """
    if output.exists():
        raise PrefloopError(f"{output} exists already: name a new directory")
    if merge:
        check_merge(found)

    def write(directory: Path) -> None:
        if merge:
            _write_merged(found.directory, directory)
        else:
            skipped = shutil.ignore_patterns(MANIFEST, ".gitattributes")
            shutil.copytree(found.directory, directory, dirs_exist_ok=True, ignore=skipped)
        if (text := card_of(found, called or str(output), merged=merge)) is not None:
            (directory / CARD).write_text(text, encoding="utf-8")

    save_atomically(output, write)


def check_merge(found: Found) -> None:
    """See that there is an adapter to merge.

    Raises:
        PrefloopError: there is none, or it is a reward model's.
    """
    if (found.directory / "reward_model.json").is_file():
        raise PrefloopError(f"{found.name} is a reward model: leave --merge out")
    if not (found.directory / "adapter_config.json").is_file():
        raise PrefloopError(f"{found.name} is no adapter, but a whole model: leave --merge out")


def _write_merged(adapter: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig

    from prefloop.models.load import Policy, adapter_base, load_policy

    policy = load_policy(str(adapter))
    dtype = AutoConfig.from_pretrained(fetch_model(adapter_base(adapter))).dtype or torch.float32
    merged = policy.model.merge_and_unload().to(dtype)
    merged.config.dtype = dtype
    Policy(merged, policy.tokenizer).save(directory)


# --- cards ------------------------------------------------------------------------------------------------------


def card_of(found: Found, called: str, *, merged: bool) -> str | None:
    """The card of a checkpoint: what the store knows of it; None where the one that it has is to stay."""
    checkpoint, store = found.checkpoint, found.store
    if checkpoint is None or store is None or checkpoint.algorithm in ("load", "initial"):
        if (found.directory / CARD).is_file() and not merged:
            return None
        return bare_card(called, _base_of(found.directory) if merged else "", merged=merged)
    parents = ancestors(store, checkpoint)[1:]
    start = store.event(checkpoint.run_id, BEFORE, "start") or {}
    recipe = store.event(checkpoint.run_id, FIRST, "recipe")
    if recipe is not None:
        data, outcome = (store.event(checkpoint.run_id, FIRST, kind) or {} for kind in ("data", "train"))
        return model_card(called, recipe, start, data, outcome, parents, merged=merged)
    return run_card(called, _run_facts(store, checkpoint), start, parents, merged=merged)


def _base_of(directory: Path) -> str:
    from prefloop.models.load import adapter_base

    with readable(f"the adapter in {directory}"):
        return adapter_base(directory)


def _run_facts(store: Store, checkpoint: Checkpoint) -> JSONObject:
    """What a run's events say of the checkpoint of one of its updates."""
    run, last = store.run(checkpoint.run_id), checkpoint.iteration
    assert run is not None
    update = parse_settings(UpdateSettings, run["settings"]["train"], f"run {run['name']}")
    events = {kind: store.event(checkpoint.run_id, last, kind) or {} for kind in ("sft", "train", "curate", "judge")}
    evaluations = [event["detail"] for event in store.events(checkpoint.run_id, kind="evaluate")]
    at = {str(detail["checkpoint_id"]): detail for detail in evaluations}
    start_id = (store.event(checkpoint.run_id, BEFORE, "policy") or {}).get("checkpoint_id", "")
    rater = store.raters().get(str(events["judge"].get("rater_id")))
    return {
        "name": run["name"],
        "iteration": last,
        "settings": run["settings"],
        "knobs": resolve_knobs(update.algorithm, update),
        **events,
        "before": at.get(str(start_id)),
        "after": at.get(checkpoint.id),
        "judges": [f"`{rater.name}` ({rater.kind.value}, `{rater.id}`)"] if rater is not None else [],
    }


# --- a hub ------------------------------------------------------------------------------------------------------


def push_model(found: Found, repo: str, *, merge: bool, private: bool, revision: str) -> str:
    """Put a checkpoint with its card into a repository of the hub; returns the address of the commit.

    Raises:
        PrefloopError: as `check_repository`, `write_model` and `upload`; the adapter's model is not on the hub.
    """
    check_repository(repo, revision)
    if merge:
        check_merge(found)
    elif (found.directory / "adapter_config.json").is_file():
        _check_base(found)
    with tempfile.TemporaryDirectory(prefix="prefloop-push-") as folder:
        directory = Path(folder) / "model"
        write_model(found, directory, merge=merge, called=repo)
        (directory / MANIFEST).unlink()
        shown = Path(found.name).name if Path(found.name).exists() else found.name  # where it lies is nobody's business
        message = f"{shown}, merged" if merge else shown
        return upload(directory, repo, private=private, revision=revision, message=message)


def _check_base(found: Found) -> None:
    """See that others can have the model below an adapter.

    Raises:
        PrefloopError: it is a path of this machine, or cannot be had at all.
    """
    base = _base_of(found.directory)
    what = f"{found.name} is an adapter of {base}, which"
    if Path(base).exists():
        raise PrefloopError(f"{what} is only here: give --merge, or train the adapter on a model of the hub")
    try:
        if model_name(base) is None:
            raise PrefloopError("there is no such directory")
        pinned_model(base)
    except PrefloopError as error:
        raise PrefloopError(
            f"{what} others cannot load ({error}): name its model on the hub as base_model_name_or_path in "
            f"{found.directory / 'adapter_config.json'}"
        ) from None
