"""What every stage of a run needs: settings, store, environment, judge, directory, and the lock on the run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop.clients.vllm import VLLMSettings
from prefloop.environments import make_environment
from prefloop.environments.agent import RUN_LIMITS
from prefloop.environments.base import Outcome, TaskSource
from prefloop.judges.base import Judge
from prefloop.judges.llm import LLMJudge
from prefloop.judges.rules import RuleJudge
from prefloop.records import (
    JSONObject,
    Judgement,
    PrefloopError,
    Rater,
    RaterKind,
    Status,
    content_hash,
)
from prefloop.stages.scorers import process_reward_judge, reward_judge
from prefloop.stages.settings import RunSettings
from prefloop.store import Store
from prefloop.store.metrics import Training
from prefloop.training.settings import TrainingSettings

if TYPE_CHECKING:
    from prefloop.stages.policies import Policies
    from prefloop.training.writers import MetricsWriter

FILES = "files"  # the event that says what a run's first trajectories were made from
LOCK = "lock"  # of a run's directory
AGENT_LOGS = "agents"  # in it: what agents and graders that failed had printed
PAYING = {"retry", "concurrency", "budget_usd", "input_price", "output_price", "key_variable"}  # of a judge's calls
CIRCUMSTANTIAL: dict[str, Any] = {
    "store": True,
    "directory": True,
    "policy": {"vllm": set(VLLMSettings.model_fields), "server": {"retry"}},
    "environment": RUN_LIMITS,
    "gateway": {"port", "max_queue", "max_episodes", "max_body_bytes", "request_deadline_s"},
    "judge": {"failure_budget": True, "group_size": True, "llm": PAYING},
    "guard": {"max_rolled_back"},
}
"""Settings that may change while a run goes on, since no result depends on them: where things are, how servers are
reached, and how long and how often something is tried. Deadlines of episodes are not among them: an episode that ends
at one is graded."""

OF_ROLLOUTS = ("environment.", "gateway.")
"""Settings that may change until a run has its first trajectory, such as the command of an agent that never worked."""

BEFORE = -1  # the "iteration" of what comes before the loop


class Progress:
    """Told how a run goes; this one keeps quiet."""

    def begin(self, iteration: int, stage: str, total: int) -> None:
        """A stage of `total` units of work begins."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the current stage are done."""

    def end(self, iteration: int, stage: str, detail: JSONObject) -> None:
        """A stage has ended, with what it found."""


@dataclass
class Run:
    """A run in this process."""

    settings: RunSettings
    store: Store
    progress: Progress = field(default_factory=Progress)

    @property
    def id(self) -> str:
        """The run's id: a function of its name."""
        return run_id(self.settings.name)

    @property
    def directory(self) -> Path:
        """Where the run's checkpoints and report lie."""
        return Path(self.settings.directory) / self.settings.name

    @cached_property
    def environment(self) -> TaskSource:
        """The environment of the run file."""
        return make_environment(self.settings.environment)

    @cached_property
    def verifier(self) -> Rater:
        """The test rater that verifies outcomes."""
        specification = self.settings.environment.model_dump(mode="json", exclude=RUN_LIMITS)
        if files := self.environment.files():
            specification["files"] = files
        return Rater(RaterKind.TEST, f"{self.environment.name}:verified", specification)

    @cached_property
    def judge(self) -> Judge:
        """The frozen judge of the run file."""
        settings = self.settings.judge
        if settings.kind == "llm" and settings.llm is not None:
            return LLMJudge(settings.llm, self.store)
        if settings.kind == "reward" and settings.reward is not None:
            return reward_judge(settings.reward, self.settings.num_threads)
        if settings.kind == "process" and settings.process is not None:
            return process_reward_judge(settings.process, self.settings.num_threads)
        return RuleJudge(self.verifier, settings.rules)

    def check(self) -> None:
        """Make the judge now, and see that the environment can begin and metrics can go where they are to go.

        Raises:
            PrefloopError: the judge cannot be asked (no key, no package, a wrong rubric, or a model that cannot be
                loaded), the environment cannot begin, or a package for metrics is missing.
        """
        from prefloop.training.writers import check_reporters

        _ = self.judge
        self.environment.check()
        for table in (self.settings.sft, self.settings.train):
            check_reporters(table.report_to if table is not None else [])

    @cached_property
    def policies(self) -> Policies:
        """The models in memory; needs torch."""
        from prefloop.stages.policies import Policies

        return Policies(self)

    def writers(
        self, iteration: int, stage: str, settings: TrainingSettings, attempt: int = 0
    ) -> AbstractContextManager[list[MetricsWriter]]:
        """Where the metrics of a training go: the store, and what its settings name."""
        from prefloop.training.writers import metrics_writers

        training = Training(self.id, iteration, stage, attempt)
        config = settings.model_dump(mode="json")
        options: JSONObject = {"run_name": self.settings.name, "directory": self.directory, "config": config}
        return metrics_writers(self.store, training, settings.report_to, **options)

    @contextmanager
    def recorded(self, iteration: int, stage: str, total: int = 1) -> Iterator[JSONObject]:
        """Time a stage and record what it found; the caller fills the detail that is yielded.

        What the stage adds to the store in `self.store.transaction()` before this block ends stays even if the
        event is lost; running the stage again then adds nothing.
        """
        self.progress.begin(iteration, stage, total)
        started = time.perf_counter()
        detail: JSONObject = {}
        yield detail
        detail["seconds"] = time.perf_counter() - started
        self.store.add_event(self.id, iteration, stage, detail)
        self.progress.end(iteration, stage, detail)

    def found(self, iteration: int, stage: str) -> JSONObject | None:
        """What a finished stage found, or None."""
        return self.store.event(self.id, iteration, stage)

    def require(self, iteration: int, stage: str) -> JSONObject:
        """What a finished stage found.

        Raises:
            PrefloopError: that stage of the iteration is not finished.
        """
        found = self.found(iteration, stage)
        if found is None:
            raise PrefloopError(
                f"run {self.settings.name}: the stage {stage!r} of iteration {iteration + 1} is not finished; "
                f"run `prefloop {stage}` first"
            )
        return found

    def verified(self, trajectory_id: str, outcome: Outcome) -> Judgement:
        """The judgement of the test rater."""
        criteria = {**outcome.metrics, "success": float(outcome.success)}
        return Judgement(trajectory_id, self.verifier.id, Status.OK, outcome.value, outcome.score, criteria=criteria)

    def keep_files(self) -> None:
        """Record what the environment's files are as the first trajectories are kept: from then on they stay so."""
        files = self.verifier.specification.get("files")
        if files and self.found(BEFORE, FILES) is None:
            self.store.add_event(self.id, BEFORE, FILES, files)

    def verdicts(self, trajectory_ids: Iterable[str]) -> dict[str, Judgement]:
        """The test rater's judgements by trajectory."""
        found = self.store.judgements(trajectory_ids=trajectory_ids, rater_id=self.verifier.id)
        return {judgement.trajectory_id: judgement for judgement in found}

    def checkpoint_before(self, iteration: int) -> str:
        """The id of the checkpoint that an iteration starts from.

        Raises:
            PrefloopError: the iteration before is not finished.
        """
        if iteration > 0:
            return str(self.require(iteration - 1, "train")["checkpoint_id"])
        found = self.found(BEFORE, "policy")
        if found is None:
            raise PrefloopError(f"run {self.settings.name} has no start policy yet; run `prefloop rollout` first")
        return str(found["checkpoint_id"])

    def current_iteration(self) -> int:
        """The number of iterations whose update is finished."""
        return sum(1 for event in self.store.events(self.id, kind="train") if event["iteration"] >= 0)


def run_id(name: str) -> str:
    """The id of the run of this name."""
    return content_hash("run", name)


@contextmanager
def opened(run: Run) -> Iterator[Run]:
    """Lock the run, record it, and check that it is the same run as before.

    Raises:
        PrefloopError: another process holds the run, it lies elsewhere, it was started with other settings, or a file
            that its tasks or outcomes are made from is another one.
    """
    settings = run.settings.model_dump(mode="json", exclude=CIRCUMSTANTIAL)
    with claimed(run.store, run.settings.name, run.directory, settings, "give the run file another name"):
        _check_files(run)
        run.store.add_raters([run.verifier])
        yield run


def _check_files(run: Run) -> None:
    began = run.found(BEFORE, FILES)
    if began is None:
        return
    before, now = began, run.environment.files()
    changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    if changed:
        raise PrefloopError(
            f"{', '.join(changed)} changed since run {run.settings.name} began: its figures would not be of one task; "
            "give the run file another name, or set the file back"
        )


@contextmanager
def claimed(store: Store, name: str, directory: Path, settings: JSONObject, otherwise: str) -> Iterator[None]:
    """Lock a run's directory, record the run, and check that it is the same as before.

    `otherwise` is what to do, in words, for a run of its own.

    Raises:
        PrefloopError: another process holds the run, it lies elsewhere, or it was started with other settings.
    """
    _check_place(store, name, directory, otherwise)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / LOCK, name):
        known = store.run(run_id(name))
        changed = _differences(known["settings"], settings) if known is not None else []
        begun = store.has_trajectories(run_id(name)) or not all(one.startswith(OF_ROLLOUTS) for one in changed)
        if changed and begun and store.events(run_id(name)):
            raise PrefloopError(
                f"run {name} was started with other settings ({', '.join(changed)}): {otherwise}, or set them back"
            )
        if changed:  # nothing was done under those that change, such as a model that is not there
            store.change_settings(run_id(name), settings)
        store.add_run(run_id(name), name, str(directory), settings)
        yield


def _check_place(store: Store, name: str, directory: Path, otherwise: str) -> None:
    """A lock made anew in another place would hold nobody off, and the run's checkpoints are not there."""
    known = store.run(run_id(name))
    if known is None:
        return
    if Path(known["directory"]).resolve() != directory.resolve():
        raise PrefloopError(
            f"run {name} lies in {known['directory']}, not in {directory}: {otherwise}, or name its directory again"
        )
    if not (directory / LOCK).exists():
        raise PrefloopError(
            f"run {name} is in {store.location}, but its directory {directory} is not here: "
            "run this where it was started, or restore the directory"
        )


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise PrefloopError(
                f"run {name} is held by another process (pid {holder}): wait for it or end it"
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _differences(before: JSONObject, after: JSONObject, prefix: str = "") -> list[str]:
    changed: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key}: {_shown(old)} → {_shown(new)}")
    return changed


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a table"
    return "nothing" if value is None else str(value)


def circumstances(settings: RunSettings) -> JSONObject:
    """What a result depends on besides the settings of the components."""
    return {
        "name": settings.name,
        "seed": settings.seed,
        "device": settings.policy.device,
        "num_threads": settings.num_threads,
        "versions": versions("prefloop", "torch", "transformers", "numpy"),
    }


def versions(*packages: str) -> JSONObject:
    """The versions of those of these packages that are installed."""
    found: JSONObject = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
