"""`prefloop train OBJECTIVE`: one objective on stored data, from a model to a checkpoint with its card.

Everything is a run in a store: the rows become a frozen dataset, what was done to them and what came of it are events,
the result is a checkpoint with its parent. Killed anywhere, the same call goes on and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefloop.hub import pinned_model
from prefloop.losses.registry import needs_reference, resolve_knobs, resolve_parts
from prefloop.losses.settings import LossSettings
from prefloop.records import Checkpoint, JSONObject, PrefloopError, content_hash
from prefloop.stages.context import BEFORE, LOCK, claimed, run_id
from prefloop.stages.fit_data import FitData, Selected, files_of, ready, select
from prefloop.stages.fit_settings import FitProgress, FitSettings, reads, work_directory
from prefloop.stages.looking import ancestors
from prefloop.stages.selecting import sha256_of
from prefloop.store import Store
from prefloop.training.model_card import CARD, model_card

if TYPE_CHECKING:
    from prefloop.stages.fit_models import Learner, Outcome

PLOT = "reliability.svg"
STATES = "training"  # of the work directory: where the state of a training lies
FIRST = 0  # the iteration of a run that has only one
ANEW = "put it back, or give another --output to train anew"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a training came to: its checkpoint, and the details of its events `start`, `data` and `train`."""

    checkpoint: Checkpoint
    start: JSONObject
    data: JSONObject
    train: JSONObject
    done_before: bool = False


Check = Callable[[FitSettings, Selected], None]


def fit(
    settings: FitSettings, store: Store, output: Path, progress: FitProgress | None = None, check: Check | None = None
) -> Fitted:
    """Train an objective on stored data, or go on with it where it was killed; `output` becomes the checkpoint.

    `check` sees the rows before a model is loaded, and may refuse. A training that fails before its first step leaves
    neither a run nor its directory, but for the store in it.

    Raises:
        PrefloopError: the output is there and comes of something else, another process is at it, or a bad row, model
            or setting, each in one line.
    """
    output = Path(os.path.relpath(output))  # one name for one place, however it is spelled
    fitting = _Fitting(settings, store, output, progress or FitProgress(), check)
    made_here = not (fitting.directory / LOCK).exists()
    with claimed(store, str(output), fitting.directory, fitting.recipe(), "give another --output"):
        try:
            return fitting.found() or fitting.go_on()
        except BaseException:
            if made_here:
                fitting.leave_nothing_unless_begun()
            raise


@dataclass(slots=True)
class _Fitting:
    """One training, as a run of the store."""

    settings: FitSettings
    store: Store
    output: Path
    progress: FitProgress
    check: Check | None = None

    @property
    def id(self) -> str:
        """The run's id."""
        return run_id(str(self.output))

    @property
    def directory(self) -> Path:
        """Where its lock and state lie."""
        return work_directory(self.output)

    def leave_nothing_unless_begun(self) -> None:
        """Forget a run that failed on its model, rows or settings; one that has begun to train stays, to go on."""
        with contextlib.suppress(PrefloopError, OSError):  # what went wrong before is what is to be told
            if self._event(BEFORE, "start") is None:
                self.store.forget_run(self.id)
                (self.directory / LOCK).unlink()
                self.directory.rmdir()  # unless the store is there, too

    def recipe(self) -> JSONObject:
        """All that decides the result, with the content of files in place of where they lie."""
        recipe = self.settings.model_dump(mode="json", exclude={"data", "eval_data", "report_to"})
        for name in ("data", "eval_data"):
            files = files_of(getattr(self.settings, name))
            recipe[name] = [{"file": file.path.name, "sha256": sha256_of(file.path)} for file in files]
        if self.settings.chat_template:
            recipe["chat_template"] = sha256_of(Path(self.settings.chat_template))
        return recipe

    def _settings(self) -> JSONObject:
        """Of the recipe what the objective reads, with every knob as it counts, those of its mixture's losses too."""
        name, settings = self.settings.objective, self.settings
        knobs = resolve_knobs(name, settings)
        for part, (_, arguments) in resolve_parts(name, settings).items():
            if part != name:
                knobs |= {f"{part}.{key}": value for key, value in arguments.items()}
        found, has_reference = self.recipe(), needs_reference(name, settings)
        others = [key for key in found if key not in LossSettings.model_fields and key != "objective"]
        read = {key: found[key] for key in others if reads(name, key, has_reference=has_reference)}
        return {"objective": name, **knobs, **read}

    def _pinned(self) -> FitSettings:
        """The settings with the commits of a hub's models: those that it began with, else the newest.

        Raises:
            PrefloopError: as `pinned_model`.
        """
        began: JSONObject = self._event(BEFORE, "start") or {}
        settings, reference = self.settings, self.settings.reference
        names = {"model": began.get("model") or pinned_model(settings.model)}
        if reference:
            names["reference"] = began.get("reference") or pinned_model(reference)
        return settings.model_copy(update=names)

    def found(self) -> Fitted | None:
        """What an earlier call came to; None where it is not finished.

        Raises:
            PrefloopError: its checkpoint is not there or damaged, the model has other weights than it started from, or
                the output is there without being its.
        """
        from prefloop.stages.fit_models import origins
        from prefloop.training.checkpoint import verify

        start, data, done = (self._event(BEFORE, "start"), self._event(FIRST, "data"), self._event(FIRST, "train"))
        if done is None:
            if start is None and self.output.exists():
                raise PrefloopError(f"{self.output} exists already: name a new --output")
            return None
        checkpoint = self.store.checkpoint(str(done["checkpoint_id"]))
        assert checkpoint is not None
        if verify(self.output) != checkpoint.manifest_hash:
            raise PrefloopError(
                f"{self.output} is not what was recorded: restore it, or remove {self.directory} to train anew"
            )
        try:
            now = origins(self._pinned())
        except PrefloopError as error:
            self.progress.note(f"whether it started from the same model could not be checked: {error}")
        else:
            self._check_origins(now)
        shutil.rmtree(self.directory / STATES, ignore_errors=True)  # what a kill at the very end left
        return Fitted(checkpoint, start or {}, data or {}, done, done_before=True)

    def go_on(self) -> Fitted:
        """The training, from its last saved state.

        Raises:
            PrefloopError: what it began with is not what is there now; and as its parts.
        """
        from prefloop.stages.fit_models import Place, circumstances, load_learner, settle, train_learner

        started = time.perf_counter()
        self.progress.begin("read rows")
        selected = select(self.settings, self.store)
        settle(self.settings)
        self.progress.begin("load the model")
        settings = self._pinned()
        if self.check is not None:
            self.check(settings, selected)
        learner = load_learner(settings)
        self.progress.begin("render rows")
        start = circumstances(settings)
        data = ready(selected, settings, self.store, learner.renderer, learner.context, self.id)
        self._check_unchanged(start, data)
        for note in (*learner.notes(), *data.notes()):
            self.progress.note(note)
        outcome = train_learner(
            learner,
            data,
            settings,
            start,
            Place(self.store, self.id, str(self.output), FIRST, self.directory, self.directory / STATES),
            identity=content_hash(self.recipe(), start["weights"], data.dataset.id, learner.renderer.tokenizer_hash),
            progress=self.progress,
            on_begin=lambda: self._begin(start, data),
        )
        return self._save(learner, start, data, outcome, time.perf_counter() - started)

    def _check_unchanged(self, start: JSONObject, data: FitData) -> None:
        """Hold what there is against what the training began with, where it has begun.

        Raises:
            PrefloopError: the model, the reference or the rows are others than they were.
        """
        self._check_origins(start)
        rows_before = self._event(FIRST, "data")
        if rows_before is not None and rows_before["dataset_id"] != data.dataset.id:
            raise PrefloopError(f"the store gives other rows than when this training began: {ANEW}")

    def _check_origins(self, now: JSONObject) -> None:
        before = self._event(BEFORE, "start")
        for name, what in (("weights", f"model {now['model']}"), ("reference_weights", "the reference")):
            if before is not None and before.get(name) != now.get(name):
                raise PrefloopError(f"{what} has other weights than when this training began: {ANEW}")

    def _begin(self, start: JSONObject, data: FitData) -> None:
        """Record what the training begins with, before its first step."""
        with self.store.transaction():
            for dataset in data.datasets:
                self.store.add_dataset(dataset)
            self.store.add_event(self.id, BEFORE, "start", start)
            self.store.add_event(self.id, FIRST, "data", data.detail)

    def _save(self, learner: Learner, start: JSONObject, data: FitData, outcome: Outcome, seconds: float) -> Fitted:
        from prefloop.training.checkpoint import save_atomically

        detail = outcome.to_dict()
        base, recipe = self._base(start), self._settings()
        parents = ancestors(self.store, base)
        card = model_card(self._called(), recipe, start, data.detail, detail, parents)

        def write(directory: Path) -> None:
            learner.trained.save(directory)
            (directory / CARD).write_text(card, encoding="utf-8")
            if "reward_model" in detail:
                self._plot(detail["reward_model"]["reliability"], directory)

        manifest_hash = save_atomically(self.output, write)
        checkpoint = Checkpoint(
            content_hash("checkpoint", self.id, self.settings.objective, base.id, data.dataset.id),
            str(self.output),
            manifest_hash,
            self.settings.objective,
            base.id,
            data.dataset.id,
            self.id,
            FIRST,
            detail["metrics"],
        )
        detail |= {"checkpoint_id": checkpoint.id, "algorithm": self.settings.objective, "seconds": seconds}
        with self.store.transaction():
            self.store.add_checkpoint(base)
            self.store.add_checkpoint(checkpoint)
            self.store.add_event(self.id, FIRST, "recipe", recipe)
            self.store.add_event(self.id, FIRST, "train", detail)
            self.store.add_event(self.id, FIRST, "finish", {"checkpoint_id": checkpoint.id, "wall_s": seconds})
        shutil.rmtree(self.directory / STATES, ignore_errors=True)
        return Fitted(checkpoint, start, data.detail, detail)

    def _called(self) -> str:
        """What the card's lines load: the directory from where it was trained, or its name where that is elsewhere."""
        return self.output.name if ".." in self.output.parts else str(self.output)

    def _plot(self, reliability: JSONObject, directory: Path) -> None:
        """The plot of a reward model's calibration, where it can be drawn."""
        from prefloop.report import figures, svg

        try:
            plot = svg.standalone(figures.reliability(reliability).svg)
        except PrefloopError as missing:
            self.progress.note(f"no {PLOT}: {missing}")
        else:
            (directory / PLOT).write_text(plot, encoding="utf-8")

    def _base(self, start: JSONObject) -> Checkpoint:
        """The model that the training started from: a checkpoint of the store where it is one."""
        here = Path(start["model"])
        for checkpoint in self.store.checkpoints():
            if here.is_dir() and Path(checkpoint.path).is_dir() and here.samefile(checkpoint.path):
                return checkpoint
        key = content_hash("checkpoint", self.id, "load", start["model"], start["weights"])
        return Checkpoint(key, start["model"], "", "load", run_id=self.id)

    def _event(self, iteration: int, kind: str) -> JSONObject | None:
        return self.store.event(self.id, iteration, kind)
