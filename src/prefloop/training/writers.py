"""Where the metrics of a training go: always to the store, and to whatever else was asked for.

A writer is opened at its first metrics, so that a training that never begins leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from prefloop.records import JSONObject, PrefloopError, content_hash
from prefloop.store import Store
from prefloop.store.metrics import Training, add_metrics
from prefloop.training.metrics import Metrics

PROJECT = "prefloop"
GROUP = 64
"""Steps that the store's writer commits together."""


class MetricsWriter(Protocol):
    """Takes the metrics of a training, from its first step on, in order; one that goes on begins at the first again."""

    def write(self, step: int, metrics: Metrics) -> None:
        """The metrics after a step (1, 2, …); those of held-out rows among them begin with `eval/`."""

    def close(self) -> None:
        """No more will come: bring what is left to where it goes."""


class StoreWriter:
    """Metrics to the store, in groups of steps; a training that begins anew replaces what it left there."""

    def __init__(self, store: Store, training: Training) -> None:
        self._store = store
        self._training = training
        self._waiting: list[tuple[int, Metrics]] = []
        self._begun = False

    def write(self, step: int, metrics: Metrics) -> None:
        """Keep the metrics that are finite for the next commit."""
        self._waiting.append((step, {name: value for name, value in metrics.items() if isfinite(value)}))
        if len(self._waiting) == GROUP:
            self._commit()

    def close(self) -> None:
        """Commit what is left."""
        if self._waiting:
            self._commit()

    def _commit(self) -> None:
        add_metrics(self._store, self._training, self._waiting, anew=not self._begun)
        self._begun, self._waiting = True, []


@dataclass(frozen=True, slots=True)
class Destination:
    """What a training is called elsewhere: its own name within its run's, where files go, and its settings."""

    run_name: str
    name: str
    directory: Path
    config: JSONObject


class TensorBoardWriter:
    """Metrics as scalars for TensorBoard, in a directory for each training."""

    def __init__(self, destination: Destination) -> None:
        self._directory = destination.directory / "tensorboard" / destination.name
        self._writer: Any = None

    def write(self, step: int, metrics: Metrics) -> None:
        """Write each metric; what a training before this one left from the first step on is hidden."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Bring everything to disk."""
        if self._writer is not None:
            self._writer.close()


class TrackerWriter:
    """Metrics to a run of a tracker: anything that opens to an object with `log(metrics, step=…)` and `finish()`."""

    def __init__(self, open_run: Callable[[], Any]) -> None:
        self._open_run = open_run
        self._run: Any = None

    def write(self, step: int, metrics: Metrics) -> None:
        """Log the metrics."""
        if self._run is None:
            self._run = self._open_run()
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


def _wandb(destination: Destination) -> MetricsWriter:
    def open_run() -> Any:
        import wandb

        return wandb.init(
            project=PROJECT,
            group=destination.run_name,
            name=f"{destination.run_name}/{destination.name}",
            id=content_hash("wandb", destination.run_name, destination.name)[:16],
            resume="allow",
            dir=str(destination.directory),
            config=destination.config,
        )

    return TrackerWriter(open_run)


def _trackio(destination: Destination) -> MetricsWriter:
    def open_run() -> Any:
        import trackio

        return trackio.init(
            project=PROJECT,
            group=destination.run_name,
            name=f"{destination.run_name}/{destination.name}",
            config=destination.config,
            embed=False,
        )

    return TrackerWriter(open_run)


WRITERS: Mapping[str, Callable[[Destination], MetricsWriter]] = {
    "tensorboard": TensorBoardWriter,
    "trackio": _trackio,
    "wandb": _wandb,
}


def check_reporters(report_to: Sequence[str]) -> None:
    """See that metrics can go where they are to go.

    Raises:
        PrefloopError: a package is missing.
    """
    for name in report_to:
        if find_spec(name) is None:
            raise PrefloopError(f"report_to {name!r} needs its package: pip install 'prefloop[{name}]'")


@contextmanager
def metrics_writers(
    store: Store,
    training: Training,
    report_to: Sequence[str] = (),
    *,
    run_name: str,
    directory: Path,
    config: JSONObject,
) -> Iterator[list[MetricsWriter]]:
    """The store's writer and those asked for, closed at the end whatever happens.

    Raises:
        PrefloopError: a package is missing.
    """
    check_reporters(report_to)
    destination = Destination(run_name, _name(training), directory, config)
    writers: list[MetricsWriter] = [StoreWriter(store, training), *(WRITERS[name](destination) for name in report_to)]
    with ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
        yield writers


def _name(training: Training) -> str:
    """A training's name within its run, iterations counted from 1."""
    before_loop = training.iteration < 0
    name = training.stage if before_loop else f"{training.iteration + 1:03d}-{training.stage}"
    return f"{name}-try-{training.attempt + 1}" if training.attempt else name
